"""Token embedding into residual streams, and the LM head (spec/v4.md 2.1)."""
