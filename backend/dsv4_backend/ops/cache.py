"""Paged cache writes in every row format of spec/v4.md 6.5."""
