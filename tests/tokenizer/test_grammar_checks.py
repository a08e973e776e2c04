"""Whether a request's grammar can be served, found out before the request is accepted."""

from __future__ import annotations

import random
import select
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event

import pytest

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.grammars import Grammars
from nanovllm.messages import AnswerMarks, Refused, Tokenize, Tokenized, pack
from nanovllm.protocol import Sampling, StructuredOutputs
from nanovllm.services.tokenizer.core import TokenizeQueue
from nanovllm.services.tokenizer.grammar_checks import GrammarChecks, checked
from tests.bpe import EOS, tiny_tokenizer, token_id, write_checkpoint_files
from tests.tokenizer.test_prompts import request

TOKENIZER = tiny_tokenizer()
END = token_id(EOS)
OPEN, CLOSE = token_id("<think>"), token_id("</think>")


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    directory = write_checkpoint_files(tmp_path_factory.mktemp("checks"))
    return Grammars.from_checkpoint(directory, ModelConfig.from_checkpoint(directory))


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def asked(
    outputs: StructuredOutputs, resumed: Sequence[int] = (), reasoning: bool = False
) -> tuple[Tokenize, Tokenized]:
    sampling = Sampling(structured_outputs=outputs, stop_token_ids=[END])
    marks = AnswerMarks(OPEN, CLOSE, reasons=False) if reasoning else None
    return (
        request(resumed=pack(resumed), sampling=sampling),
        Tokenized(request().uid, pack([1]), sampling, marks),
    )


def answers(checks: GrammarChecks) -> list[Tokenized | Refused]:
    """The answers of the next check that ends."""
    readable, _, _ = select.select([checks.descriptor], [], [], 20)
    assert readable, "no answer came"
    return checks.take()


DIGITS = StructuredOutputs(regex="[0-9]{2}")


@pytest.mark.parametrize(
    ("resumed", "reasoning"),
    [
        ([], False),
        (tokens("1"), False),
        ([*tokens("12"), END], False),
        ([*tokens("12"), END, *tokens("what comes behind the end is none of the output")], False),
        ([OPEN, *tokens("or"), CLOSE, *tokens("1")], True),
        ([OPEN, *tokens("or")], True),
    ],
)
def test_resumed_tokens_that_fit(grammars: Grammars, resumed: list[int], reasoning: bool) -> None:
    ask, answer = asked(DIGITS, resumed, reasoning)
    assert checked(grammars, ask, answer) == answer


@pytest.mark.parametrize(
    "resumed", [tokens("x"), tokens("123"), [END], [*tokens("1"), END], [OPEN, *tokens("1")]]
)
def test_resumed_tokens_that_do_not_fit(grammars: Grammars, resumed: list[int]) -> None:
    refused = checked(grammars, *asked(DIGITS, resumed))
    assert isinstance(refused, Refused)
    assert refused.code == "invalid_request"
    assert refused.message.startswith("resume_token_ids: sampling.structured_outputs does not take")


def test_outputs_that_take_too_much_work_together_are_taken(grammars: Grammars) -> None:
    outputs = StructuredOutputs(regex="[ab]*a[ab]{17}X?")
    letters = [token_id(letter) for letter in "ab"]
    draw = random.Random(0)
    for _ in range(300):
        ask, answer = asked(outputs, draw.choices(letters, k=400))
        before = grammars.matcher(outputs)
        assert checked(grammars, ask, answer) == answer
        if not before.has_begin:
            break
    else:
        pytest.fail("the outputs together took little work")
    assert checked(grammars, *asked(outputs)) == asked(outputs)[1]


def test_a_grammar_without_text_is_refused(grammars: Grammars) -> None:
    for outputs in (
        StructuredOutputs(grammar="start: /[a-c]+/ & /[d-f]+/\n"),
        StructuredOutputs(json_schema='{"type": "string", "minLength": 2, "maxLength": 1}'),
    ):
        refused = checked(grammars, *asked(outputs))
        assert isinstance(refused, Refused), outputs
        assert refused.message.startswith("sampling.structured_outputs: ")


def test_requests_without_a_grammar_do_not_wait_for_checks(grammars: Grammars) -> None:
    started: list[tuple[Tokenize, Tokenized]] = []
    sampling = Sampling(structured_outputs=DIGITS)
    queue = TokenizeQueue(
        lambda ask: Tokenized(ask.uid, b"", ask.sampling), lambda *check: started.append(check)
    )
    for ask in (request(uid=1, sampling=sampling), request(uid=2)):
        queue.add(ask)
        queue.work()
    assert [answer.uid for answer in queue.frame()] == [2]
    assert queue.stats().queued == 2
    queue.checked(started[0][1])
    assert [answer.uid for answer in queue.frame()] == [2, 1]
    # The link was lost meanwhile: another tokenizer has the request.
    queue.add(request(uid=3, sampling=sampling))
    queue.work()
    queue.forget()
    queue.checked(started[1][1])
    assert queue.frame() == []
    assert queue.stats().queued == 0


def test_requests_that_arrive_at_once_are_answered_together(grammars: Grammars) -> None:
    begun, release = Event(), Event()

    def load() -> Grammars:
        begun.set()
        assert release.wait(60)
        return grammars

    checks = GrammarChecks(load)
    assert begun.wait(30)
    ask, answer = asked(DIGITS)
    for _ in range(50):
        checks.start(ask, answer)
    release.set()
    first = answers(checks)
    assert first == [answer] * 50 or first + answers(checks) == [answer] * 50


def test_what_goes_wrong_in_a_check_ends_its_request_alone(tmp_path: Path) -> None:
    def broken() -> Grammars:
        raise CheckpointError("gone")

    checks = GrammarChecks(broken)
    checks.start(*asked(DIGITS))
    (refused,) = answers(checks)
    assert isinstance(refused, Refused)
    assert refused.code == "internal"

    directory = write_checkpoint_files(tmp_path)
    model = ModelConfig.from_checkpoint(directory)
    checks = GrammarChecks(partial(Grammars.from_checkpoint, directory, model))
    ask, answer = asked(DIGITS)
    checks.start(ask, answer)
    assert answers(checks) == [answer]
