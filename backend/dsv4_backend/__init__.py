"""Device-dispatch layer of dsv4-ascend: every DeepSeek V4 operator as a contract and its dispatch.

Importing defines `torch.ops.dsv4.*` and touches no device.
"""

from dsv4_backend import _torch  # noqa: F401  (first: decides how torch itself is imported)

try:
    from dsv4_backend import _C
except ImportError as error:
    from torch import __version__

    advice = (
        f"it is built for one Python and one torch, found torch {__version__}: "
        "pip install --force-reinstall --no-cache-dir --no-build-isolation --no-deps dsv4-ascend"
    )
    raise ImportError(f"dsv4_backend._C does not load: {error}; {advice}") from error

try:
    _C.isa()
except ValueError as error:
    raise ImportError(f"DSV4_ISA in the environment: {error}") from error

try:
    from dsv4_backend import contract, dispatch, errors, ops, support
    from dsv4_backend.contract import OPERATORS

    for _contract in OPERATORS.values():
        dispatch.register(_contract)
except (TypeError, AttributeError) as error:
    # pybind11's words for a signature, and Python's for a name, that this _C does not have.
    if not any(words in str(error) for words in ("incompatible ", "'dsv4_backend._C'")):
        raise
    raise ImportError(
        f"dsv4_backend._C is stale: {_C.__file__} was built from other sources than this package; "
        "in a checkout build it again: ./ci/setup, or pip install --no-build-isolation -e ."
    ) from error

__all__ = ["OPERATORS", "contract", "dispatch", "errors", "ops", "support"]
