"""The cores of a whole pipeline over links in memory, and clients who check what they get."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec

from nanovllm.messages import (
    Decoded,
    Engines,
    GroupReady,
    Refused,
    Reset,
    StepPlan,
    StepResult,
    Tokenize,
    Tokenized,
    pack,
    unpack,
)
from nanovllm.protocol import Accepted, Delta, Error, Finish, Sampling, ServerMessage
from nanovllm.services.detokenizer.core import Detokenizer
from nanovllm.services.detokenizer.text import StopFinder
from nanovllm.services.ingress.core import About
from nanovllm.services.ingress.core import Core as Ingress
from nanovllm.services.ingress.frames import Limits
from nanovllm.services.scheduler.core import Scheduler
from nanovllm.services.tokenizer.core import TokenizeQueue
from nanovllm.settings import Settings
from nanovllm.transport.links import Peer
from nanovllm.vocabulary import Vocabulary
from tests.star.links import End as Side
from tests.star.links import Link
from tests.tokenizer.test_core import no_grammars

LETTERS = 26
VOCABULARY = Vocabulary(
    text={i: bytes([ord("a") + i]) for i in range(LETTERS)}, longest_entry=1, size=LETTERS
)
MAX_MODEL_LEN = 48
BAD_PROMPT = "refuse me"
GUILTY = LETTERS - 1  # a prompt that begins with this token brings down the worker

_server_messages = msgspec.msgpack.Decoder(list[ServerMessage])


def next_token(seed: int, position: int) -> int:
    """The fake model: a function of seed and position."""
    return hash((seed, position, 77)) % LETTERS


@dataclass
class Ask:
    """A client's request, and what must come of it."""

    id: str
    prompt_tokens: int
    sampling: Sampling
    stream: bool
    resumed: list[int]
    refused: bool
    guilty: bool = False
    heard: list[ServerMessage] = field(default_factory=list)
    aborted: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.heard) and isinstance(self.heard[-1], Finish | Error)

    def output(self) -> tuple[list[int], str, str]:
        """Tokens, text and finish reason of the whole output, the resumed tokens included."""
        tokens: list[int] = []
        seed = self.sampling.seed or 0
        most = min(self.sampling.max_tokens, MAX_MODEL_LEN - self.prompt_tokens)
        while True:
            text = "".join(chr(ord("a") + t) for t in tokens)
            cuts = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
            if cuts:
                return tokens, text[: min(cuts)], "stop"
            if tokens and tokens[-1] in self.sampling.stop_token_ids:
                return tokens, text, "stop"
            if len(tokens) >= most:
                return tokens, text, "length"
            tokens.append(next_token(seed, self.prompt_tokens + len(tokens)))

    def _released(self) -> str:
        """The text that the resumed tokens have released to the client before."""
        finder = StopFinder(self.sampling.stop) if self.sampling.stop else None
        released = ""
        for token in self.resumed:
            letter = chr(ord("a") + token)
            released += letter if finder is None else finder.feed(letter)
        return released

    def check(self) -> None:
        """What was heard is right so far: in order, nothing twice, nothing lost."""
        tokens, text, reason = self.output()
        heard = list(self.heard)
        if self.stream and heard and not isinstance(heard[0], Finish | Error):
            assert isinstance(heard.pop(0), Accepted)
        assert not any(isinstance(message, Accepted) for message in heard)
        last = heard.pop() if self.ended else None
        got, said = list(self.resumed), ""
        for message in heard:
            assert self.stream
            assert isinstance(message, Delta)
            assert message.offset == len(got), "a gap or a repetition"
            got += message.token_ids
            said += message.text
        if isinstance(last, Error):
            assert last.code == ("invalid_request" if self.refused else "poisoned")
            return
        assert last is None or self.aborted or not self.guilty
        if not self.stream and last is not None:
            assert isinstance(last, Finish)
            assert isinstance(last.token_ids, list)
            assert isinstance(last.text, str)
            got, said = got + last.token_ids, last.text
        assert got == tokens[: len(got)]
        before = self._released()
        assert (before + said) == text[: len(before) + len(said)]
        if last is not None and not self.aborted:
            assert isinstance(last, Finish)
            assert last.finish_reason == reason
            assert got == tokens
            assert before + said == text
            assert last.usage.prompt_tokens == self.prompt_tokens
            assert last.usage.completion_tokens == len(tokens)


class Worker:
    """Rank 0 of a group that runs plans in order, when told to."""

    def __init__(self) -> None:
        self.plans: deque[StepPlan] = deque()
        self.slots: dict[int, tuple[int, int]] = {}  # seed and number of tokens

    def take(self, message: Any) -> None:
        if isinstance(message, Reset):
            self.plans.clear()
            self.slots.clear()
        else:
            self.plans.append(message)

    @property
    def crashes(self) -> bool:
        """Whether the next plan has a guilty request."""
        admissions = self.plans[0].admit if self.plans else []
        return any(unpack(admission.tokens)[0] == GUILTY for admission in admissions)

    def run(self) -> StepResult:
        plan = self.plans.popleft()
        for slot in unpack(plan.release).tolist():
            del self.slots[slot]
        for admission in plan.admit:
            assert admission.sampling.seed is not None
            self.slots[admission.slot] = (admission.sampling.seed, len(admission.tokens) // 4)
        rows = unpack(plan.decode).tolist()
        for slot, start, length in unpack(plan.prefill).reshape(-1, 3).tolist():
            if start + length == self.slots[slot][1]:
                rows.append(slot)
        sampled = []
        for slot in rows:
            seed, num_tokens = self.slots[slot]
            sampled.append(next_token(seed, num_tokens))
            self.slots[slot] = (seed, num_tokens + 1)
        return StepResult(plan.number, pack(sampled), [], 0, 0)


def encode(request: Tokenize) -> Tokenized | Refused:
    """The fake tokenizer: a letter is a token."""
    if request.prompt == BAD_PROMPT:
        return Refused(request.uid, "invalid_request", "as asked for")
    prompt = request.prompt_token_ids or pack(ord(c) - ord("a") for c in request.prompt or "")
    room = MAX_MODEL_LEN - len(prompt) // 4
    asked = request.sampling
    return Tokenized(
        request.uid,
        prompt,
        msgspec.structs.replace(asked, max_tokens=min(asked.max_tokens, room)),
    )


class World:
    """One ingress, some engines, which are a scheduler and its worker each, some tokenizers and
    detokenizers."""

    def __init__(
        self, draw: random.Random, tokenizers: int, detokenizers: int, engines: int
    ) -> None:
        self.draw = draw
        self.settings = Settings(
            max_num_seqs=draw.choice([1, 3, 8]),
            max_num_batched_tokens=draw.choice([8, 32]),
            max_prefill_tokens=draw.choice([4, 32]),
            max_model_len=MAX_MODEL_LEN,
            kvcache_block_size=4,
            pipeline_depth=draw.choice([1, 3]),
        )
        self.asks: dict[bytes, dict[str, Ask]] = {}
        self.ended: list[Ask] = []
        self.absent: set[int] = set()  # engines whose worker has died and not started yet
        self.most_absent = 0
        # Crashes that the supervisor has not told of yet, and whether there may be any.
        self.verdicts: deque[Peer] = deque()
        self.late_verdicts = False
        self.crashes_of_guilty = 0
        self.crashes = 0  # deaths that the supervisor has told of
        self._numbers = 0
        self.ingress = self._new_ingress()
        self.schedulers = {e: Scheduler(self.settings, e) for e in range(engines)}
        self.workers: dict[int, Worker] = {}
        self.worker_peers: dict[int, Peer] = {}
        self.tokenizers = {i: TokenizeQueue(encode, no_grammars) for i in range(tokenizers)}
        self.detokenizers = {i: Detokenizer(VOCABULARY) for i in range(detokenizers)}
        ingress = self._peer("ingress", 0)
        schedulers = [self._peer("scheduler", 0, e) for e in self.schedulers]
        self.engine_links = {
            peer.engine: Link(self._ingress_side(ingress), self._scheduler_side(peer))
            for peer in schedulers
        }
        self.tokenizer_links = {
            i: Link(self._ingress_side(ingress), self._tokenizer_side(i)) for i in self.tokenizers
        }
        self.text_links: dict[int, Link] = {}
        self.token_links: dict[tuple[int, int], Link] = {}  # of an engine and a detokenizer
        for i in self.detokenizers:
            peer = self._peer("detokenizer", i)
            self.text_links[i] = Link(self._ingress_side(ingress), self._text_side(i, peer))
            for scheduler in schedulers:
                self.token_links[scheduler.engine, i] = token = Link(
                    self._bound_side(scheduler), self._token_side(i, peer, scheduler.engine)
                )
                token.closed = True
        for e in self.schedulers:
            self._start_worker(e)

    @property
    def links(self) -> list[Link]:
        return [
            *self.engine_links.values(),
            *self.tokenizer_links.values(),
            *self.text_links.values(),
            *self.token_links.values(),
        ]

    # The sides of the links ---------------------------------------------------------------------

    def _peer(self, role: str, index: int, engine: int = 0) -> Peer:
        self._numbers += 1
        return Peer(role, index, self._numbers, engine)

    def _nothing(self, peer: Peer, message: Any = None) -> None:
        """This side hears nothing."""

    def _ingress_side(self, peer: Peer) -> Side:
        return Side(
            peer,
            lambda other: self.ingress.service_up(other),
            lambda other: self.ingress.service_down(other),
            self._to_ingress,
        )

    def _to_ingress(self, peer: Peer, message: Any) -> None:
        if isinstance(message, Decoded):
            self.ingress.from_detokenizer(message)
        elif peer.role == "scheduler":
            self.ingress.from_scheduler(peer, message)
        else:
            self.ingress.from_tokenizer(peer, message)

    def _scheduler_side(self, peer: Peer) -> Side:
        e = peer.engine
        return Side(
            peer,
            lambda _: self.schedulers[e].ingress_up(),
            self._nothing,
            lambda _, message: self.schedulers[e].from_ingress(message),
        )

    def _bound_side(self, peer: Peer) -> Side:
        """A scheduler's, for a detokenizer."""
        e = peer.engine
        return Side(
            peer,
            lambda detokenizer: self.schedulers[e].detokenizer_up(detokenizer),
            lambda detokenizer: self.schedulers[e].detokenizer_down(detokenizer),
            self._nothing,
        )

    def _tokenizer_side(self, i: int) -> Side:
        return Side(
            self._peer("tokenizer", i),
            lambda _: self.tokenizers[i].forget(),
            self._nothing,
            lambda _, message: self.tokenizers[i].add(message),
        )

    def _text_side(self, i: int, peer: Peer) -> Side:
        def left(_: Peer) -> None:
            for e in self.schedulers:
                self.token_links[e, i].close(self.draw)
                self.detokenizers[i].forget(e)

        def told(_: Peer, message: Engines) -> None:
            for e in message.endpoints:
                self.token_links[e, i].closed = False

        return Side(peer, self._nothing, left, told)

    def _token_side(self, i: int, peer: Peer, e: int) -> Side:
        return Side(
            peer,
            self._nothing,
            lambda _: self.detokenizers[i].forget(e),
            lambda _, message: self.detokenizers[i].take(message, e),
        )

    # Services at work ---------------------------------------------------------------------------

    def ingress_works(self, patience: float = 0.0) -> None:
        """Its loop, once; a socket is full with probability `patience`."""
        core = self.ingress
        core.work()
        core.submit()
        for peer, frame in list(core.tokenizers.frames()):
            link = self.tokenizer_links[peer.index]
            if self.draw.random() >= patience and link.send(link.binder, frame):
                core.tokenizers.sent(peer, frame)
        for scheduler, messages in list(core.engines.frames()):
            link = self.engine_links[scheduler.engine]
            if self.draw.random() >= patience and link.send(link.binder, messages):
                core.engines.sent(scheduler, messages)
        for detokenizer, engines in list(core.detokenizers.frames()):
            link = self.text_links[detokenizer.index]
            if link.send(link.binder, engines):
                core.detokenizers.sent(detokenizer, engines)
        for session in list(core.sessions.unsent):
            while (frame_bytes := session.outgoing()) is not None:
                self._hear(session.connection, _server_messages.decode(frame_bytes))
                core.sent(session)
            core.sessions.unsent.discard(session)

    def scheduler_works(self, e: int, patience: float = 0.0) -> None:
        core = self.schedulers[e]
        self._plan(e)
        link = self.engine_links[e]
        messages = core.for_ingress()
        if messages and self.draw.random() >= patience and link.send(link.connector, messages):
            core.ingress_told()
        core.detokenizers.retry()
        for frame in core.detokenizers.frames():
            link = self.token_links[e, frame.peer.index]
            if self.draw.random() >= patience and link.send(link.binder, frame.messages):
                core.detokenizers.delivered(frame)
            else:
                core.detokenizers.undelivered(frame)

    def worker_works(self, e: int) -> bool:
        if not self.workers[e].plans:
            return False
        if self.workers[e].crashes:
            peer = self.worker_peers[e]
            self.crashes_of_guilty += 1
            self.worker_dies(e)
            self.verdicts.append(peer)
            if not self.late_verdicts:
                self.verdict()
            return True
        self.schedulers[e].result(self.worker_peers[e], self.workers[e].run())
        self._plan(e)
        return True

    def _plan(self, e: int) -> None:
        scheduler = self.schedulers[e]
        planned = True
        while planned:
            planned = scheduler.plan()
            for message in scheduler.group.unsent:
                self.workers[e].take(message)
            scheduler.group.sent()
            scheduler.settle()

    def tokenizer_works(self, i: int) -> None:
        queue, link = self.tokenizers[i], self.tokenizer_links[i]
        if not queue.idle:
            queue.work()
        if (frame := queue.frame()) and link.send(link.connector, frame):
            queue.sent(frame)

    def detokenizer_works(self, i: int) -> None:
        core, link = self.detokenizers[i], self.text_links[i]
        if (frame := core.frame()) and link.send(link.connector, frame):
            core.sent(frame)

    # Deaths -------------------------------------------------------------------------------------

    def ingress_dies(self) -> None:
        """Its clients lose their connections, and what they asked."""
        peer = self._peer("ingress", 0)
        self.ingress = self._new_ingress()
        self.asks.clear()
        links = [*self.engine_links.values(), *self.tokenizer_links.values()]
        for link in [*links, *self.text_links.values()]:
            link.replace(link.binder, self._ingress_side(peer), self.draw)

    def scheduler_dies(self, e: int) -> None:
        peer = self._peer("scheduler", 0, e)
        self.schedulers[e] = Scheduler(self.settings, e)
        link = self.engine_links[e]
        link.replace(link.connector, self._scheduler_side(peer), self.draw)
        for i in self.detokenizers:
            link = self.token_links[e, i]
            link.replace(link.binder, self._bound_side(peer), self.draw)
        self._start_worker(e)

    def worker_dies(self, e: int) -> None:
        self.schedulers[e].worker_down(self.worker_peers[e])
        self.workers[e] = Worker()
        self.absent.add(e)
        self.most_absent = max(self.most_absent, len(self.absent))

    def worker_starts(self, e: int) -> None:
        """A start takes longer than the messages that follow from the death."""
        link = self.engine_links[e]
        unsent = bool(self.schedulers[e].for_ingress()) or any(self.ingress.engines.frames())
        if e in self.absent and not (unsent or link.binder.inbox or link.connector.inbox):
            self._start_worker(e)

    def tokenizer_dies(self, i: int) -> None:
        self.tokenizers[i] = TokenizeQueue(encode, no_grammars)
        link = self.tokenizer_links[i]
        link.replace(link.connector, self._tokenizer_side(i), self.draw)

    def detokenizer_dies(self, i: int) -> None:
        self.detokenizers[i] = Detokenizer(VOCABULARY)
        peer = self._peer("detokenizer", i)
        text = self.text_links[i]
        text.replace(text.connector, self._text_side(i, peer), self.draw)
        for e in self.schedulers:
            token = self.token_links[e, i]
            token.replace(token.connector, self._token_side(i, peer, e), self.draw)
            token.closed = True

    def _new_ingress(self) -> Ingress:
        self._numbers += 1
        return Ingress(
            incarnation=self._numbers,
            limits=Limits(LETTERS, MAX_MODEL_LEN, 1 << 20),
            max_pending_requests=1000,
            max_num_batched_tokens=self.settings.max_num_batched_tokens,
            about=About("0", "letters"),
            draw_seed=lambda: 0,
            clock=lambda: 0,
        )

    def _start_worker(self, e: int) -> None:
        self.absent.discard(e)
        peer = self.worker_peers[e] = self._peer("gpu_worker", 0, e)
        self.workers[e] = Worker()
        self.schedulers[e].worker_up(peer)
        num_blocks = -(-MAX_MODEL_LEN // 4) + self.draw.choice([0, 4, 60])
        self.schedulers[e].group_ready(peer, GroupReady(num_blocks, 4))

    def verdict(self) -> None:
        """The supervisor tells of the next crash."""
        if self.verdicts:
            self.crashed(self.verdicts.popleft())

    def crashed(self, peer: Peer) -> None:
        """The supervisor says that the service died by itself."""
        self.crashes += 1
        self.ingress.quarantine.crashed(peer)

    # Clients ------------------------------------------------------------------------------------

    def say(self, client: bytes, message: dict[str, Any]) -> None:
        self.ingress.receive(client, msgspec.msgpack.encode(message))

    def ask(self, client: bytes, ask: Ask, prompt: dict[str, Any]) -> None:
        self.asks.setdefault(client, {})[ask.id] = ask
        self.say(
            client,
            {
                "type": "generate",
                "id": ask.id,
                "sampling": ask.sampling,
                "stream": ask.stream,
                "resume_token_ids": ask.resumed,
                **prompt,
            },
        )

    def _hear(self, client: bytes, messages: list[ServerMessage]) -> None:
        for message in messages:
            assert isinstance(message, Accepted | Delta | Finish | Error)
            assert message.id is not None
            ask = self.asks[client][message.id]
            assert not ask.ended, "a second end"
            ask.heard.append(message)
            if isinstance(message, Finish | Error):
                ask.check()
                if isinstance(message, Error) and message.code == "poisoned":
                    assert self.crashes >= 2, "it died twice with nothing else in hand"
                self.ended.append(ask)
                del self.asks[client][message.id]

    # The end ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Runs until nothing happens, then checks that all has ended and nothing is left."""
        for _ in range(3000):
            for link in self.links:
                link.make()
            busy = [
                link.deliver(end) for link in self.links for end in (link.binder, link.connector)
            ]
            self.ingress_works()
            for i in self.tokenizers:
                self.tokenizer_works(i)
            self.verdict()
            for e in self.schedulers:
                self.worker_starts(e)
                self.scheduler_works(e)
                busy.append(self.worker_works(e))
            for i in self.detokenizers:
                self.detokenizer_works(i)
            if not any(busy) and not any(self.asks.values()):
                break
        left = [ask for asks in self.asks.values() for ask in asks.values()]
        assert not left, f"without an end: {left[:3]}"
        for _ in range(3):
            for e in self.schedulers:
                self.scheduler_works(e)
            for link in self.links:
                for end in (link.binder, link.connector):
                    while link.deliver(end):
                        pass
            for e in self.schedulers:
                while self.worker_works(e):
                    pass
        assert self.ingress.stats.requests == 0
        assert not self.ingress.engines.all_given()
        assert not self.ingress.quarantine.suspects.records
        assert not self.ingress.tokenizers.suspects.records
        for scheduler in self.schedulers.values():
            stats = scheduler.stats()
            assert (stats.running, stats.waiting, stats.records, stats.blocks_used) == (0, 0, 0, 0)
        assert all(core.stats().requests == 0 for core in self.detokenizers.values())
        assert all(queue.idle for queue in self.tokenizers.values())
        assert all(
            not self.ingress.tokenizers.in_hand(link.connector.peer).uids
            for link in self.tokenizer_links.values()
        )
