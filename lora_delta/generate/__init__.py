"""Generators: token formats, reconstruction, conditions, losses, the training loop, and runs on disk."""
