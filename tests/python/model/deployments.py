"""What the tests of the deployments' profiles share; their models are fixtures of conftest.py."""

import pytest

DEPLOYED = ("a2a3-int8", "a5-mx")
"""Profiles whose weights are quantised again while loading."""
both = pytest.mark.parametrize("name", DEPLOYED)
on_chips = pytest.mark.parametrize("name", ["bf16", *DEPLOYED])
