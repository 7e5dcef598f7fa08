"""Every test starts from a seed of its own; see seeds.py."""

import sys

import pytest
from seeds import seed_of


@pytest.fixture(autouse=True)
def _seed_of_its_own(request):
    torch = sys.modules.get("torch")  # only some tests use it, and it takes seconds to import
    if torch is not None:
        torch.manual_seed(seed_of(request.node.nodeid))
