"""How long is the pause when a service dies?

    python -m tests.recovery --streams 1
    python -m tests.recovery --streams 32 --service ingress --service detokenizer

The services are killed in turns while streams run, on a CPU at tp 2, with one tokenizer and one
detokenizer, so that no other takes over. Each has been in good health for a while when it is
killed. A tokenizer is killed with all the requests in hand, none of which has a token. Prints one
JSON line for each service, in seconds from the kill:

    next_token   to the next token at the client, of whichever stream: median of all kills
    all_go_on    until each stream has had one, likewise
    times        `all_go_on` of each kill
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import click
from tqdm import tqdm

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from nanovllm import SamplingParams
from nanovllm.launch.groups import STABLE_S
from nanovllm.names import ServiceId
from tests.recovery.streams import Case, Streamed, Streams, living, wait_until_ready

TOKENIZER = ServiceId("tokenizer", 0)
SERVICES: dict[str, ServiceId] = {
    "ingress": ServiceId("ingress", 0),
    "scheduler": ServiceId("scheduler", 0),
    "gpu_worker 0": ServiceId("gpu_worker", 0),
    "gpu_worker 1": ServiceId("gpu_worker", 1),
    "detokenizer": ServiceId("detokenizer", 0),
    "tokenizer": TOKENIZER,
}
ARGUMENTS = ("--device", "cpu", "--tp", "2", "--max-model-len", "1024", "--log-level", "warning")
OUTPUT_TOKENS = 500
# After a kill nobody looks at processes for so long: looking takes time from their restart.
UNDISTURBED_S = 1.5
# Until a stopped tokenizer has been sent what was asked.
SENT_S = 0.5


class Pause(NamedTuple):
    """Seconds from a kill to the next token at all, and until all streams had one."""

    next_token: float
    all_go_on: float


@click.command(help=help_of(__doc__))
@click.option("--streams", type=click.IntRange(1), default=1, show_default=True)
@click.option("--kills", type=click.IntRange(1), default=10, show_default=True, help="Of each.")
@click.option(
    "--service", "names", type=click.Choice(list(SERVICES)), multiple=True, default=list(SERVICES)
)
def main(streams: int, kills: int, names: tuple[str, ...]) -> None:
    with Pipeline("", *ARGUMENTS) as pipeline:
        chosen = {name: SERVICES[name] for name in names}
        tokenizers = [service for service in chosen.values() if service == TOKENIZER]
        others = [service for service in chosen.values() if service != TOKENIZER]
        pauses: dict[ServiceId, list[Pause]] = {service: [] for service in chosen.values()}
        with tqdm(total=kills * len(chosen), desc="kills", disable=None, leave=False) as bar:
            killer = Killer(pipeline, bar)
            if others:
                _while_streaming(killer, streams, others * kills, pauses)
            for service in tokenizers * kills:
                pauses[service].append(_with_requests_in_hand(killer, streams))
    for name, service in chosen.items():
        click.echo(json.dumps({"service": name, "streams": streams, **_figures(pauses[service])}))


class Killer:
    """Kills services that are in good health."""

    def __init__(self, pipeline: Pipeline, bar: tqdm) -> None:
        self.pipeline = pipeline
        self._bar = bar
        self._ready_since: dict[str, float] = {}

    def rest(self, service: ServiceId) -> None:
        """Returns once all services are ready, and this one's deaths are forgotten."""
        self._note_ready()
        time.sleep(max(0.0, self._ready_since[service.role] + STABLE_S - time.monotonic()))

    def kill(self, service: ServiceId) -> float:
        """When it was."""
        (victim,) = living(self.pipeline, [service])
        at = time.monotonic()
        victim.kill()
        self._ready_since.pop(service.role, None)
        self._bar.update()
        time.sleep(UNDISTURBED_S)
        return at

    def _note_ready(self) -> None:
        """Since when; of a rank's group, since all its ranks are."""
        wait_until_ready(self.pipeline, list(SERVICES.values()))
        now = time.monotonic()
        for service in SERVICES.values():
            self._ready_since.setdefault(service.role, now)


def _cases(streams: int, output_tokens: int) -> list[Case]:
    return [
        Case(
            "Once upon a time",
            SamplingParams(max_tokens=output_tokens, ignore_eos=True, seed=number),
        )
        for number in range(streams)
    ]


def _while_streaming(
    killer: Killer, streams: int, victims: Sequence[ServiceId], pauses: dict[ServiceId, list[Pause]]
) -> None:
    load = Streams(killer.pipeline.endpoint, _cases(streams, OUTPUT_TOKENS))
    killed: list[tuple[ServiceId, float]] = []
    for service in victims:
        killer.rest(service)
        load.wait_for_news()
        killed.append((service, killer.kill(service)))
        load.wait_for_news()
    ended = load.finish()
    untils = [*[at for _, at in killed[1:]], float("inf")]
    for (service, at), until in zip(killed, untils, strict=True):
        pauses[service].append(
            _pause([_arrivals(ended, case, at, until) for case in range(streams)])
        )


def _with_requests_in_hand(killer: Killer, streams: int) -> Pause:
    killer.rest(TOKENIZER)
    for tokenizer in living(killer.pipeline, [TOKENIZER]):
        tokenizer.suspend()
    load = Streams(killer.pipeline.endpoint, _cases(streams, output_tokens=2))
    time.sleep(SENT_S)
    at = killer.kill(TOKENIZER)
    first = [one.times[1] - at for one in load.finish() if one.times[0] < at]
    return Pause(min(first), max(first))


def _arrivals(ended: Sequence[Streamed], case: int, at: float, until: float) -> list[float]:
    """When tokens came, in seconds from a kill until the next, of the streams of one case."""
    times = sorted(time for one in ended if one.case == case for time in one.times[1:])
    return [time - at for time in times if at < time < until]


def _pause(arrivals: Sequence[Sequence[float]]) -> Pause:
    """The longest pause in each stream ends when it goes on: before it came what was on its way."""
    ends = []
    for times in arrivals:
        gaps = zip([0.0, *times], times, strict=False)
        ends.append(max(gaps, key=lambda gap: gap[1] - gap[0])[1])
    return Pause(min(ends), max(ends))


def _figures(pauses: Sequence[Pause]) -> dict[str, object]:
    return {
        "kills": len(pauses),
        "next_token": round(statistics.median(pause.next_token for pause in pauses), 2),
        "all_go_on": round(statistics.median(pause.all_go_on for pause in pauses), 2),
        "times": [round(pause.all_go_on, 2) for pause in pauses],
    }


if __name__ == "__main__":
    main()
