"""`python -m tests.machines`: how long streams pause when a machine is cut off, and comes back.

Five machines are network namespaces, so this needs root and `ip`. The engine of one, then of the
other, is cut off for 20 s; then the machine of two tokenizers.
"""

from __future__ import annotations

import time
from itertools import pairwise

import click

from tests.machines.pipeline import five_machines
from tests.recovery.streams import MODEL_STOPS, Streamed, Streams, mixed_cases, undisturbed

CUT_S = 20.0


@click.command(help=__doc__)
@click.option("--device", default="cpu", show_default=True, help="cpu or sim.")
@click.option("--copies", default=3, show_default=True, help="Twelve streams each.")
def main(device: str, copies: int) -> None:
    cases = mixed_cases(MODEL_STOPS) * copies
    with five_machines("--device", device, "--dtype", "float32") as machines:
        expected = undisturbed(machines.main.endpoint, cases)
        for number, what in ((1, "an engine"), (2, "the other engine"), (3, "tokenizers")):
            streams = Streams(machines.main.endpoint, cases)
            streams.wait_for_news()
            host = machines.network.hosts[number]
            cut = time.monotonic()
            machines.network.cut(host)
            time.sleep(max(0.0, cut + CUT_S - time.monotonic()))
            machines.network.heal(host)
            healed = time.monotonic()
            machines.wait_until(unreachable=False)
            back = time.monotonic() - healed
            ended = streams.finish()
            wrong = sum(one.outcome != expected[one.case] for one in ended)
            pauses = sorted(map(longest_pause_s, ended), reverse=True)
            click.echo(
                f"{what} cut off for {CUT_S:g} s: of {len(ended)} streams {wrong} changed; longest"
                f" pauses {', '.join(f'{pause:.2f}' for pause in pauses[:3])} s; the machine is"
                f" back {back:.2f} s after it healed"
            )


def longest_pause_s(streamed: Streamed) -> float:
    return max(after - before for before, after in pairwise(streamed.times))


if __name__ == "__main__":
    main()
