"""moe_finalize_routing (see fused_check.py)."""

import numpy as np
import torch
import torch_npu
from fused_check import A5, Steps, array, bf16, check, f32, refused, rng, same

STEPS = Steps(
    by_columns=lambda mode: mode in (0, 1),
    biased=lambda y, bias, experts: y + bias[experts],
    dropped=lambda place: place == -1,
    of_dropped=lambda bias, experts: 0,
    scaled=lambda y, scales: y * scales[..., None],
    sum=lambda y: y.sum(1),
    first_skip=np.add,
    second_skip=np.add,
)


def finalize(case, steps):
    rows, skip1, skip2, bias, scales, index, experts = (
        None if c is None else array(c) for c in case[:7]
    )
    k = 1 if scales is None else scales.shape[1]
    place = index.reshape(k, -1).T if steps.by_columns(case[7]) else index.reshape(-1, k)
    y = rows.reshape(-1, rows.shape[-1])[np.maximum(place, 0)]
    if bias is not None:
        y = steps.biased(y, bias, experts)
    y = np.where(
        steps.dropped(place)[..., None], 0 if bias is None else steps.of_dropped(bias, experts), y
    )
    y = steps.sum(y if scales is None else steps.scaled(y, scales))
    y = y if skip1 is None else steps.first_skip(y, skip1)
    return [y if skip2 is None else steps.second_skip(y, skip2)]


def twice(y, skip):
    return y + 2 * skip


def call_finalize(*case):
    return [torch_npu.npu_moe_finalize_routing(*case)]


def places(n, highest=None, dropped=()):
    """n different places below `highest`; -1 for those in `dropped`."""
    result = rng.permutation(highest or n)[:n]
    result[list(dropped)] = -1
    return torch.tensor(result, dtype=torch.int32)


def chosen(tokens, k, experts):
    return torch.tensor(rng.integers(0, experts, (tokens, k)), dtype=torch.int32)


cases = [
    (f32(12, 5), f32(6, 5), None, f32(4, 5), f32(6, 2), places(12), chosen(6, 2, 4), 0),
    (f32(12, 5), f32(4, 5), f32(4, 5), f32(9, 5), f32(4, 3), places(12), chosen(4, 3, 9), 2),
    (f32(12, 5), None, None, None, f32(4, 3), places(12), None, 2),
    (f32(7, 5), None, None, None, None, places(7), None, 0),
    (
        f32(4, 5, 3),
        f32(6, 3),
        f32(6, 3),
        f32(4, 3),
        f32(6, 2),
        places(12, 20, (0, 5)),
        chosen(6, 2, 4),
        1,
    ),
    (
        f32(4, 5, 3),
        f32(6, 3),
        None,
        f32(4, 3),
        f32(6, 2),
        places(12, 20, (1, 2, 3)),
        chosen(6, 2, 4),
        3,
    ),
    (f32(4, 5, 3), None, None, None, f32(6, 2), places(12, 20, (1, 7)), chosen(6, 2, 4), 3),
]
faults = {
    "the other order": dict(by_columns=lambda mode: mode in (2, 3)),
    "no bias": dict(biased=same),
    "bias of expert 0": dict(biased=lambda y, bias, experts: y + bias[experts * 0]),
    "no scales": dict(scaled=same),
    "scales of another token": dict(scaled=lambda y, scales: y * np.roll(scales, 1, 0)[..., None]),
    "last expert dropped": dict(sum=lambda y: y[:, :-1].sum(1)),
    "first skip dropped": dict(first_skip=same),
    "second skip dropped": dict(second_skip=same),
    "skips twice": dict(first_skip=twice, second_skip=twice),
    "dropped rows count": dict(dropped=lambda place: np.zeros(place.shape, bool)),
    "dropped rows have a bias": dict(of_dropped=lambda bias, experts: bias[experts]),
}
check("moe_finalize_routing", call_finalize, finalize, STEPS, cases, faults, 1e-5)
half = [
    (bf16(36, 4096), bf16(6, 4096), None, None, bf16(6, 6), places(36), chosen(6, 6, 256), 2),
    (
        bf16(36, 7168),
        bf16(6, 7168),
        None,
        None,
        f32(6, 6),
        places(36),
        None,
        0,
    ),  # scales may be wider
]
half_faults = {
    fault: replaced
    for fault, replaced in faults.items()
    if "bias" not in fault and fault not in ("second skip dropped", "dropped rows count")
}
check("moe_finalize_routing in 16 bits", call_finalize, finalize, STEPS, half, half_faults, 1.5e-2)


def refuse(
    argument,
    rows=(12, 5),
    skips=((6, 5), None),
    bias=(4, 5),
    scales=(6, 2),
    index=12,
    experts=(6, 2),
    mode=0,
):
    """A good call with something replaced: a shape, or the tensor itself."""

    def tensor(what, make):
        return what if what is None or isinstance(what, torch.Tensor) else make(*what)

    case = [tensor(what, f32) for what in (rows, *skips, bias, scales)]
    case += [
        index if isinstance(index, torch.Tensor) else places(index),
        tensor(experts, lambda *s: chosen(*s, 2)),
    ]
    on_npu = [None if t is None else t.npu() for t in case]
    refused("moe_finalize_routing", lambda: call_finalize(*on_npu, mode), argument)


refuse("'drop_pad_mode'", mode=4)
refuse("'expanded_permuted_rows'", rows=(4, 5, 5))
refuse("'expanded_permuted_rows'", mode=1)
refuse("'expanded_permuted_rows'", rows=(11, 5))
refuse("'expanded_permuted_rows'", rows=(1, 30, 5), bias=None, mode=3)
refuse("'expanded_permuted_rows'", rows=(12, 0), skips=(None, None), bias=None)
refuse("'expanded_permuted_rows'", rows=torch.ones(12, 5).int())
refuse("'expanded_src_to_dst_row'", index=11)
refuse("'expanded_src_to_dst_row'", index=places(12).long())
refuse("'skip1'", skips=((5, 5), None))
refuse("'skip1'", skips=(f32(6, 5).half(), None))
refuse("'skip2'", skips=((6, 5), (6, 4)))
refuse("'skip2'", skips=(None, (6, 5)))
refuse("'bias'", bias=(4, 4))
refuse("'bias'", bias=(1, 5))
refuse("'bias'", bias=bf16(4, 5))
refuse("'bias'", rows=(3, 9, 5), bias=(4, 5), mode=3)
refuse("'expert_for_source_row'", experts=None)
refuse("'expert_for_source_row'", experts=(6, 1))
refuse("'expert_for_source_row'", experts=chosen(6, 2, 4).long())
refuse("'scales'", scales=f32(6, 2).double())
refuse("'expert_for_source_row'", rows=(12, 5), skips=(None, None), bias=None, scales=None)
refuse("'expanded_src_to_dst_row'", index=places(12, dropped=(3,)))  # -1 is for modes 1 and 3
refuse("'expanded_src_to_dst_row'", rows=(3, 9, 5), bias=None, index=places(12) - 2, mode=3)
refuse("'expert_for_source_row'", experts=chosen(6, 2, 4) + 4)
other_scales = (f32(12, 5), None, None, None, bf16(6, 2), places(12), None, 0)
if A5:
    check(
        "moe_finalize_routing, other scales",
        call_finalize,
        finalize,
        STEPS,
        [other_scales, *cases],
        faults,
        1e-5,
    )
else:
    refuse("'scales'", scales=bf16(6, 2))
