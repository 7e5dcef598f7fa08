"""Fused operators against formulas written from their documents in NumPy,
with named faults that the cases must catch.

A formula is made of steps. A fault replaces some of them, or spoils a result: the device's result
must be closer to the right one than the tolerance, and every faulty one farther away. Prints one
line for each operator.
"""

import os
import sys
from types import SimpleNamespace

import numpy as np
import torch
from seeds import seed

A5 = os.environ.get("SOFTNPU_SOC", "").startswith("Ascend950")
CANN = tuple(int(part) for part in os.environ.get("SOFTNPU_CANN", "9.1.0").split(".")[:2])
rng = np.random.default_rng(seed("fused"))
problems = []


def reseed(module):
    """The cases of a module do not depend on which modules drew numbers before."""
    rng.bit_generator.state = np.random.default_rng(seed(module)).bit_generator.state


def array(x):
    return x.detach().cpu().double().numpy() if x.is_floating_point() else x.detach().cpu().numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def f32(*shape, scale=1.0):
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=torch.float32)


def bf16(*shape):
    return f32(*shape).bfloat16()


OUTPUT_FAULTS = {
    "one zero value": lambda y: np.where(
        np.arange(y.size).reshape(y.shape) == np.abs(y).argmax(), 0, y
    ),
    "stale last row": lambda y: np.concatenate([y[:-1], np.zeros_like(y[:1])]),
    "rows shifted": lambda y: np.roll(y, 1, 0),
    "columns shifted": lambda y: np.roll(y, 1, -1),
    "scaled by 1.1": lambda y: y * 1.1,
    "a NaN": lambda y: np.where(np.arange(y.size).reshape(y.shape) == 0, np.nan, y.astype(float)),
}


class Steps(SimpleNamespace):
    """What a formula does, by name: functions, or numbers in it."""

    def but(self, **replaced):
        unknown = replaced.keys() - vars(self).keys()
        assert not unknown, f"no such steps: {sorted(unknown)}"
        return Steps(**vars(self) | replaced)


def same(x, *_):
    """The step left out."""
    return x


def distance(got, want):
    if got.shape != want.shape:
        return np.inf
    d = np.abs(got.astype(float) - want) / (1 + np.abs(want))
    return np.inf if np.isnan(d).any() else (d.max() if d.size else 0.0)


def check(name, call, formula, steps, cases, faults, tolerance):
    """`formula(case, steps)` gives the list of outputs;
    `faults`: for each name the steps that it replaces.
    """
    results = []
    for place, case in enumerate(cases):
        with torch.inference_mode(place % 2 == 1):  # a mode that no kernel may notice
            outputs = call(*[a.npu() if isinstance(a, torch.Tensor) else a for a in case])
            results.append([array(o) for o in outputs])
    torch.npu.synchronize()  # the fault of a kernel whose results are empty

    def distances(steps):
        for case, got in zip(cases, results, strict=True):
            yield from (distance(g, w) for g, w in zip(got, formula(case, steps), strict=True))

    worst = max(distances(steps))
    if not worst <= tolerance:
        problems.append(f"{name}: differs by {worst:.3g}, tolerance {tolerance}")
    alive = [
        fault
        for fault, replaced in faults.items()
        if all(d <= tolerance for d in distances(steps.but(**replaced)))
    ]
    wanted = [w for case in cases for w in formula(case, steps) if w.ndim and w.size]
    alive += [
        fault
        for fault, spoil in OUTPUT_FAULTS.items()
        if not any(distance(spoil(w), w) > tolerance for w in wanted)
    ]
    if alive:
        problems.append(f"{name}: faults not caught: {alive}")
    print(
        f"{name}: {len(cases)} cases, worst {worst:.2g}, {len(faults) + len(OUTPUT_FAULTS)} faults"
    )


def refused(name, call, argument, code=None):
    """The device must refuse this call, naming the argument,
    and with this code when one is given.
    """
    try:
        call()
        torch.npu.synchronize()
    except RuntimeError as error:
        if argument not in str(error):
            problems.append(f"{name}: refused without naming {argument}: {error}")
        if code and f"error code is {code}" not in str(error):
            problems.append(f"{name}: bad {argument} refused without code {code}: {error}")
        return
    problems.append(f"{name}: bad {argument} was accepted")


def finish(title):
    """Prints what went wrong and ends the program; code 1 if anything did."""
    for problem in problems:
        print("PROBLEM", problem)
    print(f"{title}: {len(problems)} problems")
    sys.exit(bool(problems))
