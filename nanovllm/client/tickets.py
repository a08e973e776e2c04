"""What a client waits for: a request's output, or the answer to a ping."""

from __future__ import annotations

from collections import deque

import msgspec

from nanovllm.client.results import Completion, Delta
from nanovllm.protocol import Delta as WireDelta
from nanovllm.protocol import Finish, Generate, Logprobs, Ping, Pong


class Request:
    """One request, from its submission to its end.

    Attributes:
        deltas: output that has arrived and that its reader has not taken yet (streams only).
        completion: its whole output, once it has ended well.
        failure: why it ended otherwise.
    """

    def __init__(self, message: Generate, patient: bool) -> None:
        self.message = message
        self.deltas: deque[Delta] = deque()
        self.completion: Completion | None = None
        self.failure: Exception | None = None
        self._patient = patient
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: Logprobs = []
        self._seed: int | None = message.sampling.seed
        self._size = 0
        self._answered = False
        self._accepted_before = False

    @property
    def ended(self) -> bool:
        return self.completion is not None or self.failure is not None

    def result(self) -> Completion:
        """The output of a request that has ended. Raises what it failed with."""
        if self.failure is not None:
            raise self.failure
        if self.completion is None:
            raise RuntimeError("the request has not ended")
        return self.completion

    # The core's side ----------------------------------------------------------------------------

    def encoded(self, encoder: msgspec.msgpack.Encoder) -> bytes:
        """The request as it is to be submitted now: a stream resumes after what it has, and one
        that has nothing begins anew with the seed that it was told."""
        sampling = msgspec.structs.replace(self.message.sampling, seed=self._seed)
        message = msgspec.structs.replace(self.message, sampling=sampling)
        if self._token_ids:
            message.resume_token_ids = self._token_ids
        self._answered = False
        raw = encoder.encode(message)
        self._size = len(raw)
        return raw

    def unanswered_size(self) -> int:
        """Its size in bytes; 0 once the ingress has said anything of it."""
        return 0 if self._answered else self._size

    def waits_for_room(self) -> bool:
        """Whether `overloaded` means later. It does not mean the end of a request that was
        accepted once, and is now submitted again."""
        return self._patient or self._accepted_before

    def accept(self, seed: int) -> None:
        self._answered = self._accepted_before = True
        if self._seed is None:
            self._seed = seed

    def extend(self, delta: WireDelta) -> bool:
        """Takes new output; False if it is not what comes next."""
        if delta.offset != len(self._token_ids):
            return False
        self._answered = True
        logprobs = delta.logprobs or []
        self._token_ids += delta.token_ids
        self._texts.append(delta.text)
        self._logprobs += logprobs
        asked = self.message.sampling.logprobs is not None
        self.deltas.append(Delta(delta.text, delta.token_ids, logprobs if asked else None))
        return True

    def finish(self, finish: Finish) -> None:
        if not self.message.stream:  # it carries everything
            self._texts = [finish.text or ""]
            self._token_ids = finish.token_ids or []
            self._logprobs = finish.logprobs or []
            self._seed = self._seed if finish.seed is msgspec.UNSET else finish.seed
        asked = self.message.sampling.logprobs is not None
        self.completion = Completion(
            text="".join(self._texts),
            token_ids=self._token_ids,
            finish_reason=finish.finish_reason,
            usage=finish.usage,
            logprobs=self._logprobs if asked else None,
            seed=self._seed,
        )


class Inquiry:
    """One ping. `pong` is its answer, `failure` why none came."""

    def __init__(self, message: Ping) -> None:
        self.message = message
        self.pong: Pong | None = None
        self.failure: Exception | None = None

    @property
    def ended(self) -> bool:
        return self.pong is not None or self.failure is not None

    def result(self) -> Pong:
        """The answer. Raises what it failed with."""
        if self.failure is not None:
            raise self.failure
        if self.pong is None:
            raise RuntimeError("the ping has not been answered")
        return self.pong

    def encoded(self, encoder: msgspec.msgpack.Encoder) -> bytes:
        return encoder.encode(self.message)


Ticket = Request | Inquiry
