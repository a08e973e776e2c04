"""How much work an engine has."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.services.ingress.requests import Request


def work(request: Request, to_compute: int) -> int:
    """The tokens that a request costs an engine: those whose keys and values are `to_compute`, and
    those that it may still generate."""
    return to_compute + request.sampling.max_tokens - request.output.num_tokens


@dataclass(slots=True)
class _Part:
    """One request's part of the load."""

    request: Request
    to_compute: int
    known: int  # output tokens when the engine was given the request
    counted: int = 0  # tokens that count in `Load.tokens`


class Load:
    """The work of all requests that one engine has.

    Attributes:
        tokens: the sum of `work` at the latest `weigh`, and of requests that came since. It costs
            nothing that requests go on.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._parts: dict[int, _Part] = {}

    def add(self, request: Request, to_compute: int) -> None:
        part = _Part(request, to_compute, request.output.num_tokens)
        self._parts[request.uid] = part
        self._count(part)

    def remove(self, uid: int) -> None:
        self.tokens -= self._parts.pop(uid).counted

    def weigh(self) -> None:
        """Counts anew: of a request that has new output all tokens before are computed."""
        for part in self._parts.values():
            self.tokens -= part.counted
            self._count(part)

    def _count(self, part: _Part) -> None:
        request = part.request
        to_compute = part.to_compute if request.output.num_tokens == part.known else 0
        part.counted = work(request, to_compute)
        self.tokens += part.counted
