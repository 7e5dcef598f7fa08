"""Device-dispatch layer of dsv4-ascend: every DeepSeek V4 operator as a contract, dispatched to the best implementation.

Importing defines `torch.ops.dsv4.*` and touches no device.
"""

from dsv4_backend import _torch  # noqa: F401  (first: decides how torch itself is imported)
from dsv4_backend import contract, dispatch, errors, ops, support
from dsv4_backend.contract import OPERATORS

for _contract in OPERATORS.values():
    dispatch.register(_contract)

__all__ = ["OPERATORS", "contract", "dispatch", "errors", "ops", "support"]
