"""Texts of `dsv4-ascend ops new`: a contract and a proof that fail until they are filled in."""

CONTRACT = '''"""WHAT THIS FAMILY COMPUTES, in one line (spec/v4.md SECTION)."""

from __future__ import annotations

import torch

from dsv4_backend.contract import Tolerance, operator


@operator(
    {schema},
    rows=(),  # of the inventory, spec/v4.md section 17
    arguments={{  # a line for each tensor and each number: dsv4_backend/argspec.py
{lines}
    }},
    tolerance=Tolerance(reason="every bit must agree: WHY, or which limits and why"),
)
def {name}(
{parameters}
) -> {result}:
    """`RESULT = FORMULA`.

{meanings}
    Returns shape, dtype; where it rounds, how ties are broken, what T = 0, NaN and infinity give.
    Source: spec/v4.md SECTION.
    """
    raise NotImplementedError("{name}: write the reference, in torch, from the specification")
'''

PROOF = '''"""Proof of {name} (spec/v4.md SECTION): cases, oracle, named faults."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4_backend.contract import Case, Draw
from dsv4_backend.ops.{family} import {name}
from dsv4_backend.proofs.numerics import Array

_DTYPES = {{"ideal": torch.float32, "official": torch.bfloat16}}
_SHAPES = ((0, 8), (1, 1), (3, 7), (5, 4096))
"""(tokens, channels): none, one, odd sizes, and those of the released models."""


@{name}.oracle
def _(
{arrays}
) -> {array}:
    """A second formula, in NumPy; fp32 comes as float64, bf16 as ml_dtypes' type."""
    raise NotImplementedError("{name}: write the oracle without a look at the reference")


@{name}.cases
def _(draw: Draw) -> Iterator[Case]:
    """To add: strided tensors; NaN, infinity and zeros; values that a rounding point decides."""
    for profile, dtype in _DTYPES.items():
        for tokens, d in _SHAPES:
            arguments = (
{values}
            )
            yield Case(f"{{tokens}}x{{d}}", profile, arguments)


# Every output has its own faults already: dsv4_backend/faults.py,
# where the other kinds of faults are too.
{name}.wrong_arguments(
    {{
        "WHAT SOMEBODY COULD GET WRONG: at least four such, eight faults in all": {{
            "{first}": torch.zeros_like,
        }},
    }}
)
'''

NEXT = """
Next, as docs/adding-an-operator.md shows for markov_bias:
  1. ops/{family}.py: what is in CAPITALS, the docstring, argument lines, tolerance, reference
  2. proofs/{family}.py: oracle, cases, at least 8 faults
  3. dsv4-ascend parity -k {name}/ --faults
  4. python -m pytest tests/backend -k {name}
  5. dsv4-ascend ops --docs docs/operators"""
