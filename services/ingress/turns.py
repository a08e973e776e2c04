"""Whose turn it is: sessions take turns, and within a session its clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanovllm.services.ingress.requests import Request

if TYPE_CHECKING:
    from nanovllm.services.ingress.sessions import Session


class Turns:
    """Requests that wait for a tokenizer or an engine.

    A session's turn is one request, and so is a client's. So the first request of a client waits
    for one request of each other client of its session at most, and each of these for one of each
    other session, however many requests they have. A client's own requests keep their order.
    """

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        # In the order of the turns; none is empty.
        self._sessions: OrderedDict[Session, OrderedDict[str, OrderedDict[int, Request]]] = (
            OrderedDict()
        )

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, uid: int) -> bool:
        return uid in self._requests

    def add(self, request: Request) -> None:
        """Adds a request behind the others of its client."""
        self._requests[request.uid] = request
        clients = self._sessions.setdefault(request.session, OrderedDict())
        clients.setdefault(request.client, OrderedDict())[request.uid] = request

    def put_back(self, requests: Iterable[Request]) -> None:
        """Adds requests among the others of their clients, in the order in which they came."""
        changed: set[tuple[Session, str]] = set()
        for request in requests:
            self.add(request)
            changed.add((request.session, request.client))
        for session, client in changed:
            clients = self._sessions[session]
            clients[client] = OrderedDict(sorted(clients[client].items()))

    def first(self) -> Request | None:
        """The request whose turn it is."""
        for clients in self._sessions.values():
            for requests in clients.values():
                return next(iter(requests.values()))
        return None

    def take(self, request: Request) -> None:
        """Removes a request that has had its turn: its session and its client come last now."""
        self.discard(request.uid)
        clients = self._sessions.get(request.session)
        if clients is not None:
            self._sessions.move_to_end(request.session)
            if request.client in clients:
                clients.move_to_end(request.client)

    def discard(self, uid: int) -> None:
        """Removes a request that is not to wait any more, if it does."""
        request = self._requests.pop(uid, None)
        if request is None:
            return
        clients = self._sessions[request.session]
        del clients[request.client][uid]
        if not clients[request.client]:
            del clients[request.client]
        if not clients:
            del self._sessions[request.session]
