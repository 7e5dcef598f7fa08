"""Block-scaled FP8 and FP4 matrix products, dense and grouped by expert (spec/v4.md 6.3)."""
