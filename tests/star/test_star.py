"""Property: the cores of a pipeline together, with deaths and lost messages in any order.

Every request ends once, with the output of an undisturbed run, and no service keeps anything."""

from __future__ import annotations

import random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nanovllm.protocol import Sampling
from tests.star.world import BAD_PROMPT, GUILTY, LETTERS, MAX_MODEL_LEN, Ask, World

MOST_DEATHS = 5
CLIENTS = [b"\x00cli%d" % i for i in range(3)]


class Chaos:
    """Random events: the services' work is the most frequent."""

    def __init__(
        self, world: World, draw: random.Random, troubles: bool, guilty: float = 0.0
    ) -> None:
        self.world = world
        self.draw = draw
        self.troubles = troubles
        self.guilty = guilty  # the share of guilty requests
        self.num_guilty = 0
        self.asked = 0
        self.events = [
            (self.ask, 5.0),
            (self.ingress, 12.0),
            (self.scheduler, 12.0),
            (self.worker, 12.0),
            (self.worker_starts, 1.0),
            (world.verdict, 2.0),
            (self.tokenizer, 8.0),
            (self.detokenizer, 8.0),
            (self.delivery, 60.0),
            (self.reconnection, 8.0),
            (self.abort, 1.0),
            (self.leave, 0.2),
        ]
        if troubles:
            self.events += [
                (self.broken_link, 2.0),
                (self.tokenizer_dies, 0.4),
                (self.detokenizer_dies, 0.4),
                (self.scheduler_dies, 0.3),
                (self.worker_dies, 0.3),
                (world.ingress_dies, 0.1),
                (self.duplicate, 1.0),
            ]

    def run(self, steps: int) -> None:
        events, weights = zip(*self.events, strict=True)
        for event in self.draw.choices(events, weights, k=steps):
            event()
        for asks in self.world.asks.values():
            for ask in asks.values():
                ask.check()
        if self.troubles and len(self.world.detokenizers) > 1 and self.draw.random() < 0.5:
            self.cut_off()
        self.world.settle()

    def ask(self) -> None:
        draw = self.draw
        self.asked += 1
        prompt = [draw.randrange(GUILTY) for _ in range(draw.choice([1, 3, 9, 30]))]
        refused = draw.random() < 0.05
        guilty = not refused and draw.random() < self.guilty
        self.num_guilty += guilty
        prompt[0] = GUILTY if guilty else prompt[0]
        form = draw.choice(["prompt", "prompt_token_ids"])
        text = BAD_PROMPT if refused else "".join(chr(ord("a") + token) for token in prompt)
        sampling = Sampling(
            seed=draw.randrange(1000),
            max_tokens=draw.choice([1, 4, 12, 100]),
            stop=draw.choice([[], [], [chr(ord("a") + draw.randrange(LETTERS))], ["ab", "qx"]]),
            stop_token_ids=draw.choice([[], [draw.randrange(LETTERS)]]),
        )
        ask = Ask(
            id=str(self.asked),
            prompt_tokens=len(prompt),
            sampling=sampling,
            stream=draw.random() < 0.7,
            resumed=[],
            refused=refused,
            guilty=guilty,
        )
        if draw.random() < 0.3 and not refused and not guilty:
            whole, _, _ = ask.output()
            ask.resumed = whole[: draw.randrange(len(whole) + 1)]
        keys = {form: prompt} if form != "prompt" and not refused else {"prompt": text}
        assert len(prompt) + len(ask.resumed) <= MAX_MODEL_LEN
        self.world.ask(draw.choice(CLIENTS), ask, keys)

    def abort(self) -> None:
        client = self.draw.choice(CLIENTS)
        if asks := self.world.asks.get(client):
            ask = self.draw.choice(list(asks.values()))
            ask.aborted = True
            self.world.say(client, {"type": "abort", "id": ask.id})

    def leave(self) -> None:
        client = self.draw.choice(CLIENTS)
        self.world.asks.pop(client, None)
        self.world.ingress.closed(client)

    def ingress(self) -> None:
        self.world.ingress_works(patience=0.2)

    def scheduler(self) -> None:
        self.world.scheduler_works(self.draw.choice(list(self.world.schedulers)), patience=0.2)

    def worker(self) -> None:
        self.world.worker_works(self.draw.choice(list(self.world.schedulers)))

    def tokenizer(self) -> None:
        self.world.tokenizer_works(self.draw.choice(list(self.world.tokenizers)))

    def detokenizer(self) -> None:
        self.world.detokenizer_works(self.draw.choice(list(self.world.detokenizers)))

    def delivery(self) -> None:
        link = self.draw.choice(self.world.links)
        link.deliver(self.draw.choice([link.binder, link.connector]))

    def reconnection(self) -> None:
        self.draw.choice(self.world.links).make()

    def broken_link(self) -> None:
        self.draw.choice(self.world.links).lose(self.draw)

    def cut_off(self) -> None:
        """One link of one detokenizer is cut, and does not heal: another decodes its outputs."""
        texts, tokens = self.world.text_links[0], self.world.token_links
        cut = self.draw.choice([texts, *(tokens[e, 0] for e in self.world.schedulers)])
        cut.lose(self.draw)
        cut.cut = True

    def tokenizer_dies(self) -> None:
        i = self.draw.choice(list(self.world.tokenizers))
        peer = self.world.tokenizer_links[i].connector.peer
        self.world.tokenizer_dies(i)
        if self.draw.random() < 0.5:
            self.world.verdicts.append(peer)

    def detokenizer_dies(self) -> None:
        self.world.detokenizer_dies(self.draw.choice(list(self.world.detokenizers)))

    def scheduler_dies(self) -> None:
        """By itself, at times: its requests become suspects, and run one at a time."""
        e = self.draw.choice(list(self.world.schedulers))
        peer = self.world.engine_links[e].connector.peer
        self.world.scheduler_dies(e)
        if self.draw.random() < 0.5:
            self.world.crashed(peer)

    def worker_dies(self) -> None:
        e = self.draw.choice(list(self.world.schedulers))
        if e not in self.world.absent:
            self.world.worker_dies(e)
            if self.draw.random() < 0.5:
                self.world.crashed(self.world.worker_peers[e])

    def worker_starts(self) -> None:
        self.world.worker_starts(self.draw.choice(list(self.world.schedulers)))

    def duplicate(self) -> None:
        """A message arrives twice."""
        link = self.draw.choice(self.world.links)
        end = self.draw.choice([link.binder, link.connector])
        if end.inbox and not isinstance(end.inbox[0], str):
            end.inbox.appendleft(end.inbox[0])


@settings(max_examples=150, derandomize=True, phases=[Phase.generate], deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tokenizers=st.integers(1, 2),
    detokenizers=st.integers(1, 2),
    engines=st.integers(1, 3),
    troubles=st.booleans(),
)
def test_every_request_ends_once_and_nothing_is_left(
    seed: int, tokenizers: int, detokenizers: int, engines: int, troubles: bool
) -> None:
    draw = random.Random(seed)
    Chaos(World(draw, tokenizers, detokenizers, engines), draw, troubles).run(1500)


@settings(max_examples=60, derandomize=True, phases=[Phase.generate], deadline=None)
@given(
    seed=st.integers(0, 2**32),
    detokenizers=st.integers(1, 2),
    engines=st.integers(1, 4),
    late=st.booleans(),
)
def test_a_guilty_request_costs_five_deaths_at_most_however_many_engines_there_are(
    seed: int, detokenizers: int, engines: int, late: bool
) -> None:
    draw = random.Random(seed)
    world = World(draw, 1, detokenizers, engines)
    world.late_verdicts = late
    chaos = Chaos(world, draw, troubles=False, guilty=0.02)
    chaos.run(1500)
    assert world.crashes_of_guilty <= MOST_DEATHS * chaos.num_guilty
    if engines > 2 and chaos.num_guilty == 1 and not late:
        assert world.most_absent < engines, "one always serves"
