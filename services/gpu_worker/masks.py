"""Grammar masks on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


class MaskBuffers:
    """Masks are filled on the host, and copied beside the forward pass, on a stream of its own.

    The buffers are used again in each step. Before masks are filled, the tokens of the step before
    must be known: only then nothing reads these any more.

    Attributes:
        host: int32 [rows, words], pinned where the device is CUDA.
    """

    def __init__(self, rows: int, words: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.host = torch.zeros((rows, words), dtype=torch.int32, pin_memory=cuda)
        self._device = torch.empty_like(self.host, device=device) if cuda else self.host
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def upload(self, rows: int) -> Tensor:
        """The first `rows` masks on the device."""
        masks = self._device[:rows]
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                masks.copy_(self.host[:rows], non_blocking=True)
            torch.cuda.current_stream(masks.device).wait_stream(self._stream)
        return masks
