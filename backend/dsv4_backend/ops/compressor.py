"""The KV compressor with its paged, position-addressed state (spec/v4.md 4.3)."""
