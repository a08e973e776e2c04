"""`--device sim` and grammars: masks take the time that they take."""

from __future__ import annotations

import select
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.checkpoint import ModelConfig
from nanovllm.grammars import Grammars, MaskFiller, Masks, Matcher
from nanovllm.messages import NO_TOKEN_LEFT, Admission, StepResult, pack, unpack
from nanovllm.protocol import Sampling, StructuredOutputs
from nanovllm.services.gpu_worker.sim import SimRunner
from nanovllm.services.gpu_worker.sim_tokens import draw_of
from nanovllm.settings import Settings
from nanovllm.token_sets import token_set
from tests.bpe import EOS, token_id, write_checkpoint_files
from tests.gpu_worker.plans import step_plan

STEP_S = 0.004
DELAY_S = 0.012
STEPS = 20
ORDINARY = np.arange(20, 200, dtype=np.int32)
SETTINGS = Settings(
    max_num_seqs=4,
    max_model_len=64,
    kvcache_block_size=64,
    num_kvcache_blocks=4,
    sim_step_ms=STEP_S * 1000,
)


@pytest.fixture
def grammars(tmp_path: Path) -> Grammars:
    directory = write_checkpoint_files(tmp_path)
    return Grammars.from_checkpoint(directory, ModelConfig.from_checkpoint(directory))


@given(st.data())
def test_all_allowed_tokens_are_drawn_alike(data: st.DataObject) -> None:
    allowed = data.draw(st.sets(st.integers(0, 95), max_size=20))
    masks = np.tile(token_set(allowed, 3), (400, 1))
    tokens = draw_of(masks, np.arange(400), np.arange(400, dtype=np.int32))
    if allowed:
        assert set(tokens.tolist()) == allowed
    else:
        assert set(tokens.tolist()) == {NO_TOKEN_LEFT}


def run(
    *matchers: Matcher | None,
    sampling: Sampling | None = None,
    found: list[StepResult] | None = None,
) -> list[StepResult]:
    """All sequences decode, with three steps in flight. The results come into `found`."""
    runner = SimRunner(SETTINGS, ORDINARY)
    asked = sampling or Sampling(seed=5)
    admit = [
        Admission(i, pack([1]), 1, pack([i]), 0, asked, None if matcher is None else i)
        for i, matcher in enumerate(matchers)
    ]
    slots = range(len(matchers))
    plans = [step_plan(0, admit=admit, prefill=[(slot, 0, 1) for slot in slots])]
    plans += [step_plan(number, decode=slots) for number in range(1, STEPS)]
    by_slot = {slot: m for slot, m in enumerate(matchers) if m is not None}
    found = [] if found is None else found
    launched = 0
    while len(found) < STEPS:
        while launched < min(STEPS, len(found) + 3):
            runner.launch(plans[launched], by_slot if launched == 0 else {})
            launched += 1
        readable, _, _ = select.select([runner.descriptor], [], [], 30)
        assert readable, f"{len(found)} results in 30 s"
        reported = [report for report in runner.reports() if isinstance(report, StepResult)]
        assert all(result.at_us <= (time.monotonic() - runner._start) * 1e6 for result in reported)
        found += reported
    return found


def tokens(results: list[StepResult], row: int) -> list[int]:
    return [int(unpack(result.token_ids)[row]) for result in results]


def test_tokens_are_of_the_grammar(grammars: Grammars) -> None:
    asked = StructuredOutputs(regex="(a|b){4,30}")
    results = run(grammars.matcher(asked), None, grammars.matcher(asked))
    first = tokens(results, 0)
    end = token_id(EOS)
    assert end in first, "the end of sequence is drawn as the others are"
    grammars.matcher(asked, None, first[: first.index(end) + 1])
    assert tokens(results, 2) == first, "the same seed"
    assert set(tokens(results, 1)) <= set(ORDINARY.tolist())
    few = run(grammars.matcher(asked), sampling=Sampling(seed=5, allowed_token_ids=[token_id("a")]))
    assert set(tokens(few, 0)) <= {token_id("a"), NO_TOKEN_LEFT}


def test_logprobs_are_of_the_tokens_drawn(grammars: Grammars) -> None:
    matcher = grammars.matcher(StructuredOutputs(regex="[a-z]+"))
    for result in run(matcher, sampling=Sampling(seed=5, logprobs=1)):
        (entry,) = result.logprobs
        assert unpack(entry.logprobs.token_ids)[0] == unpack(result.token_ids)[0]


def test_masks_that_come_late_make_the_device_idle(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = StructuredOutputs(regex="[a-z]+")
    fill = MaskFiller.fill
    filled_at: list[float] = []
    found: list[StepResult] = []

    def slow(self: MaskFiller, matchers: list[Matcher], masks: Masks) -> list[int]:
        assert len(found) == len(filled_at), "a result is not held back while masks are filled"
        filled_at.append(time.monotonic())
        time.sleep(DELAY_S)
        return fill(self, matchers, masks)

    monkeypatch.setattr(MaskFiller, "fill", slow)
    results = run(grammars.matcher(asked), found=found)
    ends = [result.at_us / 1e6 for result in results]
    assert len(filled_at) == STEPS
    for i in range(1, STEPS):
        # The tokens reach the masks no earlier than their step ends; the next step ends no earlier
        # than its masks are there.
        assert filled_at[i] - filled_at[0] >= ends[i - 1] - ends[0]
        assert ends[i] - ends[i - 1] >= DELAY_S
    busy_us = results[-1].busy_us - results[0].busy_us
    assert busy_us == pytest.approx(1e6 * STEP_S * (STEPS - 1))
    assert busy_us / 1e6 <= (ends[-1] - ends[0]) * STEP_S / DELAY_S
    # Steps without masks wait for none.
    filled_at.clear()
    assert tokens(run(None), 0)
    assert not filled_at
