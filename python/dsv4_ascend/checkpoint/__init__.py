"""Checkpoint folders: configuration, layout, names, safetensors, shards.
The part that knows files (spec/v4.md 7).
"""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
