"""Random operator calls on npu and on the CPU: shapes, dtypes and values must agree. Usage: differential.py CALLS SEED."""

import sys

import torch
from differential_calls import MAKERS, Pair, rng

calls = int(sys.argv[1])
torch.set_num_threads(1)


def results(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
seen, differing, refused = set(), [], []
while len(seen) < calls:
    torch.manual_seed(rng.randrange(1 << 30))
    maker = rng.choice(MAKERS)
    function, arguments, keywords = maker()
    try:
        want = results(function(*[a.cpu if isinstance(a, Pair) else a for a in arguments], **keywords))
    except (RuntimeError, IndexError, TypeError, ValueError):
        continue  # no such call on the CPU either
    key = (
        maker.__name__,
        getattr(function, "__name__", ""),
        getattr(getattr(function, "__code__", None), "co_firstlineno", 0),
        str(keywords),
        tuple(
            (a.dtype, tuple(a.cpu.shape), a.cpu.stride(), a.cpu.storage_offset()) if isinstance(a, Pair) else a
            for a in arguments
        ),
        len(want),
        tuple(want[0].shape),
    )
    if key in seen:
        continue
    seen.add(key)
    try:
        got = results(function(*[a.npu if isinstance(a, Pair) else a for a in arguments], **keywords))
        for g, w in zip(got, want, strict=True):
            same = g.shape == w.shape and g.dtype == w.dtype
            same = same and torch.allclose(
                g.cpu().double(),
                w.double(),
                rtol=TOLERANCE.get(w.dtype, 1e-5),
                atol=TOLERANCE.get(w.dtype, 1e-5),
                equal_nan=True,
            )
            if not same:
                differing.append((key, g.cpu(), w))
    except RuntimeError as error:
        refused.append((key, str(error).splitlines()[0]))

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
