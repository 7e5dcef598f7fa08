"""Manifold-constrained hyper-connections (spec/v4.md 2.2 to 2.4)."""
