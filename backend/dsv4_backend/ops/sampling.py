"""Token sampling (spec/v4.md 8.2)."""
