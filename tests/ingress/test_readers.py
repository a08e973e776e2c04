"""Clients that read slowly, never, or no longer, beside a client that reads."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from nanovllm.messages import Submit
from nanovllm.protocol import Accepted, Delta, Finish
from tests.ingress.harness import decoded
from tests.ingress.process import Client, Surroundings
from tests.readers import free_tcp_endpoint, reader

# Small buffers. Without a reconnection, since libzmq (4.3.5) aborts the process of a socket that is
# connected anew while its receive queue is full.
SLOW = {"RCVHWM": 1, "RCVBUF": 4096, "RECONNECT_IVL": -1}


@pytest.fixture(scope="module")
def tcp() -> str:
    return free_tcp_endpoint()


@pytest.fixture(scope="module")
def around(tcp: str) -> Iterator[Surroundings]:
    """One ingress for the tests that leave it as they found it."""
    with Surroundings(ingress=tcp) as surroundings:
        yield surroundings


class Output:
    """What the detokenizer tells of a request: texts of `size` characters, one after another."""

    def __init__(self, around: Surroundings, submit: Submit, size: int) -> None:
        self.around, self.submit, self.size = around, submit, size
        self.count = 0

    def more(self, *, end: bool = False) -> None:
        new = decoded(self.submit, self.count, [self.count], end=end)
        new.text, new.text_offset = "x" * self.size, self.count * self.size
        self.around.detokenizer.send(new)
        self.count += 1


def whole(client: Client, output: Output) -> None:
    """Asserts that the client got all of it, and in order."""
    offset = 0
    for got in client.of(Delta):
        assert got.offset == offset
        assert len(got.text) == len(got.token_ids) * output.size
        offset += len(got.token_ids)
    assert offset == output.count


def test_a_slow_reader_gets_the_rest_merged(around: Surroundings) -> None:
    slow, other = around.client(**SLOW), around.client()
    slow.generate("a")
    (submit,) = around.started(1)
    around.until(lambda: slow.of(Accepted))
    slow.reads = False
    output = Output(around, submit, 20_000)
    for number in range(300):
        output.more(end=number == 299)
        # Another client's answer shows that the ingress has woken up since, and does not wait.
        other.ping()
        if number % 5 == 0:
            slow.read_one()
    slow.reads = True
    around.until(lambda: slow.of(Finish))
    whole(slow, output)
    assert slow.frames < output.count


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_does_not_read_is_disconnected(around: Surroundings, stream: bool) -> None:
    silent, good = around.client(**SLOW), around.client()
    silent.reads = False
    good.generate("good")
    (submit,) = around.started(1)
    good_output = Output(around, submit, 20_000)
    silent.generate("long")
    asked = around.started(1)
    output = Output(around, asked[0], 20_000)
    for batch in range(0 if stream else 30):
        asks = [{"type": "generate", "prompt": "x", "stream": False} for _ in range(50)]
        silent.say(*({**ask, "id": f"{batch} {number}"} for number, ask in enumerate(asks)))
        asked += around.started(50)
    whole_answers = [Output(around, submit, 20_000) for submit in asked[1:]]
    while asked[0].uid not in around.withdrawn:
        if stream:
            output.more()
        elif whole_answers:
            whole_answers.pop().more(end=True)
        good_output.more()
        good.ping()
    good_output.more(end=True)
    around.until(lambda: good.of(Finish))
    whole(good, good_output)
    around.until_withdrawn(*asked)
    assert around.process.poll() is None


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_client_that_is_stopped_or_killed_in_every_stage(
    around: Surroundings, tcp: str, how: signal.Signals
) -> None:
    """Its requests are aborted, over both transports, however much its buffers hold."""
    states = ["queued", "in prefill", "streaming", "streaming much", "whole"]
    asks = [{"id": state, "prompt": state, "stream": state != "whole"} for state in states]
    before = len(around.tokenizes)
    with reader([around.endpoint, tcp], asks) as process:
        around.until(lambda: len(around.tokenizes) == before + 2 * len(states))
        of = {
            state: [t for t in around.tokenizes[before:] if t.prompt == state] for state in states
        }
        running = {state: around.tokenized(*of[state]) for state in states[1:]}
        outputs = [
            *(Output(around, s, 10) for s in running["streaming"] + running["whole"]),
            *(Output(around, s, 20_000) for s in running["streaming much"]),
        ]
        submits = {submit.uid for some in running.values() for submit in some}

        process.send_signal(how)
        other = around.client()
        while not submits <= around.withdrawn:
            for output in outputs:
                if output.submit.uid not in around.withdrawn:
                    output.more()
            other.ping()
        # What is still with the tokenizer is given to nobody, or is taken back.
        around.answer(*of["queued"])
        other.generate("other")
        (submit,) = around.started(1)[-1:]
        Output(around, submit, 10).more(end=True)
        around.until(lambda: {submit.uid for submit in around.submits} <= around.withdrawn)
