"""Sparse shared-KV attention with sink, and the grouped output projection (spec/v4.md 4.6, 4.7)."""
