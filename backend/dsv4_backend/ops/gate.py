"""Expert routing by score and by token hash (spec/v4.md 5.1)."""
