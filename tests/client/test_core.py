"""The client's core, in memory."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.client.core import PING_PERIOD_S, RETRY_S, UNREACHABLE_TIMEOUT_S, ClientCore
from nanovllm.client.requests import generate_message
from nanovllm.client.results import PendingRequest, PipelineUnavailable, RequestError
from nanovllm.protocol import (
    Abort,
    Accepted,
    ClientMessage,
    Delta,
    Error,
    ErrorCode,
    Generate,
    Ping,
    Pong,
    Sampling,
)
from nanovllm.sampling_params import SamplingParams
from tests.client.double import SEED, finish, output_of, text_of, whole_answer

ENDPOINT = "tcp://somewhere:1"
TIMEOUT_S = 10.0
encode = msgspec.msgpack.Encoder().encode
decoder = msgspec.msgpack.Decoder(ClientMessage)


class Harness:
    """A core, its time, and the shell's duties."""

    def __init__(self) -> None:
        self.core = ClientCore(ENDPOINT, TIMEOUT_S)
        self.now = 1000.0
        self.renewals = 0

    def submit(self, prompt: str = "abc", *, stream: bool = True, **params: Any) -> PendingRequest:
        message = generate_message(prompt, SamplingParams(**params).to_wire(), stream=stream)
        return self.take(PendingRequest(message, lambda: None))

    def take(self, request: PendingRequest) -> PendingRequest:
        self.core.submit(request)
        return request

    def step(self, seconds: float = 0.0, *answers: Any) -> list[Any]:
        """Time passes, answers arrive, and the shell runs once; what it sends."""
        self.now += seconds
        if answers:
            self.core.receive(encode(list(answers)))
        if self.core.advance(self.now):
            self.renewals += 1
            self.core.renewed(self.now)
        return [decoder.decode(frame) for frame in self.core.frames()]

    def sent(self, kind: type[Any], seconds: float = 0.0, *answers: Any) -> list[Any]:
        return [m for m in self.step(seconds, *answers) if isinstance(m, kind)]


def accepted(request: PendingRequest, session: str = "s1") -> Accepted:
    return Accepted(id=request.message.id, session=session, seed=SEED)


def delta(request: PendingRequest, offset: int, token_ids: list[int]) -> Delta:
    return Delta(id=request.message.id, offset=offset, token_ids=token_ids, text=text_of(token_ids))


def pong(session: str = "s1") -> Pong:
    return Pong(id=None, session=session, version="0", model="m", ready=True)


def error(request: PendingRequest | None, code: ErrorCode) -> Error:
    return Error(id=request.message.id if request else None, code=code, message="because")


def test_a_stream_from_start_to_end() -> None:
    harness = Harness()
    request = harness.submit(max_tokens=4)
    (sent,) = harness.sent(Generate)
    assert sent == request.message
    assert sent.resume_token_ids == []
    harness.step(0.1, accepted(request), delta(request, 0, [5, 6]))
    assert [d.token_ids for d in request.deltas] == [[5, 6]]
    assert not request.ended
    harness.step(0.1, delta(request, 2, []), delta(request, 2, [7]), finish(request.message))
    completion = request.result()
    assert completion.token_ids == [5, 6, 7]
    assert completion.text == "<5><6><7>"
    assert completion.seed == SEED
    assert completion.logprobs is None
    assert harness.core.wait_s(harness.now) is None, "nothing is left to do"


def test_a_request_that_does_not_stream_gets_all_at_its_finish() -> None:
    harness = Harness()
    request = harness.submit(stream=False, max_tokens=4, logprobs=0)
    harness.step()
    harness.step(0.1, *whole_answer(request.message, "s1"))
    completion = request.result()
    assert completion.token_ids == [3, 4, 5, 6]
    assert completion.logprobs == [[(token_id, -0.5)] for token_id in completion.token_ids]
    assert completion.seed == SEED
    assert harness.core.changed() == [request]


def test_logprobs_that_came_in_deltas_need_not_be_kept() -> None:
    harness = Harness()
    message = generate_message("abc", Sampling(logprobs=0), stream=True)
    request = harness.take(PendingRequest(message, lambda: None, keeps_logprobs=False))
    new = Delta(id=message.id, offset=0, token_ids=[5], text="5", logprobs=[[(5, -0.5)]])
    harness.step(0.1, accepted(request), new, finish(message))
    assert [delta.logprobs for delta in request.deltas] == [[[(5, -0.5)]]]
    assert (request.result().token_ids, request.result().logprobs) == ([5], [])


def test_a_disconnection_resumes_every_stream_where_it_stood() -> None:
    harness = Harness()
    first, second = harness.submit(max_tokens=4), harness.submit("xy", max_tokens=4)
    harness.step()
    harness.step(0.1, accepted(first), delta(first, 0, [5, 6]), accepted(second))
    harness.core.disconnected()
    again = harness.sent(Generate, 0.1)
    assert harness.renewals == 1
    assert [message.id for message in again] == [first.message.id, second.message.id]
    assert again[0].resume_token_ids == [5, 6]
    assert again[0].sampling.seed == SEED, "it goes on with the seed that the ingress drew"
    assert again[1].resume_token_ids == []
    assert again[1].sampling.seed == SEED, "it was told that seed, too"
    harness.step(0.1, accepted(first, "s2"), delta(first, 2, [7, 8]), finish(first.message))
    assert first.result().text == "<5><6><7><8>"


def test_another_session_in_a_pong_means_a_new_connection() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.step(0.1, accepted(request, "s1"), delta(request, 0, [5]))
    harness.step(0.1, pong("s1"))
    assert harness.renewals == 0
    (again,) = harness.sent(Generate, 0.1, pong("s2"))
    assert harness.renewals == 1
    assert again.resume_token_ids == [5]


def test_it_pings_once_a_second_while_something_is_unfinished() -> None:
    harness = Harness()
    assert harness.core.wait_s(harness.now) is None
    request = harness.submit()
    assert len(harness.sent(Ping)) == 1
    assert not harness.sent(Ping, PING_PERIOD_S / 2)
    assert harness.core.wait_s(harness.now) == pytest.approx(PING_PERIOD_S / 2)
    assert len(harness.sent(Ping, PING_PERIOD_S / 2, pong())) == 1
    harness.step(0.1, accepted(request), finish(request.message))
    assert not harness.sent(Ping, 2 * PING_PERIOD_S)


def test_silence_brings_a_new_connection_and_then_an_error_that_helps() -> None:
    harness = Harness()
    request = harness.submit()
    for _ in range(int(TIMEOUT_S) - 1):
        harness.step(PING_PERIOD_S)
    assert harness.renewals == 1
    assert not request.ended
    for _ in range(3):
        harness.step(PING_PERIOD_S)
    with pytest.raises(PipelineUnavailable, match=r"somewhere:1 .*nanovllm-launch"):
        request.result()
    assert harness.step() == [], "what nobody waits for is not sent any more"


def pass_seconds(harness: Harness, seconds: float) -> None:
    for _ in range(round(seconds / 0.1)):
        harness.step(0.1)


def test_where_nothing_listens_a_first_request_soon_fails() -> None:
    harness = Harness()
    for _ in range(2):
        request = harness.submit()
        harness.step()
        harness.core.unreachable()
        pass_seconds(harness, UNREACHABLE_TIMEOUT_S - 0.2)
        assert not request.ended, "an ingress that starts again takes a moment"
        pass_seconds(harness, 0.3)
        with pytest.raises(PipelineUnavailable, match=r"nothing listens there.*nanovllm-launch"):
            request.result()
        harness.step()


def test_an_ingress_that_listens_in_time_has_the_whole_timeout_to_answer() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.core.unreachable()
    harness.step(UNREACHABLE_TIMEOUT_S / 2)
    harness.core.reached()
    pass_seconds(harness, TIMEOUT_S - 1)
    assert not request.ended
    pass_seconds(harness, 2)
    with pytest.raises(PipelineUnavailable, match=r"no pipeline answers .*\(waited 10 s\)"):
        request.result()


def test_where_something_listened_a_request_waits_for_its_return() -> None:
    harness = Harness()
    request = harness.submit()
    harness.core.reached()
    harness.step(0.1, accepted(request))
    harness.core.disconnected()
    harness.step(0.1)
    harness.core.unreachable()
    pass_seconds(harness, TIMEOUT_S - 1)
    assert not request.ended


def test_a_pipeline_that_was_there_is_said_to_be_gone() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.step(0.1, accepted(request))
    for _ in range(int(TIMEOUT_S) + 2):
        harness.step(PING_PERIOD_S)
    with pytest.raises(PipelineUnavailable, match="is gone"):
        request.result()


def test_a_program_that_was_busy_elsewhere_is_not_a_silent_pipeline() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    for _ in range(3):
        harness.step(10 * TIMEOUT_S)
    assert not request.ended


def test_abort_forgets_the_request() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.core.abandon(request)
    assert harness.sent(Abort) == [Abort(id=request.message.id)]
    harness.step(0.1, accepted(request), delta(request, 0, [5]), finish(request.message, "abort"))
    assert not request.deltas
    assert not request.ended
    harness.core.abandon(request)
    assert harness.step() == []


def test_an_error_ends_its_request_alone() -> None:
    harness = Harness()
    bad, good = harness.submit(), harness.submit()
    harness.step()
    harness.step(0.1, error(bad, "context_length_exceeded"), accepted(good))
    with pytest.raises(RequestError, match="because") as caught:
        bad.result()
    assert caught.value.code == "context_length_exceeded"
    assert not good.ended


def test_a_gap_in_the_offsets_ends_the_request() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    aborts = harness.sent(Abort, 0.1, accepted(request), delta(request, 1, [5]))
    assert aborts == [Abort(id=request.message.id)]
    with pytest.raises(RequestError, match="gap"):
        request.result()


def test_overloaded_is_the_end_of_a_new_request() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.step(0.1, error(request, "overloaded"))
    with pytest.raises(RequestError, match="overloaded"):
        request.result()


def test_overloaded_means_later_for_a_patient_request() -> None:
    harness = Harness()
    message = generate_message("abc", Sampling(), stream=False)
    request = harness.take(PendingRequest(message, lambda: None, patient=True))
    harness.step()
    assert not harness.sent(Generate, 0.1, error(request, "overloaded"))
    assert harness.sent(Generate, RETRY_S) == [message]
    assert not harness.sent(Generate, RETRY_S), "once"
    harness.step(0.1, *whole_answer(message, "s1"))
    assert request.result().finish_reason == "length"


def test_overloaded_means_later_for_a_stream_that_resumes() -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.step(0.1, accepted(request), delta(request, 0, [5]))
    harness.core.disconnected()
    harness.step(0.1)
    harness.step(0.1, error(request, "overloaded"))
    (again,) = harness.sent(Generate, RETRY_S)
    assert again.resume_token_ids == [5]


def test_overloaded_means_later_for_a_whole_answer_that_another_ingress_was_to_give() -> None:
    """Others may have been there first."""
    harness = Harness()
    request = harness.submit(stream=False)
    harness.step()
    harness.step(0.1, pong("s1"))
    harness.core.disconnected()
    harness.step(0.1)
    harness.step(0.1, error(request, "overloaded"))
    assert not request.ended
    assert harness.sent(Generate, RETRY_S)


def test_a_frame_that_is_too_large_costs_the_largest_request() -> None:
    harness = Harness()
    small, large, answered = (harness.submit("x" * n) for n in (10, 10_000, 20_000))
    harness.step()
    harness.step(0.1, accepted(answered), error(None, "invalid_request"))
    assert large.ended
    assert not small.ended
    assert not answered.ended


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"HTTP/1.1 400", b"\x91" * 5000, encode([{}]), b"\x91\x81\xa4type\xa1\xff"],
)
def test_an_answer_that_is_not_the_protocol_is_an_error(garbage: bytes) -> None:
    harness = Harness()
    request = harness.submit()
    harness.step()
    harness.core.receive(garbage)
    with pytest.raises(PipelineUnavailable, match="does not speak"):
        request.result()


def test_a_connection_that_keeps_breaking_is_not_retried_at_once() -> None:
    harness = Harness()
    harness.submit()
    for _ in range(100):
        harness.core.disconnected()
        harness.step(RETRY_S / 50)
    assert 1 <= harness.renewals <= 3


class Cut(msgspec.Struct):
    """The connection is lost after so many answers."""

    answers: int
    by_pong: bool  # a pong of another session tells, and not the socket


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    cuts=st.lists(st.builds(Cut, st.integers(0, 10), st.booleans()), max_size=6),
    data=st.data(),
)
def test_every_stream_is_whole_across_disconnects(
    lengths: list[int], cuts: list[Cut], data: st.DataObject
) -> None:
    """Property: a client that is disconnected at any point gets each output once, in order."""
    harness = Harness()
    requests = [harness.submit("p" * (i + 1), max_tokens=n) for i, n in enumerate(lengths)]
    for number, cut in enumerate([*cuts, None]):
        session = f"s{number}"
        streams = [whole_answer(m, session) for m in harness.sent(Generate, 0.1)]
        left = 10_000 if cut is None else cut.answers
        while streams and left:
            left -= 1
            stream = data.draw(st.sampled_from(streams))
            answer = next(stream, None)
            if answer is None:
                streams.remove(stream)
            else:
                harness.core.receive(encode([answer]))
        if cut is not None and cut.by_pong and left < cut.answers:
            harness.core.receive(encode([pong("another")]))
        elif cut is not None:
            harness.core.disconnected()
            harness.now += RETRY_S
    for request in requests:
        expected = output_of(request.message)
        completion = request.result()
        assert completion.token_ids == expected
        assert completion.text == text_of(expected)
        assert [t for d in request.deltas for t in d.token_ids] == expected
