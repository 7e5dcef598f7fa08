"""Partial interleaved rotary embedding and its frequency tables (spec/v4.md 3.2, 3.3)."""
