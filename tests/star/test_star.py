"""Property: ingress and scheduler cores together, with deaths and lost messages in any order.

Every request ends once, with the output of an undisturbed run, and no service keeps anything."""

from __future__ import annotations

import random

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from nanovllm.protocol import Sampling
from tests.star.world import BAD_PROMPT, LETTERS, MAX_MODEL_LEN, Ask, World

CLIENTS = [b"\x00cli%d" % i for i in range(3)]


class Chaos:
    """Random events: the services' work is the most frequent."""

    def __init__(self, world: World, draw: random.Random, troubles: bool) -> None:
        self.world = world
        self.draw = draw
        self.asked = 0
        self.events = [
            (self.ask, 5.0),
            (self.ingress, 12.0),
            (self.scheduler, 12.0),
            (self.worker, 12.0),
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
        self.world.settle()

    def ask(self) -> None:
        draw = self.draw
        self.asked += 1
        prompt = [draw.randrange(LETTERS) for _ in range(draw.choice([1, 3, 9, 30]))]
        refused = draw.random() < 0.05
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
        )
        if draw.random() < 0.3 and not refused:
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
        self.world.scheduler_works(patience=0.2)

    def worker(self) -> None:
        self.world.worker_works()

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

    def tokenizer_dies(self) -> None:
        self.world.tokenizer_dies(self.draw.choice(list(self.world.tokenizers)))

    def detokenizer_dies(self) -> None:
        self.world.detokenizer_dies(self.draw.choice(list(self.world.detokenizers)))

    def scheduler_dies(self) -> None:
        """By itself, at times: its requests become suspects, and run one at a time."""
        peer = self.world.engine_link.connector.peer
        self.world.scheduler_dies()
        if self.draw.random() < 0.5:
            self.world.crashed(peer)

    def worker_dies(self) -> None:
        peer = self.world.worker_peer
        self.world.worker_dies()
        if self.draw.random() < 0.5:
            self.world.crashed(peer)

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
    troubles=st.booleans(),
)
def test_every_request_ends_once_and_nothing_is_left(
    seed: int, tokenizers: int, detokenizers: int, troubles: bool
) -> None:
    draw = random.Random(seed)
    Chaos(World(draw, tokenizers, detokenizers), draw, troubles).run(1500)
