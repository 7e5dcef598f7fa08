"""Lightning indexer scores and top-k selection (spec/v4.md 4.5)."""
