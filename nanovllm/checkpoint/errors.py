"""What a checkpoint at fault raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be served; the message says why in one line."""
