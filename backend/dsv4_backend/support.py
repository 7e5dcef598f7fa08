"""Probes of the machine and answers to "does this run here, and if not, why?"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """A yes or no with its reason."""

    native: bool
    reason: str

    def __bool__(self) -> bool:
        return self.native
