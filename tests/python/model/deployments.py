"""What the tests of the deployments' profiles share; their models are fixtures of conftest.py."""

import pytest

DEPLOYED = ("a2a3-int8", "a5-mx")
both = pytest.mark.parametrize("name", DEPLOYED)
