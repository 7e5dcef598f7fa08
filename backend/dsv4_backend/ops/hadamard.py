"""Hadamard rotation of indexer queries and keys (spec/v4.md 4.5)."""
