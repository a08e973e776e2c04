"""How the services here end: what is in hand is finished first."""

from __future__ import annotations

import logging
import math

from nanovllm.control import Drain, IngressStats, Report, ToSupervisor
from nanovllm.launch.children import Children
from nanovllm.names import ServiceId
from nanovllm.transport.links import BoundLink, Peer
from nanovllm.wording import counted

log = logging.getLogger(__name__)

DRAINED_ROLES = ("ingress", "http")
# How long an ingress that starts during a drain takes requests, so that the clients of the ingress
# before can submit their unfinished requests again.
RESUME_S = 5.0


class Draining:
    """Has the ingress and the HTTP servers take no new requests, and knows which have none left.

    Attributes:
        until: when what is unfinished ends; None: the services here are not to end.
        drained: those without a request.
    """

    def __init__(
        self, control: BoundLink[ToSupervisor], children: Children, timeout_s: float
    ) -> None:
        self._control = control
        self._children = children
        self._timeout_s = timeout_s
        self.until: float | None = None
        self.drained: set[ServiceId] = set()
        self._begun = False
        self._unannounced_since = math.inf

    def begin(self) -> None:
        """No new requests are taken from now on."""
        self._begun = True
        for peer in self._control.peers:  # the others are told when they connect
            if peer.role in DRAINED_ROLES:
                self._control.send(peer, [Drain(0.0)])

    def end(self, now: float, announce: bool) -> None:
        """The services here are to end; with `announce` a person is told what is waited for."""
        self.until = now + self._timeout_s
        if announce:
            log.info("stopping")
            self._unannounced_since = now
        self.begin()

    def connected(self, peer: Peer) -> None:
        if self._begun and peer.role in DRAINED_ROLES:
            self._control.send(peer, [Drain(RESUME_S)])

    def reported(self, report: Report) -> None:
        """Says once how many requests the drain waits for, if any."""
        stats = report.stats
        if not isinstance(stats, IngressStats) or report.at_s < self._unannounced_since:
            return
        if stats.requests:
            self._unannounced_since = math.inf
            log.info(
                "draining: %s unfinished, %g s at most; Ctrl-C again ends at once",
                counted(stats.requests, "request"),
                self._timeout_s,
            )

    @property
    def doors_drained(self) -> bool:
        """Whether no HTTP server has a request: none that has ended has."""
        doors = {i for i, s in self._children.of.items() if i.role == "http" and s.alive}
        return self.drained >= doors
