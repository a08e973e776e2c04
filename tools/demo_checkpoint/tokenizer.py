"""The demo checkpoint's tokenizer: byte-level BPE of Qwen3's make, and chats as prompts."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tools.demo_checkpoint.chats import Call, Chat, Turn
from tools.demo_checkpoint.documents import Document, documents

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
SPECIAL: Final = (END_OF_TEXT, TURN_START, TURN_END)
MARKERS: Final = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
"""Single tokens that are text all the same, as in Qwen3's tokenizer."""

SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern that cuts text into words before BPE, as in the Qwen2 and Qwen3 tokenizers."""

CHAT_TEMPLATE: Final = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
MAX_MODEL_LEN: Final = 4096
VOCAB_SIZE: Final = 1280
DOCUMENTS: Final = 4000


class Rendered(NamedTuple):
    """A document's text: a prompt, and what is to be learned."""

    prompt: str
    output: str


def train_tokenizer(seed: int) -> Tokenizer:
    """Train the byte-level BPE on a sample of the text; every byte is in its alphabet."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _sample(seed),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL) - len(MARKERS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # After the vocabulary rather than before it, as Qwen has them.
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give the tokenizer its special tokens' roles and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def render(document: Document, *, thinking: bool) -> Rendered:
    """A document as text, without the token that ends a plain one.

    Args:
        document: a plain text, or a chat, of which the last turn is the output.
        thinking: whether the assistant thinks before the output.
    """
    if isinstance(document, str):
        return Rendered("", document)
    *before, last = [_message(turn, thinking) for turn in document.turns]
    prompt = _render(document, [*before], add_generation_prompt=True, enable_thinking=thinking)
    # The template knows the form of an answer. With thinking off, the prompt ends behind the empty
    # thoughts that the answer begins with.
    whole = _render(document, [*before, last])
    return Rendered(prompt, whole.removeprefix(prompt).removesuffix("\n"))


def _render(document: Chat, messages: list[dict[str, object]], **kwargs: bool) -> str:
    texts, _ = render_jinja_template(
        conversations=[messages],
        tools=list(document.tools) or None,
        chat_template=CHAT_TEMPLATE,
        **kwargs,
    )
    text: str = texts[0]
    return text


def _message(turn: Turn, thinking: bool) -> dict[str, object]:
    """The turn as requests have it."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if thinking and turn.thought:
        message["reasoning_content"] = turn.thought
    if turn.calls:
        message["tool_calls"] = [_called(call) for call in turn.calls]
    return message


def _called(call: Call) -> dict[str, object]:
    return {"type": "function", "function": call._asdict()}


def _sample(seed: int) -> Iterator[str]:
    """Text between the added tokens."""
    added = re.compile("|".join(map(re.escape, (*SPECIAL, *MARKERS))))
    for document in itertools.islice(documents(seed), DOCUMENTS):
        rendered = render(document, thinking=True)
        yield from added.split(rendered.prompt + rendered.output)
