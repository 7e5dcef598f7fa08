"""FP8 and FP4 quantisation, real and simulated (spec/v4.md 6.1, 6.2)."""
