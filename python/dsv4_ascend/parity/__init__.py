"""Parity: every implementation of every operator against its contract,
and the contract's cases against its faults.
"""

import dsv4_backend  # noqa: F401  (first: decides how torch itself is imported)
