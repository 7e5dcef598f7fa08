"""Engines that run DeepSeek V4 with our operators: each a thin adapter that works alone."""
