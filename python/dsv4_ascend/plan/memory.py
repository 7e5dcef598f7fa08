"""Does it fit: bytes on one device, and the requests that the rest holds (planner.md 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4_ascend.plan.formats import WeightBytes
from dsv4_ascend.plan.layout import Layout

GIB = 2**30
MIB = 2**20
FITS, TIGHT, NO = "FITS", "TIGHT", "NO"


@dataclass(frozen=True)
class Memory:
    """One device of a layout, in bytes.

    budget: what may be used of what is visible; weights, draft, comm, workspace: what is taken
    before any request; cache: of one request; per_group: requests that were asked for in a group;
    captured: how many of them captured graphs take.
    """

    visible: float
    budget: float
    weights: float
    draft: float
    comm: float
    workspace: float
    cache: int
    cache_paged: int
    groups: int
    per_group: int
    captured: int
    least_free: float

    @property
    def free(self) -> float:
        """What is left for caches."""
        return self.budget - self.weights - self.draft - self.comm - self.workspace

    @property
    def held_per_group(self) -> int:
        """Requests whose caches fit at once in a group."""
        return max(0, int(self.free // self.cache))

    @property
    def held_in_pages(self) -> int:
        """The same of all groups, when caches take whole pages."""
        return self.groups * max(0, int(self.free // self.cache_paged))

    @property
    def requests_per_group(self) -> int:
        """Requests at once in a group: by memory, and by captured graphs."""
        return min(self.held_per_group, self.captured)

    @property
    def requests(self) -> int:
        """Requests at once on all devices."""
        return self.groups * self.requests_per_group

    @property
    def head_room(self) -> float:
        """What is left with the requests that were asked for."""
        return self.free - self.per_group * self.cache

    @property
    def verdict(self) -> str:
        """NO, TIGHT (head-room below the limit) or FITS."""
        if self.head_room < 0 or self.per_group > self.captured:
            return NO
        return TIGHT if self.head_room < self.least_free else FITS

    @property
    def breaks(self) -> str:
        """The term that does not fit, in words; empty if all do."""
        used = 0.0
        terms = {
            "the weights": self.weights,
            "the draft block": self.draft,
            "communication buffers": self.comm,
            "the workspace": self.workspace,
            f"the caches of {self.per_group:,} requests a group": self.per_group * self.cache,
        }
        for name, size in terms.items():
            used += size
            if used > self.budget:
                return (
                    f"{name} ({size / 1e9:.1f} GB) exceed the budget by "
                    f"{(used - self.budget) / 1e9:.1f} GB a device"
                )
        if self.per_group > self.captured:
            return f"{self.per_group} requests a group, captured graphs take {self.captured}"
        return ""

    @property
    def least_requests(self) -> int:
        """Requests of all groups that leave the head-room; 0 if none does."""
        held = int((self.free - self.least_free) // self.cache)
        return self.groups * max(0, min(held, self.captured))


def memory_of(
    layout: Layout,
    weights: WeightBytes,
    numbers: Mapping[str, float],
    cache: tuple[int, int],
    requests: int,
) -> Memory:
    """One device of `layout` with `requests` in flight on all devices;
    cache: bytes of one request, as entries and as pages.
    """
    visible = numbers["visible_gb"] * 1e9
    return Memory(
        visible=visible,
        budget=visible * numbers["utilisation"],
        weights=weights.replicated + weights.sharded / layout.tp + weights.experts / layout.ep,
        draft=weights.draft + weights.draft_experts / layout.ep,
        comm=2 * numbers["comm_mib"] * MIB if layout.devices > 1 else 0.0,
        workspace=numbers["workspace_gib"] * GIB,
        cache=cache[0],
        cache_paged=cache[1],
        groups=layout.dp,
        per_group=-(-requests // layout.dp),
        captured=int(numbers["captured_requests"]),
        least_free=numbers["headroom_gib"] * GIB,
    )
