"""Random numbers of a test follow from its id: no test owes its success to a lucky constant,
and each can be repeated.

`conftest.py` seeds torch with `seed_of(id)` before every test. What several tests share is seeded
by its own name.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dsv4_backend.contract import Draw


def seed_of(name: str) -> int:
    """The seed of a test's id, or of a module or of a fixture that several tests share."""
    return zlib.crc32(name.encode())


def generator(stream: int = 0) -> torch.Generator:
    """A numbered source of the running test: the same numbers whenever it is asked for."""
    import torch

    return torch.Generator().manual_seed(torch.initial_seed() + stream)


def draw(stream: int = 0) -> Draw:
    """`generator` as a source of tensors for cases."""
    import torch

    from dsv4_backend.contract import Draw

    return Draw(torch.initial_seed() + stream)
