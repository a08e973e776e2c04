"""What the kernels ask of a GPU, to be cut up for it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What a GPU has.

    Attributes:
        descriptors: what fetches tiles by tensor descriptors (since Hopper).
        shared_memory: of a processor, in bytes.
    """

    processors: int = 1
    descriptors: bool = True
    shared_memory: int = 228 << 10

    @classmethod
    def current(cls) -> Device:
        """A CPU counts as one, for Triton's interpreter."""
        if not torch.cuda.is_available():
            return cls()
        properties = torch.cuda.get_device_properties()
        return cls(
            properties.multi_processor_count,
            properties.major >= 9,
            properties.shared_memory_per_multiprocessor,
        )
