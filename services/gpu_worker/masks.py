"""Grammar masks on their way to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INDICES = 3


class MaskedRows(NamedTuple):
    """The rows of a step that have a grammar, and their masks.

    Attributes:
        drawn: int64 [2, rows], of the rows drawn from masked logits: their indices, and their slots
            (see `Steps.draw_masked`).
        restricted: int64 [rows], the slots of the other rows (see `LogitsProcessors.restrict`).
        masks: int32 [rows, words], of the rows in `drawn`, then of those in `restricted`.
    """

    drawn: Tensor
    restricted: Tensor
    masks: Tensor


class MaskBuffers:
    """Masks are filled on the host, and copied beside the forward pass, on a stream of its own: in
    one copy with the rows that they belong to.

    The buffers are used again in each step. Before they are filled, the tokens of the step before
    must be known: only then nothing reads these any more.

    Attributes:
        host: pinned where the device is CUDA.
        device: what captured draws read.
    """

    def __init__(self, rows: int, words: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._before_masks = 2 * INDICES * rows
        length = self._before_masks + rows * words
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=cuda)
        self._device = torch.zeros_like(self._host, device=device) if cuda else self._host
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._words = words
        self.host = self._parts(self._host)
        self.device = self._parts(self._device)

    def upload(self, rows: int) -> None:
        """Copies the first `rows` masks, and all indices."""
        if self._stream is None:
            return
        used = self._before_masks + rows * self._words
        with torch.cuda.stream(self._stream):
            self._device[:used].copy_(self._host[:used], non_blocking=True)
        torch.cuda.current_stream(self._device.device).wait_stream(self._stream)

    def _parts(self, buffer: Tensor) -> MaskedRows:
        indices, masks = buffer[: self._before_masks], buffer[self._before_masks :]
        indices = indices.view(torch.int64).view(INDICES, -1)
        return MaskedRows(indices[:2], indices[2], masks.view(-1, self._words))
