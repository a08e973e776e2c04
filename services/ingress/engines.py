"""All engines: which one gets a request, and where the requests of one that is gone go."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nanovllm.messages import Engines, EngineState, IngressToScheduler
from nanovllm.services.ingress.engine import Engine
from nanovllm.services.ingress.load import work
from nanovllm.services.ingress.requests import Request
from nanovllm.transport.links import Peer

# Between two requests that are routed, others go on: all loads are counted anew once an engine has
# got so large a share of the requests there are.
WEIGHED_SHARE = 1 / 8
# A request goes to the engine that has most of it cached, unless with the request that engine would
# have more than so many times the load that the least loaded engine would have.
CLEARLY_MORE = 2.0


class EnginePool:
    """The engines by number, as their schedulers connect.

    Args:
        max_num_batched_tokens: the token budget of an engine's step.

    Attributes:
        by_number: the engines.
        told: what detokenizers are to know.
        reserved: an engine that has one request alone; None: there is no such engine.
        halted: whether the other engines are given nothing meanwhile.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.by_number: dict[int, Engine] = {}
        self.told = Engines({})
        self.reserved: Engine | None = None
        self.halted = False
        self._max_num_batched_tokens = max_num_batched_tokens
        self._stopping: set[int] = set()  # engines whose requests are to be moved
        self._routed = 0  # requests since all loads were counted

    @property
    def ready(self) -> bool:
        """Whether a request could start now."""
        return any(engine.ready for engine in self.by_number.values())

    def of(self, peer: Peer) -> Engine | None:
        """The engine of this incarnation of a scheduler; None if there is no link to it."""
        engine = self.by_number.get(peer.engine)
        return engine if engine is not None and engine.peer == peer else None

    # Engines come and go ------------------------------------------------------------------------

    def up(self, peer: Peer) -> list[Request]:
        """A connection to a scheduler was made: see `Engine.up`."""
        engine = self.by_number.get(peer.engine)
        if engine is None:
            engine = self.by_number[peer.engine] = Engine(peer.engine, self._max_num_batched_tokens)
        return engine.up(peer)

    def stop(self, number: int, leaves: bool) -> list[Request]:
        """The engine is about to be stopped, for good if it `leaves`. Returns the requests of an
        engine that has left already."""
        self._stopping.add(number)
        if (engine := self.by_number.get(number)) is None:
            return []
        engine.stops, engine.leaves, engine.fresh = True, leaves, False
        return self.down(engine) if engine.peer is None else []

    def forget(self, number: int) -> list[Request]:
        """The engine has left for good if it is not connected, and else when its connection ends.
        Returns the requests of an engine that has left."""
        if (engine := self.by_number.get(number)) is None:
            return []
        engine.leaves = True
        return self.down(engine) if engine.peer is None else []

    def vacated(self) -> list[int]:
        """The engines about to be stopped from which no more requests can be moved; each once."""
        if not self._stopping:
            return []
        others = {number for number, engine in self.by_number.items() if not engine.stops}
        vacated = [
            number
            for number in self._stopping
            if number not in self.by_number or not (self.by_number[number].given and others)
        ]
        self._stopping.difference_update(vacated)
        return vacated

    def down(self, engine: Engine) -> list[Request]:
        """The connection to the engine's scheduler is gone. Returns the requests of an engine that
        has left for good."""
        engine.down()
        if not engine.leaves:
            return []
        self.by_number = {n: e for n, e in self.by_number.items() if e is not engine}
        self._tell()
        given = list(engine.given.values())
        for request in given:
            engine.end(request)
        return given

    def state(self, engine: Engine, state: EngineState) -> None:
        engine.state(state)
        self._tell()

    def take_strays(self, stays: Callable[[int, int], bool]) -> list[Request]:
        """Takes their requests from the engines that are gone, if another engine is ready.

        Args:
            stays: whether the request (its uid) of an engine (its number) is to stay.
        """
        if not self.ready:
            return []
        strays = [
            request
            for number, engine in self.by_number.items()
            if not engine.ready
            for request in engine.given.values()
            if not stays(request.uid, number)
        ]
        for request in strays:
            self.end(request)
        return strays

    def for_one_alone(self) -> Engine | None:
        """The engine that is best to have one request alone: one that has just started and was
        given nothing; else one that will be so; else the one with the fewest requests."""

        def rank(engine: Engine) -> tuple[int, bool, int]:
            reserved = engine is self.reserved
            if engine.fresh:
                kind = 0
            elif engine.ready:
                kind = 1 if reserved else 3
            else:
                kind = 2
            return kind, not reserved, len(engine.given)

        return min(self.by_number.values(), key=rank, default=None)

    def reserve(self, engine: Engine, alone: Request, halt: bool) -> list[Request]:
        """From now on `engine` is given no other request, and with `halt` no engine is. Takes back
        and returns the requests that are in the way."""
        self.reserved, self.halted = engine, halt
        given = self.all_given() if halt else engine.given.values()
        others = [request for request in given if request is not alone]
        for request in others:
            self.end(request)
        return others

    def release(self) -> None:
        """No engine has a request alone any more."""
        self.reserved, self.halted = None, False

    # Requests -----------------------------------------------------------------------------------

    def route(self, request: Request) -> Engine | None:
        """The engine that is to be given the request now; None if none takes it."""
        if self.halted:
            return None
        engines = self.by_number.values()
        takers = [e for e in engines if e is not self.reserved and e.takes(request)]
        if not takers or len(engines) == 1:
            return takers[0] if takers else None
        self._weigh()
        request.name_blocks(takers[0].block_size)
        lacks = [engine.lacks(request) for engine in takers]
        loads = [e.load.tokens + work(request, lack) for e, lack in zip(takers, lacks, strict=True)]
        _, load, index = min(zip(lacks, loads, range(len(takers)), strict=True))
        if load > CLEARLY_MORE * min(loads):
            index = loads.index(min(loads))
        return takers[index]

    def end(self, request: Request) -> None:
        """Takes the request back from the engine that has it, if one has."""
        if request.engine is not None:
            request.engine.end(request)

    def all_given(self) -> list[Request]:
        """The requests that engines have."""
        return [r for engine in self.by_number.values() for r in engine.given.values()]

    # Sending ------------------------------------------------------------------------------------

    def frames(self) -> Iterator[tuple[Peer, list[IngressToScheduler]]]:
        """The next frame for each scheduler for which there is one. Call `sent` for each frame that
        was sent."""
        for engine in self.by_number.values():
            if engine.peer is not None and (frame := engine.frame()):
                yield engine.peer, frame

    def sent(self, peer: Peer, frame: list[IngressToScheduler]) -> None:
        self.by_number[peer.engine].sent(frame)

    def _tell(self) -> None:
        endpoints = {n: e.endpoint for n, e in self.by_number.items() if e.endpoint}
        if endpoints != self.told.endpoints:
            self.told = Engines(endpoints)

    def _weigh(self) -> None:
        self._routed += 1
        engines = self.by_number.values()
        if self._routed > WEIGHED_SHARE * sum(len(engine.given) for engine in engines):
            self._routed = 0
            for engine in engines:
                engine.load.weigh()
