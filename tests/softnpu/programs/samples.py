"""Sample inputs of torch's own operator database (OpInfo) on npu and on the CPU: results,
arguments, gradients.

Usage: samples.py DTYPE SHARE SHARES [NAME...]: the SHARE-th of every SHARES operators, or those
named. The first sample of each operator is also called on inference tensors.
"""

import os
import random
import sys
import warnings
from itertools import islice

import numpy as np
import samples_known
import torch
import torch_npu  # noqa: F401
from seeds import seed
from torch.testing._internal import common_methods_invocations as database
from torch.utils._pytree import tree_leaves, tree_map

# Random operators would set one seed for all calls: which ones are random shows when two
# seeds differ.
database.wrapper_set_seed = lambda operator, *arguments, **keywords: operator(
    *arguments, **keywords
)
torch.set_num_threads(1)
warnings.simplefilter("ignore")
SAMPLES = 8  # of each operator
DTYPE, SHARE, SHARES = getattr(torch, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
CHIP = "A5" if os.environ.get("SOFTNPU_SOC", "").startswith("Ascend950") else "A2, A3"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-6, torch.complex128: 1e-6}
"""Of the value and absolute;
2e-5 for fp32, 0 for integers: torch_npu composes some operators in another way.
"""


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def on(device, tree):
    """A copy with the same strides; what says "cpu" says `device`."""

    def move(x):
        if not isinstance(x, torch.Tensor):
            return device if x == "cpu" or isinstance(x, torch.device) else x
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        y = (
            x.detach().to(device, copy=True)
            if 0 in x.stride() or x.is_conj() or x.is_neg()
            else y.copy_(x.detach())
        )
        return y.requires_grad_(x.requires_grad)

    return tree_map(move, tree)


ILL_CONDITIONED = {"pca_lowrank": 1e-3, "svd_lowrank": 1e-3}
"""Of gradients: they are divided by differences of singular values, which may be drawn small."""
REDRAWN = 24


def difference(want, got, values=True, widest=0.0):
    """None when they agree. widest: a tolerance below which values agree whatever their dtype."""
    want, got = tensors(want), tensors(got)
    if len(want) != len(got):
        return f"{len(got)} results, expected {len(want)}"
    for w, g in zip(want, got, strict=True):
        if g.shape != w.shape:
            return f"shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        if g.dtype != w.dtype:
            return f"dtype {g.dtype}, expected {w.dtype}"
        w, g = (t.detach().cpu().to_dense().resolve_conj().resolve_neg() for t in (w, g))
        limit = TOLERANCE.get(w.dtype, 2e-5 if w.is_floating_point() or w.is_complex() else 0)
        limit = max(limit, widest)
        if values and not torch.allclose(g, w, rtol=limit, atol=limit, equal_nan=True):
            return f"values {g.flatten()[:4].tolist()}, expected {w.flatten()[:4].tolist()}"
    return None


def call(operator, sample, device, numbers):
    """numbers: the seed of what the operator itself draws."""
    torch.manual_seed(numbers)
    inputs = on(device, sample)
    return inputs, operator(inputs[0], *inputs[1], **inputs[2])


def gradients(inputs, result):
    outputs = [t for t in tensors(result) if t.requires_grad]
    weights = [
        torch.linspace(-1, 1, t.numel()).reshape(t.shape).to(t.device, t.dtype) for t in outputs
    ]
    leaves = [t for t in tensors(inputs) if t.requires_grad]
    return torch.autograd.grad(outputs, leaves, weights, allow_unused=True) if outputs else []


def drawn(name, info, differentiable):
    """The first samples of an operator, all of them before any is called,
    which draw from numbers of their own.
    """
    start = seed(f"{name} {sys.argv[1]}")
    torch.manual_seed(start)
    random.seed(start)
    np.random.seed(start)
    found = info.sample_inputs("cpu", DTYPE, requires_grad=differentiable)
    return [(s.input, s.args, s.kwargs) for s in islice(found, SAMPLES)]


def problem_of(name, operator, sample, differentiable, inference):
    """None when the sample agrees or is none on the CPU either."""
    found = calls_differ(name, operator, sample, differentiable)
    if found or not inference:
        return found
    with torch.inference_mode():
        return (
            found := calls_differ(name, operator, sample, False)
        ) and f"under inference mode: {found}"


def is_random(name, operator, sample, want, times):
    """Whether the CPU gives something else when other numbers are drawn, `times` of them."""
    if "empty" in name or "resize" in name:
        return True
    others = (seed(f"{name} called again {n}") for n in range(times))
    return any(difference(want, call(operator, sample, "cpu", other)[1]) for other in others)


def calls_differ(name, operator, sample, differentiable):
    numbers = seed(f"{name} called")
    try:
        inputs, want = call(operator, sample, "cpu", numbers)
        random = is_random(name, operator, sample, want, 1)
        slopes = gradients(inputs, want) if differentiable and not random else []
    except Exception:
        return None
    try:
        moved, got = call(operator, sample, "npu:0", numbers)
        found = difference(want, got, values=not random)
        if found and not random and is_random(name, operator, sample, want, REDRAWN):
            random, found = True, difference(want, got, values=False)  # few values: drawn twice
        if found or random:
            return found
        fixed = [
            (a, b)
            for a, b in zip(tensors(inputs), tensors(moved), strict=True)
            if not a.requires_grad
        ]
        if found := difference([a for a, _ in fixed], [b for _, b in fixed]):
            return f"argument: {found}"
        if slopes and (
            found := difference(
                slopes, gradients(moved, got), widest=ILL_CONDITIONED.get(name, 0.0)
            )
        ):
            return f"gradient: {found}"
    except Exception as error:
        return str(error).replace("\n", " ")
    return None


counts, surprises, good_again = {"operators": 0, "samples": 0, "known": 0}, [], []
for place, info in enumerate(database.op_db):
    name = f"{info.name}/{info.variant_test_name}".rstrip("/")
    if (name not in sys.argv[4:]) if sys.argv[4:] else (place % SHARES != SHARE):
        continue
    if not info.supports_dtype(DTYPE, "cpu"):
        continue
    differentiable = info.supports_autograd and DTYPE.is_floating_point
    known = samples_known.rows(name, sys.argv[1], CHIP)
    counts["operators"] += 1
    met = set()
    for nth, sample in enumerate(drawn(name, info, differentiable)):
        if any(t.layout != torch.strided for t in tensors(sample)):
            continue
        counts["samples"] += 1
        problem = problem_of(name, info.op, sample, differentiable, inference=nth == 0)
        excuse = next((row for row in known if problem and row.text in problem), None)
        if excuse:
            met.add(excuse)
            counts["known"] += 1
        elif problem:
            surprises.append(f"{name}: {problem[:400]}")
    good_again += [f"{name}: {row.reason}" for row in known if row not in met]
for line in surprises:
    print("PROBLEM", line)
for line in good_again:
    print("NO LONGER AN EXCEPTION", line)
print(
    "samples:",
    ", ".join(f"{count} {what}" for what, count in counts.items()),
    f"{len(surprises)} problems",
)
sys.exit(bool(surprises or good_again))
