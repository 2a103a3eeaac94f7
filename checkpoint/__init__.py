"""Checkpoints: our own in Orbax, and public models' forms."""
