"""The rows whose requests ask for logits processors: penalties, bias, tokens ruled out.

Few rows of few requests ask for any, and a captured step has no room for them. So their tokens are
drawn again, after the step. Log-probabilities are of the raw logits, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.kernels.logits.processors import (
    IN_PROMPT,
    MOST_COUNTED,
    NO_COLUMN,
    NO_TOKEN,
    ProcessorState,
    choose_process,
)
from nanovllm.messages import Admission, unpack
from nanovllm.protocol import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIAS
from nanovllm.services.gpu_worker.model.parallel import VocabShard
from nanovllm.services.gpu_worker.slot_state import to_device
from nanovllm.token_sets import num_words, token_set


class LogitsProcessors:
    """What the processors keep of each slot, on the device: rebuilt from a sequence's tokens when
    the sequence takes a slot, and advanced by each token that is sampled.

    Args:
        num_slots: slots, the padding slot included.
        vocab_size: token ids of all ranks.
        shard_size: how many of them this rank has logits of, from `shard.first` on.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        shard: VocabShard,
        shard_size: int,
        device: torch.device,
    ) -> None:
        def zeros(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.zeros((num_slots, *more), dtype=dtype, device=device)

        self._device = device
        self._first = shard.first
        self._shard_size = shard_size
        self._process = choose_process(device)
        self._words_of_sets = num_words(vocab_size)
        # Of the slots that have a grammar: the sets that the grammar's masks are cut down to.
        self._static: dict[int, NDArray[np.int32]] = {}
        self._held = ProcessorState(
            repetition=zeros(torch.float32),
            frequency=zeros(torch.float32),
            presence=zeros(torch.float32),
            min_length=zeros(torch.int64),
            seen=zeros(torch.int16, shard_size),
            allowed=zeros(torch.int32, self._words_of_sets),
            held_off=zeros(torch.int32, self._words_of_sets),
            bias_columns=zeros(torch.int32, MAX_LOGIT_BIAS).fill_(NO_COLUMN),
            bias=zeros(torch.float32, MAX_LOGIT_BIAS),
            beginnings=zeros(torch.int32, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS - 1),
            lasts=zeros(torch.int32, MAX_BAD_WORDS).fill_(NO_COLUMN),
            tail=zeros(torch.int32, MAX_BAD_WORD_TOKENS - 1),
        )

    @property
    def bytes(self) -> int:
        """How much memory the state takes."""
        return sum(tensor.nbytes for tensor in self._held)

    def admit(self, admissions: Iterable[Admission]) -> None:
        """Fills the slots of sequences that ask for processors."""
        for admission in admissions:
            self._admit(admission)

    def cut_down(self, slots: NDArray[np.int32], masks: NDArray[np.int32]) -> None:
        """Takes from the grammars' masks what the requests rule out themselves. On the host.

        Args:
            slots: int32 [n].
            masks: int32 [n, words].
        """
        for mask, slot in zip(masks, slots.tolist(), strict=True):
            if slot in self._static:
                mask &= self._static[slot]

    def restrict(self, slots: Tensor, masks: Tensor) -> None:
        """Sets what the grammars of some slots allow next.

        Args:
            slots: int64 [n].
            masks: int32 [n, words], sets as `ProcessorState` has them, cut down.
        """
        self._held.allowed[slots] = masks

    def process(self, logits: Tensor, rows: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows of logits after the processors, see `processors.process`: float32 [n, shard].

        Args:
            logits: [m, shard].
            rows: int64 [n].
            slots: int64 [n], of sequences that ask for processors.
            positions: int64 [n], the index in its sequence that the sampled token will have.
        """
        return self._process(logits, rows, self._held, slots, positions, self._first)

    def advance(self, slots: Tensor, token_ids: Tensor) -> None:
        """Each slot of int64 [n] has got a token of int64 [n]; one, also if both occur again."""
        columns = token_ids - self._first
        inside = (columns >= 0) & (columns < self._shard_size)
        columns = columns.clamp(0, self._shard_size - 1)
        held = self._held
        seen = held.seen[slots, columns]
        more = inside & ((seen & MOST_COUNTED) < MOST_COUNTED)
        held.seen[slots, columns] = seen + more
        held.tail[slots] = torch.cat((held.tail[slots, 1:], token_ids[:, None].int()), dim=-1)

    def _admit(self, admission: Admission) -> None:
        slot, sampling, held = admission.slot, admission.sampling, self._held
        tokens = unpack(admission.tokens)
        held.repetition[slot] = sampling.repetition_penalty
        held.frequency[slot] = sampling.frequency_penalty
        held.presence[slot] = sampling.presence_penalty
        held.min_length[slot] = admission.prompt_tokens + sampling.min_tokens
        held.seen[slot].zero_()
        self._count(slot, tokens[: admission.prompt_tokens], tokens[admission.prompt_tokens :])
        words = [word for word in sampling.bad_words if not isinstance(word, str)]
        single = [word[0] for word in words if len(word) == 1]
        allowed = sampling.allowed_token_ids
        static = token_set(allowed, self._words_of_sets, single)
        held.allowed[slot] = self._on_device(static)
        self._static.pop(slot, None)
        if admission.matcher is not None and (single or allowed is not None):
            self._static[slot] = static
        held_off = token_set(sampling.stop_token_ids, self._words_of_sets)
        held.held_off[slot] = self._on_device(held_off)
        self._set_bias(slot, sampling.logit_bias)
        self._set_words(slot, [word for word in words if len(word) > 1])
        tail = np.full(MAX_BAD_WORD_TOKENS - 1, NO_TOKEN, dtype=np.int32)
        last = tokens[-len(tail) :]
        tail[len(tail) - len(last) :] = last
        held.tail[slot] = self._on_device(tail)

    def _count(self, slot: int, prompt: NDArray[np.int32], output: NDArray[np.int32]) -> None:
        ids, counts = np.unique(output, return_counts=True)
        seen = np.zeros(self._shard_size, dtype=np.int16)
        inside, columns = self._columns(ids)
        seen[columns] = np.minimum(counts[inside], MOST_COUNTED)
        seen[self._columns(prompt)[1]] |= np.int16(IN_PROMPT)
        used = seen.nonzero()[0]
        self._held.seen[slot, self._on_device(used)] = self._on_device(seen[used])

    def _set_bias(self, slot: int, bias: dict[int, float]) -> None:
        columns = np.full(MAX_LOGIT_BIAS, NO_COLUMN, dtype=np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, dtype=np.float32)
        inside, own = self._columns(np.fromiter(bias.keys(), dtype=np.int64))
        columns[: len(own)] = own
        values[: len(own)] = np.fromiter(bias.values(), dtype=np.float32)[inside]
        self._held.bias_columns[slot] = self._on_device(columns)
        self._held.bias[slot] = self._on_device(values)

    def _set_words(self, slot: int, words: Sequence[Sequence[int]]) -> None:
        beginnings = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS - 1), NO_TOKEN, dtype=np.int32)
        lasts = np.full(MAX_BAD_WORDS, NO_COLUMN, dtype=np.int32)
        for i, word in enumerate(words):
            beginnings[i, 1 - len(word) :] = word[:-1]
        inside, columns = self._columns(np.array([word[-1] for word in words], dtype=np.int64))
        lasts[: len(words)][inside] = columns
        self._held.beginnings[slot] = self._on_device(beginnings)
        self._held.lasts[slot] = self._on_device(lasts)

    def _columns(self, token_ids: NDArray[Any]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Which of the token ids are in this shard, and the columns of those."""
        columns = token_ids - self._first
        inside = (columns >= 0) & (columns < self._shard_size)
        return inside, columns[inside]

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return to_device(array, self._device)
