"""Chat messages into text, by the checkpoint's chat template."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from nanovllm.protocol import ChatMessage

# What steers the rendering itself, and is not the client's to set.
RESERVED: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "messages",
        "return_assistant_tokens_mask",
        "tokenize",
    }
)
LONGEST_REASON: Final = 500


class ChatTemplateError(ValueError):
    """The template does not take these messages or arguments; the message says why."""


class ChatTemplate:
    """A Jinja template, run in transformers' sandbox.

    Args:
        source: the template.
        special_tokens: variables that the template finds besides the request's: `eos_token` …
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self._source = source
        self._special_tokens = special_tokens

    def render(self, messages: list[ChatMessage], arguments: dict[str, Any]) -> str:
        """The prompt's text, the generation prompt included.

        Args:
            messages: one or more.
            arguments: the request's variables for the template.

        Raises:
            ChatTemplateError: whatever goes wrong in the template.
        """
        if reserved := sorted(RESERVED.intersection(arguments)):
            raise ChatTemplateError(f"chat_template_kwargs may not hold {', '.join(reserved)}")
        # Two thirds of a tokenizer's start, which those who send texts do not wait for.
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [msgspec.structs.asdict(message) for message in messages]
        try:
            rendered, _ = render_jinja_template(
                conversations=[conversation],
                chat_template=self._source,
                add_generation_prompt=True,
                **{**self._special_tokens, **arguments},
            )
            text: str = rendered[0]
        except Exception as error:  # a template may raise anything; it concerns this request alone
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            raise ChatTemplateError(f"the chat template failed: {reason}") from error
        return text
