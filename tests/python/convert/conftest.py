import pytest
from conversions import converted, write_source

from dsv4_ascend.convert.targets import TARGETS
from dsv4_ascend.tiny.release import SHIPPED


@pytest.fixture(scope="package")
def folders(tmp_path_factory):
    """The shipped small model in every target; not to be written to."""
    base = tmp_path_factory.mktemp("shipped")
    return {target: converted(SHIPPED, base / target, target) for target in TARGETS}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "official")
