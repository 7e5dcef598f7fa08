"""Types of the C++ extension (csrc/bind/module.cpp)."""

from typing import Any, ClassVar

import torch

class Policy:
    """What runs an operator; see `dispatch.POLICIES`."""

    __members__: ClassVar[dict[str, Policy]]
    auto: ClassVar[Policy]
    reference: ClassVar[Policy]
    strict: ClassVar[Policy]
    @property
    def name(self) -> str: ...

class Choice:
    """What `dispatch.use` sets for a thread."""

    def __init__(
        self, policy: Policy, only: str, check_on_device: bool, check_contents: bool
    ) -> None: ...  # fmt: skip
    policy: Policy
    only: str
    check_on_device: bool
    check_contents: bool

class Context:
    """What predicates know; see `dispatch.Context`."""

    def __init__(self, isa: str, chip: str, cann: str, packages: list[str]) -> None: ...

class Term:
    """A dimension or bound; see `argspec`."""

    def __init__(self, text: str, program: list[tuple[str, int]]) -> None: ...

class TensorRule:
    """The rule of one tensor argument."""

    def __init__(
        self, name: str, text: str, position: int, optional: bool, written: bool,
        dtypes: list[torch.dtype], dtype_of: int, dtype_of_name: str, dims: list[Term],
        any_leading: bool, low: Term | None, high: Term | None,
    ) -> None: ...  # fmt: skip

class ScalarRule:
    """The rule of one number."""

    def __init__(
        self, name: str, position: int, expected: str, low: Term | None, low_open: bool,
        high: Term | None, finite: bool, fp32: bool,
    ) -> None: ...  # fmt: skip

class Piece:
    """Text of an error's words, and what is shown behind it."""

    def __init__(self, text: str, shown: str, position: int, term: Term | None) -> None: ...

class Fact:
    """A number that relations get from an argument."""

    def __init__(self, name: int, of: str, position: int, axis: int) -> None: ...

class RelationRule:
    """One relation; see `relations`."""

    def __init__(
        self, kind: str, names: list[str], positions: list[int], terms: list[Term],
        found: list[Piece], expected: list[Piece],
    ) -> None: ...  # fmt: skip

class Step:
    """What launchers share while a step runs; see `dispatch.step`."""

    def give(
        self, name: str, of: list[torch.Tensor], numbers: list[int], values: list[torch.Tensor]
    ) -> None: ...  # fmt: skip

def open_step(step: Step | None) -> Step | None: ...
def choice() -> Choice: ...
def set_choice(value: Choice) -> None: ...
def npu_functions() -> list[tuple[str, str, str, str, str]]: ...
def npu_packages() -> list[str]: ...
def define(
    schema: str, names: int, integers: list[tuple[int, int]], tensors: list[TensorRule],
    scalars: list[ScalarRule], new_tokens: int, facts: list[Fact], relations: list[RelationRule],
    shapes: Any, contents: Any,
) -> None: ...  # fmt: skip
def check(op: str, *args: Any) -> None: ...
def candidates() -> list[tuple[str, str, str, str, list[str]]]: ...
def answers(
    op: str, device: str, context: Context | None, *args: Any, **kwargs: Any
) -> list[tuple[str, str | None]]: ...
def ran() -> list[tuple[str, str, str, int]]: ...
def forget_ran() -> None: ...
def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
