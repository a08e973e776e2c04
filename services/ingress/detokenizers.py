"""The detokenizers, and what each knows of the engines."""

from __future__ import annotations

from collections.abc import Iterator

from nanovllm.messages import Engines
from nanovllm.services.ingress.engines import EnginePool
from nanovllm.transport.links import Peer


class Detokenizers:
    """The detokenizers that are connected. Each is told which engines there are, at each change."""

    def __init__(self, engines: EnginePool) -> None:
        self._engines = engines
        self._told: dict[Peer, Engines | None] = {}

    def __bool__(self) -> bool:
        """Whether there is a detokenizer."""
        return bool(self._told)

    def up(self, peer: Peer) -> None:
        self._told[peer] = None

    def down(self, peer: Peer) -> None:
        self._told.pop(peer, None)

    def frames(self) -> Iterator[tuple[Peer, list[Engines]]]:
        """The frame for each detokenizer that does not know the latest. Call `sent` for each frame
        that was sent."""
        for peer, told in self._told.items():
            if told is not self._engines.told:
                yield peer, [self._engines.told]

    def sent(self, peer: Peer, frame: list[Engines]) -> None:
        (self._told[peer],) = frame
