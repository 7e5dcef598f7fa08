"""The V4 network: paged caches, layers, generation."""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
