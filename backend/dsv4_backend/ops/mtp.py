"""Input of the multi-token-prediction block (spec/v4.md 8.1)."""
