"""Logprobs of tokens, as chats and completions write them."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from nanovllm.protocol import Logprobs
from nanovllm.protocol import PromptLogprobs as PipelinePromptLogprobs
from nanovllm.services.http.openai.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    LikelyPromptToken,
    LikelyToken,
    PromptLogprobs,
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
        text, raw = _shown(token_text.get(token_id, b""))
        likely: list[LikelyToken] = []
        for other, its in likeliest:
            its_text, its_raw = _shown(token_text.get(other, b""))
            likely.append(LikelyToken(its_text, max(its, LOWEST), its_raw))
        content.append(TokenLogprob(text, max(logprob, LOWEST), raw, likely))
    return ChatLogprobs(content)


@lru_cache(maxsize=1 << 16)
def _shown(raw: bytes) -> tuple[str, list[int]]:
    """A token's bytes as text, and as JSON has bytes. Of the lists there are few, as garbage
    collections look at each."""
    return raw.decode(errors="replace"), list(raw)


def prompt_logprobs(
    entries: PipelinePromptLogprobs, token_text: dict[int, bytes]
) -> PromptLogprobs:
    """
    Args:
        entries: an entry a prompt token, the prompt's first; None for the first.
        token_text: of each token id its bytes.
    """
    return [
        None
        if entry is None
        else {
            token_id: LikelyPromptToken(
                max(logprob, LOWEST), token_text.get(token_id, b"").decode(errors="replace")
            )
            for token_id, logprob in entry
        }
        for entry in entries
    ]


class CompletionLogprobsWriter:
    """Logprobs of one completion, taken in as many pieces as it comes.

    Args:
        token_text: of each token id its bytes.
        silent: the tokens that add nothing to the output's text.
    """

    def __init__(self, token_text: dict[int, bytes], silent: frozenset[int]) -> None:
        self._token_text = token_text
        self._silent = silent
        self._decoder = _utf8("replace")
        self._offset = 0
        self._written = CompletionLogprobs([], [], [], [])

    def add_prompt(self, text: str, first: int, entries: PipelinePromptLogprobs) -> None:
        """Adds the prompt that the completion begins with.

        Args:
            text: the prompt's, which may lack tokens that the tokenizer puts first.
            first: the prompt's first token.
            entries: an entry a prompt token; None for the first.
        """
        ids = [entry[0][0] if entry else first for entry in entries]
        self._offset = len(text) - len(text_of(ids, self._token_text))
        for token_id, entry in zip(ids, entries, strict=True):
            self._add(token_id, entry)
            self._offset += len(self._decoder.decode(self._token_text.get(token_id, b"")))
        self._decoder.reset()
        self._offset = len(text)

    def add(self, entries: Logprobs) -> None:
        """Adds output: an entry a token, the chosen token first."""
        for entry in entries:
            token_id = entry[0][0]
            self._add(token_id, entry)
            if token_id not in self._silent:
                self._offset += len(self._decoder.decode(self._token_text.get(token_id, b"")))

    def take(self) -> CompletionLogprobs | None:
        """What was added since it was last taken; None if that is nothing."""
        written, self._written = self._written, CompletionLogprobs([], [], [], [])
        return written if written.tokens else None

    def _add(self, token_id: int, entry: list[tuple[int, float]] | None) -> None:
        written = self._written
        written.tokens.append(_name(self._token_text.get(token_id, b"")))
        written.text_offset.append(max(self._offset, 0))
        if entry is None:
            written.token_logprobs.append(None)
            written.top_logprobs.append(None)
            return
        (_, logprob), *likeliest = entry
        written.token_logprobs.append(max(logprob, LOWEST))
        written.top_logprobs.append(
            {_name(self._token_text.get(other, b"")): max(its, LOWEST) for other, its in likeliest}
        )


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def text_of(token_ids: Iterable[int], token_text: dict[int, bytes]) -> str:
    """The text of tokens, special ones included."""
    raw = b"".join(token_text.get(token_id, b"") for token_id in token_ids)
    return raw.decode(errors="replace")
