"""The V4 network: configuration, checkpoint formats, paged caches, layers, generation."""
