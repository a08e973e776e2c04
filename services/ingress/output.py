"""One request's output, joined from all attempts: each token and character once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import cast

import msgspec

from nanovllm.messages import Decoded, PromptPart, TokenLogprobs, unpack, unpack_list
from nanovllm.protocol import Delta, Logprobs, PromptLogprobs

_TOKEN = struct.Struct("<i")
# (token id, logprob) in MessagePack, each field behind the byte that tells its type.
_PAIR = [
    ("array", "u1"),
    ("int32", "u1"),
    ("token_id", ">i4"),
    ("float32", "u1"),
    ("logprob", ">f4"),
]
# What the logprobs of a token take beside their bytes, roughly.
_LOGPROBS_BYTES = 256


class Output:
    """Joins `Decoded` messages, which may come twice, overlap, or be lost.

    Args:
        resumed: int32, the output tokens that the client brought.
        with_logprobs: whether the client asked for logprobs.

    Attributes:
        tokens: int32, all output tokens known, the resumed ones first.
    """

    __slots__ = (
        "_answer_at",
        "_answer_told",
        "_logprobs",
        "_prompt_parts",
        "_resumed",
        "_sent",
        "_text",
        "_text_end",
        "_with_logprobs",
        "tokens",
    )

    def __init__(self, resumed: bytes, with_logprobs: bool) -> None:
        self.tokens = bytearray(resumed)
        self._resumed = len(resumed) // _TOKEN.size
        self._sent = self._resumed
        # The number of characters of the text so far. None: not known yet, since only the
        # detokenizer knows the text of resumed tokens. The first message tells.
        self._text_end = None if resumed else 0
        self._with_logprobs = with_logprobs
        # The characters of the text before the answer, once the answer has begun and until `take`
        # has told it.
        self._answer_at: int | None = None
        self._answer_told = False
        # Log-probabilities of the prompt, until `take` has told them.
        self._prompt_parts: Sequence[PromptPart] = ()
        # Text and logprobs that `take` has not returned yet.
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // _TOKEN.size

    def add(self, decoded: Decoded) -> bool:
        """Adds the new tokens and text of `decoded`. Returns False, and adds nothing, if output
        before it is missing, or if an array in it is torn."""
        text_end = self._text_end
        if text_end is None:
            text_end = decoded.text_offset
        had_tokens = len(self.tokens) // 4 - decoded.token_offset
        had_text = text_end - decoded.text_offset
        if had_tokens < 0 or had_text < 0 or len(decoded.token_ids) % 4:
            return False
        tokens = decoded.token_ids[4 * had_tokens :] if had_tokens else decoded.token_ids
        text = decoded.text[had_text:] if had_text else decoded.text
        self.tokens += tokens
        self._text_end = text_end + len(text)
        if text:
            self._text.append(text)
        if decoded.prompt_parts and not had_tokens and not self._sent:
            self._prompt_parts = decoded.prompt_parts
        if decoded.answer_at is not None and not self._answer_told:
            self._answer_at = decoded.answer_at
        if self._with_logprobs and tokens:
            self._logprobs += decoded.logprobs[-(len(tokens) // 4) :]
        return True

    def take(self, request_id: str) -> Delta | None:
        """The output that was not taken before, as one delta; None if there is none."""
        offset = self._sent
        tokens = self._tokens_from(offset)
        if not tokens and not self._text:
            return None
        self._sent = offset + len(tokens)
        delta = Delta(
            id=request_id,
            offset=offset,
            token_ids=tokens,
            text=self._take_text(),
            logprobs=self._take_logprobs(),
        )
        if self._answer_at is not None:
            before = (self._text_end or 0) - len(delta.text)
            delta.answer_at = max(0, self._answer_at - before)
            self._answer_at = None
            self._answer_told = True
        if self._prompt_parts:
            delta.prompt_logprobs = _public_prompt(self._prompt_parts)
            self._prompt_parts = ()
        return delta

    def take_all(self, request_id: str) -> Delta:
        """Like `take`, but an empty delta if there is no new output."""
        return self.take(request_id) or Delta(
            id=request_id,
            offset=self._sent,
            token_ids=[],
            text="",
            logprobs=self._take_logprobs(),
        )

    def _tokens_from(self, offset: int) -> list[int]:
        count = len(self.tokens) // 4 - offset
        if count == 1:
            return list(_TOKEN.unpack_from(self.tokens, 4 * offset))
        return list(struct.unpack_from(f"<{count}i", self.tokens, 4 * offset))

    def _take_text(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text

    def _take_logprobs(self) -> Logprobs | msgspec.UnsetType:
        if not self._with_logprobs:
            return msgspec.UNSET
        logprobs = [_public(entry) for entry in self._logprobs]
        self._logprobs.clear()
        return logprobs


def size_of(decoded: Decoded) -> int:
    """How many bytes it takes to keep the output of `decoded`, roughly."""
    size = len(decoded.token_ids) + len(decoded.text)
    if decoded.logprobs:
        size += sum(_LOGPROBS_BYTES + 2 * len(entry.values) for entry in decoded.logprobs)
    if decoded.prompt_parts:
        size += sum(4 * len(part.values) for part in decoded.prompt_parts)
    return size


def _public_prompt(parts: Sequence[PromptPart]) -> PromptLogprobs:
    """In MessagePack: objects of a long prompt's entries, a million, would take half a second."""
    import numpy as np  # only here: few requests ask for these, see nanovllm.messages

    pair = np.dtype(_PAIR)
    tokens = 1
    encoded = [b"\xc0"]  # nil, for the first token
    for part in parts:
        token_ids = unpack(part.token_ids).reshape(-1, part.width)
        pairs = np.empty(token_ids.shape, dtype=pair)
        pairs["array"], pairs["int32"], pairs["float32"] = 0x92, 0xD2, 0xCA
        pairs["token_id"] = token_ids
        pairs["logprob"] = np.frombuffer(part.values, dtype="<f4").reshape(-1, part.width)
        layout = [("array", "u1"), ("length", ">u2"), ("pairs", pair, (part.width,))]
        entries = np.empty(len(pairs), dtype=layout)
        entries["array"], entries["length"] = 0xDC, part.width
        entries["pairs"] = pairs
        encoded.append(entries.tobytes())
        tokens += len(entries)
    raw = msgspec.Raw(b"\xdd" + tokens.to_bytes(4, "big") + b"".join(encoded))
    return cast(PromptLogprobs, raw)


def _public(entry: TokenLogprobs) -> list[tuple[int, float]]:
    values = struct.unpack(f"<{len(entry.values) // 4}f", entry.values)
    return list(zip(unpack_list(entry.token_ids), values, strict=True))
