"""Clamped SwiGLU, expert dispatch and combination (spec/v4.md 5.2, 5.3)."""
