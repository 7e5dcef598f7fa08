"""Checkpoint folders for the chips: converting them, and what they hold (docs/converting.md)."""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
