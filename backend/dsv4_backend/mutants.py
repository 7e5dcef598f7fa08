"""What gemm, moe, mtp and output_projection still call; outputs have their faults by themselves (see `faults`)."""

from __future__ import annotations

from dsv4_backend.contract import Operator
from dsv4_backend.faults import OUTPUT_FAULTS

NOT_ASKED = "not asked for"


def add_output_faults(contract: Operator, *names: str) -> None:
    """Leave out the output faults of `contract` that are not among `names`."""
    for name in contract.all_faults():
        if name.rpartition(": ")[2] in OUTPUT_FAULTS and name not in names:
            contract.no_output_fault(name, NOT_ASKED)
