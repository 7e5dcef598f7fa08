"""grouped_matmul_finalize_routing (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, reseed, rng, same
from fused_grouped_swiglu import E2M1, E8M0, mx_case
from grouped_data import COUNT_FAULTS, as_int32, i4, i8, low64, nz, positive, spans

reseed(__name__)


STEPS = Steps(
    spans=spans,
    scale=same,
    rows=same,
    biased=np.add,
    logit=np.multiply,
    to=lambda row, index, batch: index[row],
    added=np.add,
    shares=True,
    shared_at=same,
    shared_weight=same,
)


def routing(case, steps):
    x, w, scale, rows, offset = (np.asarray(c, dtype=float) for c in case["values"])
    call, counts, batch = case["call"], torch.tensor(case["counts"]), case["batch"]
    k, scale, rows = x.shape[1], steps.scale(scale), steps.rows(rows)
    y = np.zeros((batch, w.shape[2]))
    logit = np.ones(len(x)) if call.get("logit") is None else array(call["logit"])
    index = array(call["row_index"])
    bias = None if case.get("bias") is None else array(case["bias"])
    for expert, start, end in steps.spans(counts, 1):
        end = min(end, int(counts.sum()))
        if start >= end:
            continue
        each = x[start:end] * np.repeat(rows[start:end], -(-k // rows.shape[1]), 1)[:, :k]
        value = each @ (
            (w[expert] + offset[expert]) * np.repeat(scale[expert], -(-k // scale.shape[1]), 0)[:k]
        )
        value = value if bias is None else steps.biased(value, bias[expert])
        for j, row in enumerate(steps.logit(value, logit[start:end, None])):
            to = steps.to(start + j, index, batch)
            y[to] = steps.added(row, y[to])
    if call.get("shared_input") is not None and steps.shares:
        at, shared = steps.shared_at(call["shared_input_offset"]), array(call["shared_input"])
        y[at : at + len(shared)] += steps.shared_weight(call["shared_input_weight"]) * shared
    return [y]


def call_routing(case):
    arguments = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in case["call"].items()}
    groups = torch.tensor(case["counts"])
    kind = case.get("list_type", 1)
    groups = (groups if kind == 1 else groups.cumsum(0)).npu()
    batch = case["batch"] if case["batch"] != len(case["call"]["x"]) else 0
    return torch_npu.npu_grouped_matmul_finalize_routing(
        group_list=groups, group_list_type=kind, output_bs=batch, **arguments
    )


def routed(x, w, scale, rows, call, counts, batch, shared=2, offset=None, **more):
    m, n = len(x), w.shape[2]
    index = torch.tensor(rng.integers(0, batch, m))
    call |= {"logit": positive(m) * 9, "row_index": index}
    if shared:
        call |= {
            "shared_input": bf16(shared, n),
            "shared_input_weight": 0.5,
            "shared_input_offset": 1,
        }
    offset = np.zeros_like(scale) if offset is None else offset
    return {
        "values": [x, w, scale, rows, offset],
        "call": call,
        "counts": counts,
        "batch": batch,
        **more,
    }


def routed_int8(m, k, n, counts, batch, with_bias=False, **more):
    e = len(counts)
    x, w, s, r = i8(m, k), i8(e, k, n), positive(e, n) / 64, positive(m)
    call = {"x": x, "w": nz(w), "scale": s[:, None] if A5 else s, "pertoken_scale": r}
    bias = bf16(e, n) if with_bias else None
    if with_bias:
        call["bias"] = bias
    return routed(
        array(x),
        array(w),
        array(s)[:, None],
        array(r)[:, None],
        call,
        counts,
        batch,
        bias=bias,
        **more,
    )


def routed_int4(m, counts, batch, with_offset):
    e, k, n = len(counts), 2048, 7168
    x, w, s, r = i8(m, k), i4(e, k, n), positive(e, 1, n) / 64, positive(m) / 16
    offset = i4(e, 1, n).float() if with_offset else None
    bias = 8 * w.sum(1, dtype=torch.int32) * s[:, 0]
    call = {"x": x, "w": as_int32(w), "scale": low64(s), "bias": bias, "pertoken_scale": r}
    if with_offset:
        call["offset"] = offset * s
    return routed(
        array(x), array(w), array(s), array(r)[:, None], call, counts, batch, offset=offset
    )


def routed_mx(m, k, n, counts, batch, **changes):
    case = mx_case(m, k, n, counts, **changes)
    call, (x, w, scale, rows, _) = case["call"], case["values"]
    call = {
        "x": call["x"],
        "w": call["weight"][0],
        "scale": call["weight_scale"][0],
        "pertoken_scale": call["x_scale"],
    }
    call |= {"scale_dtype": E8M0, "pertoken_scale_dtype": E8M0, "bias": bf16(len(counts), n)}
    if changes.get("four"):
        call |= {"x_dtype": E2M1, "w_dtype": E2M1}
    return routed(x, w, scale, rows, call, counts, batch, bias=call["bias"])


ROUTING_FAULTS = COUNT_FAULTS | {
    "no scale": dict(scale=np.ones_like),
    "rows' scale": dict(rows=lambda rows: np.roll(rows, 1, 0)),
    "no logit": dict(logit=same),
    "rows as they come": dict(to=lambda row, index, batch: row if row < batch else index[row]),
    "overwritten": dict(added=same),
    "no shared input": dict(shares=False),
    "shared input at 0": dict(shared_at=lambda at: 0),
    "shared weight 1": dict(shared_weight=lambda weight: 1),
}
BIAS_FAULTS = {"no bias": dict(biased=same)}


def routing_family(name, cases, faults):
    check(
        name,
        lambda index: [call_routing(cases[index])],
        lambda index, steps: routing(cases[index[0]], steps),
        STEPS,
        [(i,) for i in range(len(cases))],
        faults,
        1e-4,
    )


routing_family(
    "grouped_matmul_finalize_routing int8",
    [
        routed_int8(9, 48, 256, (3, 0, 6), 5),
        routed_int8(9, 32, 288, (3, 4), 9, shared=0, list_type=0),
        routed_int8(40, 512, 512, (8, 30, 2), 12),
    ]
    + ([routed_int8(9, 32, 256, (3, 4), 5, with_bias=True)] if A5 else []),
    ROUTING_FAULTS | (BIAS_FAULTS if A5 else {}),
)


def routing_with(**changes):
    case = routed_int8(9, 48, 256, (3, 6), 5)
    case["call"].update(changes)
    return lambda: call_routing(case)


refusals = [
    ("x1", routing_with(x=i8(9, 48).to(torch.int16))),
    ("x2", routing_with(w=nz(i8(2, 64, 256)))),
    ("scale", routing_with(scale=positive(2, 255))),
    ("pertoken_scale", routing_with(pertoken_scale=positive(8))),
    ("logit", routing_with(logit=positive(8))),
    ("row_index", routing_with(row_index=torch.zeros(8, dtype=torch.int64))),
    ("row_index", routing_with(row_index=torch.zeros(9))),
    ("shared_input", routing_with(shared_input=f32(2, 256))),
    ("shared_input", routing_with(shared_input_offset=4)),
]
if A5:
    routing_family(
        "grouped_matmul_finalize_routing MX",
        [
            routed_mx(9, 64, 6, (3, 0, 6), 5),
            routed_mx(9, 100, 70, (3, 6), 4, transposed=True),
            routed_mx(7, 70, 132, (3, 4), 5, four=True, transposed=True),
        ],
        ROUTING_FAULTS | BIAS_FAULTS,
    )
    refusals += [
        ("logit", routing_with(logit=None)),
        ("offset", routing_with(offset=f32(2, 1, 256))),
    ]
else:
    routing_family(
        "grouped_matmul_finalize_routing int4",
        [routed_int4(5, (2, 3), 4, False), routed_int4(5, (2, 3), 4, True)],
        ROUTING_FAULTS,
    )
    refusals += [
        ("x2", routing_with(w=i8(2, 48, 256))),
        (
            "x2",
            routing_with(w=nz(i8(2, 48, 224)), scale=positive(2, 224), shared_input=bf16(2, 224)),
        ),
        (
            "x2",
            routing_with(
                w=as_int32(i4(2, 48, 256)), scale=low64(positive(2, 1, 256)), bias=f32(2, 256)
            ),
        ),
        ("bias", routing_with(bias=f32(2, 256))),
    ]
for argument, call in refusals:
    refused("grouped_matmul_finalize_routing", call, argument)
