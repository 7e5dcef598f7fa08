"""Messages to prompt text and token ids, and completions back to messages (spec/v4.md 9)."""
