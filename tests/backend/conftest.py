"""What tests of CPU kernels share."""

import pytest

from dsv4_backend import _C, dispatch


@pytest.fixture(params=_C.available_isas())
def isa(request):
    """Every instruction set that this machine runs; what no kernel takes is an error."""
    before = _C.isa()
    _C.set_isa(request.param)
    with dispatch.use("strict"):
        yield request.param
    _C.set_isa(before)
