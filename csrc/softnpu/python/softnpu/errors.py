"""What goes wrong on purpose: one family, each message with what was found and what to do."""

from __future__ import annotations


class SoftnpuError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(SoftnpuError, ValueError):
    """An option has a value that the device refuses."""


class EnvironmentFault(SoftnpuError, RuntimeError):
    """The libraries, the device or the command is missing, or cannot do what was asked for now."""
