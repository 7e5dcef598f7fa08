"""Which implementation runs where, why, and how to force another.

`torch.ops.dsv4.<name>` chooses per call: the native kernel of the device if it supports these arguments, else the
reference on the same device. The choice is made in C++ (csrc/bind/registry.cpp); this module is its Python face.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dsv4_backend import _C
from dsv4_backend.contract import OPERATORS, Operator
from dsv4_backend.support import Support, npu_fault

POLICIES = tuple(_C.Policy.__members__)
"""auto: native, else reference. reference: always the reference. strict: native, else UnsupportedError."""


def register(contract: Operator) -> None:
    """Define `torch.ops.dsv4.<name>` with its reference, fake kernel and autograd."""
    _C.define(contract.schema)
    _reference_library.impl(contract.name, contract.guarded_reference, "CompositeImplicitAutograd")
    torch.library.register_fake(f"dsv4::{contract.name}", contract.guarded_reference)


_reference_library = torch.library.Library("dsv4_reference", "IMPL")


@contextmanager
def use(policy: str) -> Iterator[None]:
    """Force a policy for this thread: one of `POLICIES`."""
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {', '.join(POLICIES)}")
    before = _C.policy()
    _C.set_policy(getattr(_C.Policy, policy))
    try:
        yield
    finally:
        _C.set_policy(before)


def support(name: str, *args: Any, device: str | None = None, **kwargs: Any) -> Support:
    """Would a native kernel run `torch.ops.dsv4.<name>(*args, **kwargs)`, and if not, why?

    device: "cpu" or "npu" asks for that one whatever the arguments are on; None for the first tensor's.
    """
    if name not in OPERATORS:
        raise KeyError(f"dsv4::{name} is not an operator; `dsv4-ascend ops` lists them")
    if device is None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        device = next((tensor.device.type for tensor in tensors), "cpu")
    fault = npu_fault() if device == "npu" else None
    reason = fault or _C.why_not(name, device, *args, **kwargs)
    return Support(reason is None, reason or "native kernel")


def native_kernels() -> dict[tuple[str, str], str]:
    """(operator, device type) -> kernel name, for every native kernel in this build."""
    return {(op, device): kernel for op, device, kernel in _C.kernels()}
