"""Logits processors of sequences: against transformers' own, wherever a sequence was admitted."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from nanovllm.messages import Admission, pack
from nanovllm.protocol import Sampling
from nanovllm.services.gpu_worker.logits import LogitsProcessors
from nanovllm.services.gpu_worker.model.parallel import TensorParallel, VocabShard
from nanovllm.token_sets import num_words, token_set

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 70
SLOTS = 3
# Tokens of a prompt: transformers 5.17 overlooks a bad word that is longer than the sequence.
SHORTEST = 3
ids = st.integers(0, VOCAB - 1)
penalties = st.sampled_from([0.0, 0.0, 0.5, 1.75, -1.25])
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
    frequency_penalty=penalties,
    presence_penalty=penalties,
    logit_bias=st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 3.25, 100.0]), max_size=4),
    min_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(ids, max_size=3),
    bad_words=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4),
    allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=60),
)


def expected(logits: Tensor, sampling: Sampling, prompt: list[int], output: list[int]) -> Tensor:
    """Logits from transformers' processors, by hand for what they lack: float32 [VOCAB]."""
    sequence = torch.tensor([prompt + output])
    row: Tensor = logits[None].clone()
    after = LogitsProcessorList()
    for token, value in sampling.logit_bias.items():
        row[0, token] += value
    row = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(sequence, row)
    for token in set(output):
        row[0, token] -= sampling.frequency_penalty * output.count(token)
        row[0, token] -= sampling.presence_penalty
    words = [word for word in sampling.bad_words if not isinstance(word, str)]
    if words:
        after.append(NoBadWordsLogitsProcessor(words))
    if sampling.stop_token_ids:
        eos: Any = sampling.stop_token_ids
        after.append(MinNewTokensLengthLogitsProcessor(len(prompt), sampling.min_tokens, eos))
    row = after(sequence, row)
    if sampling.allowed_token_ids is not None:
        ruled_out = torch.ones_like(logits, dtype=torch.bool)
        ruled_out[sampling.allowed_token_ids] = False
        row.masked_fill_(ruled_out, -torch.inf)
    result: Tensor = row[0]
    return result


@given(
    samplings,
    st.lists(st.integers(0, 9), min_size=SHORTEST, max_size=8),
    st.lists(st.integers(0, 9), max_size=12),
    st.data(),
)
def test_every_row_is_processed_as_transformers_does(
    sampling: Sampling, prompt: list[int], output: list[int], data: st.DataObject
) -> None:
    """On one rank and on two; a sequence that was admitted with some of its output already."""
    had = data.draw(st.integers(0, len(output)))
    first = data.draw(st.sampled_from([VOCAB, 33]))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(output))) * 3
    slots = torch.tensor([1], device=DEVICE)
    found = []
    for start, end in ((0, first), (first, VOCAB)):
        if start == end:
            continue
        shard = VocabShard(TensorParallel(), start)
        processors = LogitsProcessors(SLOTS, VOCAB, shard, end - start, DEVICE)
        # Another sequence had the slot before.
        processors.admit([Admission(1, pack([1, 2, 3]), 1, b"", 0, Sampling(min_tokens=9))])
        tokens = pack(prompt + output[:had])
        processors.admit([Admission(1, tokens, len(prompt), b"", 0, sampling)])
        for token in output[had:]:
            processors.advance(slots, torch.tensor([token], device=DEVICE))
        row = logits[None, start:end].to(DEVICE)
        position = torch.tensor([len(prompt) + len(output)], device=DEVICE)
        processed = processors.process(row, torch.zeros_like(slots), slots, position)
        found.append(processed[0].cpu())
    np.testing.assert_allclose(
        torch.cat(found).numpy(), expected(logits, sampling, prompt, output).numpy(), rtol=1e-6
    )


@given(st.randoms(use_true_random=False), st.data())
def test_a_slot_keeps_nothing_of_its_former_sequences(
    draw: random.Random, data: st.DataObject
) -> None:
    """Sequences of all kinds take slots in any order, and some have a grammar."""
    processors = LogitsProcessors(SLOTS, VOCAB, VocabShard(TensorParallel(), 0), VOCAB, DEVICE)
    living: dict[int, tuple[Sampling, list[int], list[int], bool]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        slot = draw.randrange(SLOTS)
        if slot not in living or draw.random() < 0.4:
            sampling = data.draw(samplings)
            prompt = draw.choices(range(9), k=draw.randint(SHORTEST, 8))
            output = draw.choices(range(9), k=draw.randint(0, 4))
            matcher = draw.choice([None, 1])
            living[slot] = sampling, prompt, output, matcher is not None
            tokens = pack(prompt + output)
            processors.admit(
                [Admission(slot, tokens, len(prompt), b"", 0, sampling, matcher=matcher)]
            )
        slots = sorted(living)
        masks = {slot: draw.sample(range(VOCAB), 40) for slot in slots if living[slot][3]}
        if masks:
            words = np.stack([token_set(mask, num_words(VOCAB)) for mask in masks.values()])
            processors.cut_down(np.array([*masks], dtype=np.int32), words)
            processors.restrict(
                torch.tensor([*masks], device=DEVICE), torch.from_numpy(words).to(DEVICE)
            )
        logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(draw.randrange(99)))
        same_row = torch.zeros(len(slots), dtype=torch.int64, device=DEVICE)
        positions = [len(living[slot][1]) + len(living[slot][2]) for slot in slots]
        on_device = torch.tensor(slots, device=DEVICE)
        processed = processors.process(
            logits[None].to(DEVICE), same_row, on_device, torch.tensor(positions, device=DEVICE)
        )
        for slot, row in zip(slots, processed.cpu(), strict=True):
            sampling, prompt, output, _ = living[slot]
            wanted = expected(logits, sampling, prompt, output)
            if slot in masks:
                ruled_out = torch.ones(VOCAB, dtype=torch.bool)
                ruled_out[masks[slot]] = False
                wanted.masked_fill_(ruled_out, -torch.inf)
            np.testing.assert_allclose(row.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
        tokens_now = draw.choices(range(9), k=len(slots))
        processors.advance(on_device, torch.tensor(tokens_now, device=DEVICE))
        for slot, token in zip(slots, tokens_now, strict=True):
            living[slot][2].append(token)
