"""Logprobs of tokens, as chats and completions write them."""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import Final

from nanovllm.protocol import Logprobs
from nanovllm.services.http.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    LikelyToken,
    TokenLogprob,
)

# JSON has no infinity: OpenAI's number for a token that cannot come.
LOWEST: Final = -9999.0

_utf8 = getincrementaldecoder("utf-8")


def chat_logprobs(entries: Logprobs, token_text: dict[int, bytes]) -> ChatLogprobs:
    """
    Args:
        entries: an entry a token, the chosen token first.
        token_text: of each token id its bytes.
    """
    content: list[TokenLogprob] = []
    for (token_id, logprob), *likeliest in entries:
        raw = token_text.get(token_id, b"")
        content.append(
            TokenLogprob(
                raw.decode(errors="replace"),
                max(logprob, LOWEST),
                list(raw),
                [_likely(token_text.get(other, b""), its) for other, its in likeliest],
            )
        )
    return ChatLogprobs(content)


def _likely(raw: bytes, logprob: float) -> LikelyToken:
    return LikelyToken(raw.decode(errors="replace"), max(logprob, LOWEST), list(raw))


class CompletionLogprobsWriter:
    """Logprobs of one completion, in as many pieces as it comes.

    Args:
        token_text: of each token id its bytes.
        silent: the tokens that add nothing to the text.
    """

    def __init__(self, token_text: dict[int, bytes], silent: frozenset[int]) -> None:
        self._token_text = token_text
        self._silent = silent
        self._decoder = _utf8("replace")
        self._offset = 0

    def write(self, entries: Logprobs) -> CompletionLogprobs:
        written = CompletionLogprobs([], [], [], [])
        for (token_id, logprob), *likeliest in entries:
            raw = self._token_text.get(token_id, b"")
            written.tokens.append(_name(raw))
            written.token_logprobs.append(max(logprob, LOWEST))
            written.top_logprobs.append(
                {
                    _name(self._token_text.get(other, b"")): max(its, LOWEST)
                    for other, its in likeliest
                }
            )
            written.text_offset.append(self._offset)
            if token_id not in self._silent:
                self._offset += len(self._decoder.decode(raw))
        return written


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
