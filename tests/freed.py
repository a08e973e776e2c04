"""How soon is what a client held free again, when it goes?

    python -m tests.freed

A client with requests of one kind gets SIGSTOP, as if its cable were pulled, or SIGKILL, over each
transport. The time is that until another's request gets its first token in a slot that was taken;
where the client's requests were queued, until the ingress takes one more of the other's, which had
its share of what the client left. Prints one JSON line for each case: all times, in seconds. The
device is simulated, a step takes 10 ms.
"""

from __future__ import annotations

import itertools
import json
import signal
import time
from typing import Any, NamedTuple

import click

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from nanovllm.control import SchedulerStats
from nanovllm.protocol import Error
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Answer, Wire
from tests.readers import free_tcp_endpoint, reader

SLOTS = 4
MAX_MODEL_LEN = 2048
ARGUMENTS = f"""--device sim --sim-step-ms 10 --max-num-seqs {SLOTS} --max-model-len {MAX_MODEL_LEN}
 --max-pending-requests {3 * SLOTS} --max-num-batched-tokens 16 --kvcache-block-size 16"""
LONG: dict[str, Any] = {
    "prompt": None,
    "prompt_token_ids": [7, 8],
    "sampling": {"max_tokens": MAX_MODEL_LEN},
}
KINDS: dict[str, dict[str, Any]] = {
    "queued": LONG,
    "in prefill": {**LONG, "prompt_token_ids": [7] * 1900},
    "streaming": LONG,
    "stream: false": {**LONG, "stream": False},
}
ASK_AGAIN_S = 0.002


class Case(NamedTuple):
    transport: str
    kind: str
    how: signal.Signals


@click.command(help=help_of(__doc__))
@click.option("--times", default=1, show_default=True, help="How often each case is measured.")
def main(times: int) -> None:
    tcp = free_tcp_endpoint()
    with Pipeline("", *ARGUMENTS.split(), "--ingress", tcp) as pipeline:
        endpoints = {"ipc": pipeline.endpoint, "tcp": tcp}
        for case in itertools.starmap(
            Case, itertools.product(endpoints, KINDS, (signal.SIGSTOP, signal.SIGKILL))
        ):
            freed = [_freed(pipeline, endpoints[case.transport], case) for _ in range(times)]
            line = {"transport": case.transport, "requests": case.kind, "how": case.how.name}
            click.echo(json.dumps({**line, "freed_s": [round(seconds, 3) for seconds in freed]}))


def _freed(pipeline: Pipeline, endpoint: str, case: Case) -> float:
    """Seconds from the signal."""
    queued = case.kind == "queued"
    count = SLOTS if queued else SLOTS + 2
    # The salts keep prompts out of the prefix cache.
    asks = [
        {"id": str(n), "cache_salt": f"{time.monotonic()} {n}", **KINDS[case.kind]}
        for n in range(count)
    ]
    held = count
    with Wire(pipeline.endpoint) as other:
        if queued:
            held += SLOTS
            holding = other.ask_all([LONG] * SLOTS)
            other.until(lambda: all(answer.deltas for answer in holding))
        with reader([endpoint], asks) as process:
            pipeline.stats_once(
                SchedulerStats, lambda stats: 0 < stats.running == held - stats.waiting
            )
            process.send_signal(case.how)
            start = time.monotonic()
            while _refused(other, answer := _ask(other)):
                time.sleep(ASK_AGAIN_S)
            if not queued:
                other.until(lambda: answer.deltas)
            seconds = time.monotonic() - start
    wait_until_nothing_is_left(pipeline)
    return seconds


def _ask(other: Wire) -> Answer:
    return other.ask(prompt_token_ids=[5], sampling={"max_tokens": 1})


def _refused(other: Wire, answer: Answer) -> bool:
    """Whether the ingress holds as many requests of the client's as it may."""
    other.until(lambda: answer.accepted or answer.end)
    return isinstance(answer.end, Error)


if __name__ == "__main__":
    main()
