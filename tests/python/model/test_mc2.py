"""When rows of tokens travel by MC2: the documents' limits, and the buffer by hand."""

import pytest
import torch

from dsv4_ascend.model.mc2 import Mc2
from dsv4_backend.errors import EnvironmentFault

FLASH = {"d": 4096, "choices": 6, "experts": 256}


def takes(rows, d, choices, experts, size=8, dtype=torch.bfloat16):
    mc2 = Mc2("name", 0, size)
    mc2.rows = rows
    return mc2.takes(torch.empty(1, d, dtype=dtype), choices, experts)


# Flash on 8 devices: 2 * rows * (256 * 8704 + 6 * 8192) bytes, 4554752 a row; 200 MB hold 46 rows.
@pytest.mark.parametrize(("rows", "buffer", "answer"), [
    (46, "", True), (47, "", False), (47, "400", True), (92, "400", True), (93, "400", False),
    (512, "4096", True), (513, "4096", False), (0, "", False),
])  # fmt: skip
def test_the_buffer_holds_the_rows(rows, buffer, answer, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", buffer)
    assert takes(rows, **FLASH) is answer


@pytest.mark.parametrize("change", [
    {"dtype": torch.float32}, {"d": 256}, {"d": 8224}, {"choices": 17},
    {"experts": 1032},
])  # fmt: skip
def test_what_the_documents_exclude_travels_otherwise(change, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "4096")
    assert takes(1, **FLASH)
    assert not takes(1, **(FLASH | change))


def test_a_buffer_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1G")
    with pytest.raises(
        EnvironmentFault, match="HCCL_BUFFSIZE: found '1G', expected a number of MB"
    ):
        takes(1, **FLASH)
