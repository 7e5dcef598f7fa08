"""Every function of a decode step fails once, in either phase; then the step is done again.

Usage: decode_faults.py PROFILE. Prints each function whose failure was no error, whose error did
not name it, after which the step gave other bits, or which left something behind on the device.
"""

import gc
import sys

import torch
from production import (
    IDS,
    PROMPT,
    RATIOS,
    Run,
    config_of,
    device,
    launched,
    random_network,
    to_device,
)

from dsv4_ascend.model.profile import profile_named
from dsv4_backend import dispatch

OURS = {function.symbol for function in dispatch.npu_functions()}
PHASES = {"phase 1": "{}GetWorkspaceSize:1:561002", "phase 2": "{}:1:361001"}


class Step:
    """A decode step that can be done again."""

    def __init__(self, network):
        self.run, self.ids = Run(network, "npu"), IDS[PROMPT : PROMPT + 1]
        self.run.eager(IDS[:PROMPT])

    def logits(self):
        try:
            return self.run.eager(self.ids).cpu()
        finally:
            self.run.cache.rollback(self.run.sequence, 1)

    def error(self):
        """The words of its failure, None if there is none."""
        try:
            self.logits()
        except RuntimeError as error:
            return str(error)
        return None


def alive():
    """Descriptors and executors that exist between calls."""
    torch.npu.synchronize()
    gc.collect()
    return {name: device.alive()[name] for name in ("tensors", "scalars", "arrays", "executors")}


def failures(step, want, symbol, phase):
    """What is wrong with how one failure of one function went."""
    before = alive()
    device.inject(PHASES[phase].format(symbol))
    said = step.error()
    if said is None:
        yield "no error"
    elif symbol not in said:
        yield f"the error does not name it: {said[:200]}"
    planned = device.statistics()["planned"]
    if planned:
        yield f"never fired: {planned}"
        device.inject("")
    if symbol in OURS and alive() != before:  # torch_npu keeps descriptors of its own failures
        yield f"{before} became {alive()}"
    if not torch.equal(step.logits(), want):
        yield "other bits afterwards"


def main(name, every):
    profile = profile_named(name)
    network = to_device(random_network(config_of("least", tuple(RATIOS), profile), profile))
    with torch.inference_mode():
        step = Step(network)
        before = launched()
        want = step.logits()
        symbols = sorted(launched() - before)[:: int(every)]
        wrong = 0
        for symbol in symbols:
            for phase in PHASES:
                for words in failures(step, want, symbol, phase):
                    wrong += 1
                    print(f"{symbol}, {phase}: {words}")
    print(f"{wrong} wrong of {len(symbols)} functions in two phases")


main(*sys.argv[1:])
