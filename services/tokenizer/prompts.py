"""A raw request into one in token ids, or the reason why it cannot be served."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from nanovllm.checkpoint import ModelConfig
from nanovllm.checkpoint.chat_template import ChatTemplate, ChatTemplateError
from nanovllm.checkpoint.tokenizer import load_tokenizer, read_chat_template
from nanovllm.checkpoint.tokenizer_config import TokenizerConfig
from nanovllm.messages import AnswerMarks, Chat, Refused, Tokenize, Tokenized, pack, unpack
from nanovllm.protocol import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, Reasoning
from nanovllm.vocabulary import Vocabulary, end_of_sequence

log = logging.getLogger(__name__)

_chat = msgspec.msgpack.Decoder(Chat)


class _Refusal(Exception):
    def __init__(
        self, code: Literal["invalid_request", "context_length_exceeded"], message: str
    ) -> None:
        super().__init__(message)
        self.code = code


class PromptEncoder:
    """Encodes one request at a time; keeps nothing of it.

    Args:
        tokenizer: the checkpoint's.
        chat_template: None where the checkpoint has none.
        eos: end-of-sequence ids.
        longest_entry: bytes of the vocabulary's longest token.
        vocab_size: how many token ids the model has an embedding of.
        max_model_len: tokens that prompt and output may have together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        eos: list[int],
        longest_entry: int,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._eos = eos
        self._most_bytes = max_model_len * longest_entry
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    @classmethod
    def from_checkpoint(
        cls, directory: Path, model: ModelConfig, max_model_len: int
    ) -> PromptEncoder:
        """Raises CheckpointError if the tokenizer's files cannot be used."""
        vocabulary = Vocabulary.from_checkpoint(directory)
        config = TokenizerConfig.from_checkpoint(directory)
        tokenizer = load_tokenizer(directory, config)
        special_tokens = config.special_tokens()
        if vocabulary.size > model.vocab_size:
            log.warning(
                "%s: token ids go up to %d, and the model's vocab_size is %d: prompts with a higher"
                " id are refused",
                directory / "tokenizer.json",
                vocabulary.size - 1,
                model.vocab_size,
            )
        source = read_chat_template(directory, config)
        return cls(
            tokenizer,
            None if source is None else ChatTemplate(source, special_tokens),
            list(end_of_sequence(directory, model, vocabulary)),
            vocabulary.longest_entry,
            model.vocab_size,
            max_model_len,
        )

    def prepare_for_chats(self) -> bool:
        """Whether chats can be rendered at once, see `ChatTemplate.prepare`."""
        return self._chat_template is None or self._chat_template.prepare()

    def prepared(self, request: Tokenize) -> bool:
        """Whether `encode` would answer at once."""
        return request.chat is None or self.prepare_for_chats()

    def encode(self, request: Tokenize) -> Tokenized | Refused:
        try:
            return self._encode(request)
        except _Refusal as refusal:
            return Refused(request.uid, refusal.code, str(refusal))
        except Exception:  # whatever a prompt brings about ends this request, and no other
            log.exception("request %x could not be tokenized", request.uid)
            message = "the prompt could not be tokenized"
            return Refused(request.uid, "internal", message)

    def _encode(self, request: Tokenize) -> Tokenized:
        prompt = self._prompt(request)
        ids = unpack(prompt)
        length, resumed = len(ids), len(request.resumed) // 4
        if length == 0:
            raise _Refusal("invalid_request", "the prompt is empty: it has no token")
        if (highest := int(ids.max())) >= self._vocab_size:
            token = self._tokenizer.id_to_token(highest)
            raise _Refusal(
                "invalid_request",
                f"the prompt has token id {highest} ({token!r}), which is not below the vocabulary"
                f" size ({self._vocab_size})",
            )
        if length >= self._max_model_len:
            raise _Refusal(
                "context_length_exceeded",
                f"the prompt has {length} tokens, and must be shorter than max_model_len"
                f" ({self._max_model_len})",
            )
        room = self._max_model_len - length
        if resumed > room:
            raise _Refusal(
                "context_length_exceeded",
                f"the prompt has {length} tokens and resume_token_ids {resumed}; together they must"
                f" not exceed max_model_len ({self._max_model_len})",
            )
        asked = request.sampling
        eos = [] if asked.ignore_eos else self._eos
        sampling = msgspec.structs.replace(
            asked,
            max_tokens=min(asked.max_tokens, room),
            stop_token_ids=sorted({*asked.stop_token_ids, *eos}),
            bad_words=self._bad_words(asked.bad_words),
        )
        reasoning = request.reasoning
        marks = None if reasoning is None else self._answer_marks(ids, reasoning)
        return Tokenized(request.uid, prompt, sampling, marks)

    def _bad_words(self, words: list[str | list[int]]) -> list[str | list[int]]:
        """The words in token ids: a text as it stands at a line's begin, and as after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if isinstance(word, str):
                for text in (word, " " + word.lstrip(" ")):
                    ids = tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
                    if len(ids) > MAX_BAD_WORD_TOKENS:
                        raise _Refusal(
                            "invalid_request",
                            f"sampling.bad_words: {word[:40]!r} has {len(ids)} tokens, and a bad"
                            f" word at most {MAX_BAD_WORD_TOKENS}",
                        )
                    found[ids] = None
            else:
                found[tuple(word)] = None
        if len(found) > MAX_BAD_WORDS:
            raise _Refusal(
                "invalid_request",
                f"sampling.bad_words: {len(found)} sequences of tokens, and at most {MAX_BAD_WORDS}"
                " are possible; a text can be two, at a line's begin and after a space",
            )
        return [list(ids) for ids in found if ids]

    def _answer_marks(self, prompt: NDArray[np.int32], reasoning: Reasoning) -> AnswerMarks:
        """Whether the prompt's last message ends inside reasoning, or behind. An end-of-sequence
        token ends each message before, where a user may have written `<think>`."""
        opening, closing = reasoning.open, reasoning.close
        marks = prompt[np.isin(prompt, [opening, closing, *self._eos])]
        last = int(marks[-1]) if len(marks) else None
        return AnswerMarks(opening, closing, last == opening, last == closing)

    def _prompt(self, request: Tokenize) -> bytes:
        """The prompt's token ids, as int32."""
        if request.prompt_token_ids is not None:
            return request.prompt_token_ids
        if request.prompt is not None:
            return self._tokenize(request.prompt, add_special_tokens=True)
        if request.chat is None:
            raise _Refusal("invalid_request", "the request has no prompt")
        if self._chat_template is None:
            raise _Refusal("invalid_request", "messages: this model has no chat template")
        try:
            text = self._chat_template.render(_chat.decode(request.chat))
        except ChatTemplateError as error:
            log.debug("request %x refused: %s", request.uid, error)
            raise _Refusal("invalid_request", str(error)) from None
        return self._tokenize(text, add_special_tokens=False)

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> bytes:
        size = len(text.encode())
        if size > self._most_bytes:
            raise _Refusal(
                "context_length_exceeded",
                f"the prompt has {size} bytes, and must be shorter than max_model_len"
                f" ({self._max_model_len} tokens, which hold {self._most_bytes} bytes at most)",
            )
        # As `encode`, but without offsets into the text: half the time for a long one.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return pack(encoding.ids)
