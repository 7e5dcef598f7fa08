"""Overlaps of boxes, the anchors that answer for them, softmax of windows and attention of one
query at a time, against formulas in NumPy from their documents.
"""

import numpy as np
import torch
import torch.nn.functional as F
import torch_npu
from fused_check import A5, Steps, array, check, f32, refused, rng, same, softmax


def corners(boxes):
    x, y, w, h = boxes
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def extent(boxes):
    return boxes[2] - boxes[0], boxes[3] - boxes[1]


def intersection(a, b):
    w = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    h = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    return np.maximum(w, 0) * np.maximum(h, 0)


def hull(a, b):
    return (*np.minimum(a[:2], b[:2]), *np.maximum(a[2:], b[2:]))


def overlap(a, b, steps):
    shared = intersection(a, b)
    (w1, h1), (w2, h2) = extent(a), extent(b)
    return shared / (w1 * h1 + w2 * h2 - steps.shared(shared))


def giou(case, steps):
    a, b = (np.stack(steps.corners(array(x))) for x in case[:2])
    (w1, h1), (w2, h2), (w, h) = extent(a), extent(b), extent(hull(a, b))
    union = w1 * h1 + w2 * h2 - intersection(a, b)
    return [(overlap(a, b, steps) - steps.penalty((w * h - union) / (w * h))).reshape(2, -1)]


def parts(case, steps):
    """Centres, widths and heights, the overlaps and the distance that is taken from them."""
    p, g = (array(x) for x in case[:2])
    a, b = (np.stack(steps.corners(x)) for x in (p, g))
    w, h = extent(hull(a, b))
    return p, g, overlap(a, b, steps), ((p[:2] - g[:2]) ** 2).sum(0) / (w**2 + h**2)


def diou(case, steps):
    *_, iou, distance = parts(case, steps)
    return [(iou - steps.penalty(distance)).reshape(2, -1)]


def ciou(case, steps):
    p, g, iou, distance = parts(case, steps)
    v = steps.four / np.pi**2 * (np.arctan(g[2] / g[3]) - np.arctan(p[2] / p[3])) ** 2
    return [(iou - steps.penalty(distance) - v * v / (1 - iou + v)).reshape(2, -1)]


STEPS = Steps(corners=corners, shared=same, penalty=same, four=4)
FAULTS = {
    "corners taken as they are": dict(corners=same),
    "the shared part counts twice": dict(shared=lambda x: 0 * x),
    "no penalty": dict(penalty=lambda x: 0 * x),
}


def boxes(count):
    return torch.tensor(rng.uniform(1, 5, (4, count)), dtype=torch.float32)


def check_overlaps():
    cases = [(boxes(n), boxes(n), True, False, 0) for n in (2, 8, 32)]
    more = FAULTS | {"a third of the angle": dict(four=3)}
    check(
        "npu_ciou",
        lambda *a: [torch_npu.npu_ciou(*a).reshape(2, -1)],
        ciou,
        STEPS,
        cases,
        more,
        1e-5,
    )
    for name, formula in (("npu_diou", diou), ("npu_giou", giou)):
        if not A5:  # torch_npu sends these over the graph-operator path, which A5 has not
            call = getattr(torch_npu, name)
            check(
                name,
                lambda *a, call=call: [call(*a).reshape(2, -1)],
                formula, STEPS, cases, FAULTS, 1e-5,
            )  # fmt: skip


def check_assigned():
    """Anchors take the box that they overlap enough; then each box takes its best anchors."""
    overlaps = rng.uniform(0, 1, (3, 8)).astype(np.float32)
    overlaps[1, [2, 5]] = 0.99
    flags = np.array([1, 1, 1, 0, 1, 1, 0, 1], np.uint8)
    start = np.full(8, -1, np.float32)
    for everywhere in (True, False):
        want = start.copy()
        enough = (overlaps.max(0) > 0.6) & (flags == 1)
        want[enough] = overlaps.argmax(0)[enough] + 1
        for box, row in enumerate(overlaps):
            best = row == row.max() if everywhere else np.arange(8) == row.argmax()
            want[best & (flags == 1)] = box + 1
        found = torch_npu.npu_grid_assign_positive(
            *(torch.tensor(x).npu() for x in (start, overlaps, flags, overlaps.max(0))),
            torch.tensor(overlaps.argmax(0).astype(np.int32)).npu(),
            torch.tensor(overlaps.max(1)).npu(),
            torch.tensor(overlaps.argmax(1).astype(np.int32)).npu(),
            3, 0.6, 0.0, everywhere,
        )  # fmt: skip
        assert np.array_equal(found.cpu().numpy(), want), (everywhere, found, want)


def check_iou():
    """Widths and heights of areas grow by 0.01; IoF divides by the area of the true box."""
    a, b = (array(boxes(n)).astype(np.float16).astype(float) for n in (5, 3))
    a[2:] += a[:2]
    b[2:] += b[:2]
    shared = intersection(a[:, None, :], b[:, :, None])
    first, second = ((w + 0.01) * (h + 0.01) for w, h in (extent(a), extent(b)))
    for mode, below in ((0, first[None] + second[:, None] - shared), (1, second[:, None])):
        got = torch_npu.npu_iou(*(torch.tensor(x.T).half().npu() for x in (a, b)), mode)
        np.testing.assert_allclose(array(got), shared / below, rtol=4e-3, atol=1e-3)


def check_anchors():
    """Centres outside of the map count for its nearest place."""
    for size, strides, anchors in (([6, 5], [4, 3], 2), ([2, 9], [8, 8], 1)):
        truth = rng.uniform(0, 40, (11, 4)).astype(np.float32)
        want = np.zeros(size[0] * size[1], np.uint8)
        x = np.floor((truth[:, 0] + truth[:, 2]) * np.float32(0.5) / strides[0]).astype(int)
        y = np.floor((truth[:, 1] + truth[:, 3]) * np.float32(0.5) / strides[1]).astype(int)
        want[np.clip(y * size[1] + x, 0, want.size - 1)] = 1
        flags = torch_npu.npu_anchor_response_flags(
            torch.tensor(truth).npu(), size, strides, anchors
        )
        assert np.array_equal(flags.cpu().numpy(), np.repeat(want, anchors)), (size, strides)


def window_softmax(case, steps):
    x, mask, bias = (None if a is None else array(a) for a in case[:3])
    windows = 1 if mask is None else mask.shape[0]
    rows = x.reshape(-1, windows, *x.shape[1:]) * steps.scale
    if mask is not None:
        rows = rows + steps.mask(mask[:, None])
    return [softmax(rows + steps.bias(bias)).reshape(x.shape)]


def check_windows():
    cases = [
        (f32(6, 2, 3, 5), f32(3, 3, 5), f32(2, 3, 5), 0.5),
        (f32(4, 3, 2, 4), None, f32(3, 2, 4), 0.5),
    ]
    check(
        "npu_masked_softmax_with_rel_pos_bias",
        lambda *a: [torch_npu.npu_masked_softmax_with_rel_pos_bias(*a)],
        window_softmax,
        Steps(scale=0.5, mask=same, bias=same),
        cases,
        {
            "no scale": dict(scale=1),
            "no mask": dict(mask=lambda x: 0 * x),
            "windows exchanged": dict(mask=lambda x: x[::-1]),
            "no bias": dict(bias=lambda x: 0 * x),
            "heads exchanged": dict(bias=lambda x: x[::-1]),
        },
        1e-5,
    )
    x, _, bias, _ = cases[0]
    refused(
        "npu_masked_softmax_with_rel_pos_bias",
        lambda: torch_npu.npu_masked_softmax_with_rel_pos_bias(
            x.npu(), f32(4, 3, 5).npu(), bias.npu()
        ),
        "attenMask",
    )


def attention(case, steps):
    q, k, v, groups, lengths = *(array(a) for a in case[:3]), case[3], case[4]
    result = np.zeros(q.shape)
    for b in range(len(q)):
        seen = steps.seen(lengths[b])
        for head in range(q.shape[1]):
            keys, values = (x[b, steps.of(head, groups), :seen] for x in (k, v))
            result[b, head] = softmax(steps.scale * q[b, head] @ keys.T) @ values
    return [result]


def check_one_query():
    def call(q, k, v, groups, lengths):
        heads, keys = q.shape[1], k.shape[1]
        return [
            torch_npu.npu_incre_flash_attention(
                q, k, v, num_heads=heads, num_key_value_heads=keys, input_layout="BNSD",
                scale_value=0.25, actual_seq_lengths=lengths,
            )
        ]  # fmt: skip

    def half(*shape):
        return f32(*shape).half()

    cases = [
        (half(2, 4, 1, 16), half(2, 2, 9, 16), half(2, 2, 9, 16), 2, [9, 4]),
        (half(1, 2, 1, 32), half(1, 2, 5, 32), half(1, 2, 5, 32), 1, [5]),
    ]
    check(
        "npu_incre_flash_attention",
        call,
        attention,
        Steps(seen=same, of=lambda head, groups: head // groups, scale=0.25),
        cases,
        {
            "a key too few": dict(seen=lambda n: n - 1),
            "all keys": dict(seen=lambda n: 9),
            "heads dealt in turn": dict(of=lambda head, groups: head % (4 // groups or 1)),
            "no scale": dict(scale=1),
        },
        2e-3,
    )


def check_prompt():
    """Attention of whole prompts is torch's."""
    q, k, v = (f32(1, 4, 16, 32).half() for _ in range(3))
    got = torch_npu.npu_prompt_flash_attention(
        q.npu(), k.npu(), v.npu(), num_heads=4, input_layout="BNSD", scale_value=0.2,
        pre_tokens=65535, next_tokens=65535,
    )  # fmt: skip
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.2)
    torch.testing.assert_close(got.cpu().float(), want, rtol=2e-3, atol=2e-3)


torch.npu.set_device(0)
check_overlaps()

if not A5:
    check_one_query()
    check_prompt()
    check_iou()
    check_anchors()
    check_assigned()
    check_windows()
