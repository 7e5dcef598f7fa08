"""Engines that run the model: thin, each works alone, imported by nobody."""
