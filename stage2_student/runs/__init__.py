"""A run on disk: its folder, checkpoints, identity, metrics."""
