"""The unfinished requests, and the bounds on their number and bytes, of all and of one session."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nanovllm.messages import Chat, Tokenize, Tokenized, pack
from nanovllm.protocol import Generate, Sampling
from nanovllm.services.ingress.output import Output
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.sessions import Session

# Bytes of all unfinished requests together, which are held whole.
MAX_REQUEST_BYTES = 1 << 30
MAX_UID = (1 << 63) - 1  # an int64

_encode = msgspec.msgpack.Encoder().encode


class PendingRequests:
    """All unfinished requests.

    Args:
        incarnation: this process's; its uids count on from there, in the upper 32 bits.
        max_pending_requests: how many requests are held at most.
        draw_seed: draws the seed of a request that brings none.

    Attributes:
        by_uid: the requests.
        finished: how many requests were forgotten so far.
        last_uid: the latest request's.
    """

    def __init__(
        self, incarnation: int, max_pending_requests: int, draw_seed: Callable[[], int]
    ) -> None:
        self.by_uid: dict[int, Request] = {}
        self.finished = 0
        self.last_uid = incarnation << 32
        self._max_pending_requests = max_pending_requests
        self._draw_seed = draw_seed
        self._bytes = 0

    def overload(self, session: Session, size: int) -> str | None:
        """Why there is no room for a request of `size` bytes; None if there is room."""
        count, most = len(self.by_uid), self._max_pending_requests
        if not _has_room(len(session.requests), 1, count, most):
            return (
                f"of max_pending_requests ({most}) {count} are held, {len(session.requests)} of"
                " them for this session; try later"
            )
        if not _has_room(session.request_bytes, size, self._bytes, MAX_REQUEST_BYTES):
            return (
                f"of {MAX_REQUEST_BYTES >> 20} MiB of requests {self._bytes >> 20} are held,"
                f" {session.request_bytes >> 20} of them for this session; try later"
            )
        return None

    def begin(self, session: Session, ask: Generate, size: int) -> Request:
        """Holds a client's request, whose message had `size` bytes."""
        self._hold(session, size)
        uid = self.last_uid = (self.last_uid + 1) & MAX_UID
        seed = self._draw_seed() if ask.sampling.seed is None else ask.sampling.seed
        sampling = msgspec.structs.replace(ask.sampling, seed=seed)
        resumed = pack(ask.resume_token_ids)
        request = self.by_uid[uid] = session.requests[ask.id] = Request(
            uid=uid,
            id=ask.id,
            session=session,
            client=ask.client or "",
            stream=ask.stream,
            seed=seed,
            resumed=len(ask.resume_token_ids),
            cache_salt=ask.cache_salt or "",
            sampling=sampling,
            output=Output(resumed, with_logprobs=sampling.logprobs is not None),
            size=size,
            tokenize=_tokenize(uid, ask, sampling, resumed),
        )
        return request

    def tokenized(self, request: Request, answer: Tokenized) -> None:
        """Keeps a tokenizer's answer in place of the message for it."""
        before = request.size
        request.tokenized(answer)
        self._hold(request.session, request.size - before)

    def forget(self, request: Request) -> None:
        """The request's outcome was sent, or its client has gone."""
        del self.by_uid[request.uid]
        self._hold(request.session, -request.size)
        self.finished += 1

    def _hold(self, session: Session, size: int) -> None:
        """So many bytes more count in the bounds."""
        session.request_bytes += size
        self._bytes += size


def _tokenize(uid: int, ask: Generate, sampling: Sampling, resumed: bytes) -> Tokenize:
    chat = None
    if ask.messages is not None:
        chat = _encode(
            Chat(
                ask.messages, ask.tools, ask.chat_template_kwargs or {}, ask.continue_final_message
            )
        )
    return Tokenize(
        uid=uid,
        prompt=ask.prompt,
        prompt_token_ids=None if ask.prompt_token_ids is None else pack(ask.prompt_token_ids),
        chat=chat,
        sampling=sampling,
        resumed=resumed,
        reasoning=ask.reasoning,
    )


def _has_room(held: int, more: int, by_all: int, bound: int) -> bool:
    """Whether a session that holds `held` may hold `more`: at most half of what the others leave of
    `bound`, so that there is always room for another session; or all of it, if it holds nothing."""
    left = bound - (by_all - held)
    return held + more <= (left // 2 if held else left)
