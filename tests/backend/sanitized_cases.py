"""Runs contract cases on every kernel and instruction set: a program for test_sanitized_kernels."""

import sys

import torch

from dsv4_ascend.parity.runner import samples
from dsv4_backend import _C, OPERATORS, dispatch


def exact(tensor):
    """The same values in memory of exactly their size, strides kept where they are dense."""
    return tensor.clone() if isinstance(tensor, torch.Tensor) else tensor


def main(*names):
    kernels = {name for name, device in dispatch.native_kernels() if device == "cpu"}
    for isa in _C.available_isas():
        _C.set_isa(isa)
        for name in sorted(kernels):
            if not names or name in names:
                for sample in samples(OPERATORS[name]):
                    with dispatch.use("auto"):
                        OPERATORS[name](*map(exact, sample.case.arguments))
        print(f"{len(kernels)} operators in {isa}")


main(*sys.argv[1:])
