"""Random operator calls on npu and on the CPU: shapes, dtypes and values must agree.
Usage: differential.py CALLS.

Every second call is made on inference tensors, under torch.inference_mode(), by which a kernel may
not be surprised.
"""

import sys

import torch
from differential_calls import MAKERS
from differential_data import Pair, rng

calls = int(sys.argv[1])
torch.set_num_threads(1)


def results(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
seen, differing, refused = set(), [], []


def agree(g, w):
    limit = TOLERANCE.get(w.dtype, 1e-5)
    if g.shape != w.shape or g.dtype != w.dtype or g.is_inference() != w.is_inference():
        return False
    return torch.allclose(g.cpu().double(), w.double(), rtol=limit, atol=limit, equal_nan=True)


def compare():
    """One more call, unless it was made before or the CPU does not make it either."""
    torch.manual_seed(rng.randrange(1 << 30))
    maker = rng.choice(MAKERS)
    function, arguments, keywords = maker()
    try:
        want = results(
            function(*[a.cpu if isinstance(a, Pair) else a for a in arguments], **keywords)
        )
    except (RuntimeError, IndexError, TypeError, ValueError):
        return
    key = (
        maker.__name__,
        getattr(function, "__name__", ""),
        getattr(getattr(function, "__code__", None), "co_firstlineno", 0),
        str(keywords),
        tuple(
            (a.dtype, tuple(a.cpu.shape), a.cpu.stride(), a.cpu.storage_offset())
            if isinstance(a, Pair)
            else a
            for a in arguments
        ),
        len(want),
        tuple(want[0].shape),
    )
    if key in seen:
        return
    seen.add(key)
    try:
        got = results(
            function(*[a.npu if isinstance(a, Pair) else a for a in arguments], **keywords)
        )
        differing.extend(
            (key, g.cpu(), w) for g, w in zip(got, want, strict=True) if not agree(g, w)
        )
    except RuntimeError as error:
        refused.append((key, str(error).splitlines()[0]))


while len(seen) < calls:
    with torch.inference_mode(len(seen) % 2 == 0):
        compare()
for key, got, want in differing[:10]:
    print(
        "DIFFERENT",
        key,
        got.dtype,
        tuple(got.shape),
        want.dtype,
        tuple(want.shape),
        got.flatten()[:6],
        want.flatten()[:6],
    )
for key, error in refused[:10]:
    print("REFUSED", key, error[:300])
print(f"differential: {len(seen)} distinct calls, {len(differing)} differ, {len(refused)} refused")
sys.exit(bool(differing or refused))
