"""The one error family.
A message names the operator or file, the argument, what was found and what was expected.
"""

from __future__ import annotations


class Dsv4Error(Exception):
    """Base of every error this project raises on purpose."""


class ArgumentError(Dsv4Error, ValueError):
    """An operator argument has a wrong rank, shape, dtype, device or value."""


class UnsupportedError(Dsv4Error, NotImplementedError):
    """No implementation runs these arguments on this device under the active policy."""


class ProofError(Dsv4Error, ValueError):
    """An operator lacks its oracle, its parity cases or its named faults."""


class ConfigError(Dsv4Error, ValueError):
    """A model configuration misses a field, contradicts itself or names something unknown."""


class CheckpointError(Dsv4Error, ValueError):
    """A checkpoint folder is truncated, malformed, incomplete or does not fit its configuration.

    `problems`: every finding, one line each, also those that the message cuts off.
    """

    problems: tuple[str, ...] = ()


class EnvironmentFault(Dsv4Error, RuntimeError):
    """Something outside this package is missing or broken; the message says what to do."""


class LaunchError(Dsv4Error, RuntimeError):
    """An Ascend operator refused a call that our checks had let through; nothing was launched."""


def argument_error(operator: str, argument: str, found: object, expected: object) -> ArgumentError:
    """Build the standard message ``dsv4::operator: argument 'x': found ..., expected ...``."""
    return ArgumentError(
        f"dsv4::{operator}: argument '{argument}': found {found}, expected {expected}"
    )
