"""Weights as the checkpoint stores them: a class per format, which knows its product (6.3)."""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
