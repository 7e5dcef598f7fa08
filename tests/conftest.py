"""Every test starts from a seed of its own (seeds.py); those marked `long` run with --long."""

import sys

import pytest
from seeds import seed_of


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="the long tier as well")
    parser.addoption("--soak", type=float, default=20, help="seconds that a server is loaded")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs with --long alone")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="the long tier: --long"))


@pytest.fixture(autouse=True)
def _seed_of_its_own(request):
    torch = sys.modules.get("torch")  # only some tests use it, and it takes seconds to import
    if torch is not None:
        torch.manual_seed(seed_of(request.node.nodeid))
