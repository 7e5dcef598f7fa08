"""What proofs of before still call, until each is written in the dialect of `faults`: then this module goes."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4_backend.contract import Operator
from dsv4_backend.faults import OUTPUT_FAULTS

NOT_ASKED = "not asked for"


def add_output_faults(contract: Operator, *names: str, output: int = 0) -> None:
    """Of the faults that outputs have by themselves, those named of one output; others only if asked for too."""
    known = list(contract.output_faults)
    if not contract.left_out:
        contract.left_out |= dict.fromkeys(known, NOT_ASKED)
    for name, of_output in zip(OUTPUT_FAULTS, known[output * len(OUTPUT_FAULTS) :], strict=False):
        if name in names:
            del contract.left_out[of_output]


def explain(contract: Operator, *tables: Mapping[str, str]) -> None:
    """`contract.explain`."""
    contract.explain(*tables)
