"""Chat messages into text, by the checkpoint's chat template."""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any, Final

import msgspec

from nanovllm.messages import Chat

# What steers the rendering itself, and is not for chat_template_kwargs to set.
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
        "tools",
    }
)
LONGEST_REASON: Final = 500
RENDERER: Final = "transformers.utils.chat_template_utils"


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
        self._import: threading.Thread | None = None

    def prepare(self) -> bool:
        """Whether what `render` needs is imported. The first call begins to import that, in a
        thread: it takes a second, and longer on a busy machine or a slow disk. A service whose own
        thread imported it would give no sign of life meanwhile."""
        if self._import is None:
            self._import = threading.Thread(target=import_module, args=[RENDERER], daemon=True)
            self._import.start()
        return not self._import.is_alive()

    def render(self, chat: Chat) -> str:
        """The prompt's text. It ends with the generation prompt, or inside the last message if that
        is to be continued.

        Raises:
            ChatTemplateError: whatever goes wrong in the template.
        """
        if reserved := sorted(RESERVED.intersection(chat.template_kwargs)):
            raise ChatTemplateError(f"chat_template_kwargs: may not hold {', '.join(reserved)}")
        conversation = [_message(message, i) for i, message in enumerate(chat.messages)]
        if chat.continue_final_message and not _can_continue(conversation[-1]):
            raise ChatTemplateError(
                "continue_final_message: the last message must be the assistant's, with text"
            )
        # Two thirds of a tokenizer's start, which those who send texts do not wait for.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[conversation],
                tools=chat.tools,
                chat_template=self._source,
                add_generation_prompt=not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **{**self._special_tokens, **chat.template_kwargs},
            )
            text: str = rendered[0]
        except Exception as error:  # a template may raise anything; it concerns this request alone
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            raise ChatTemplateError(f"messages: the chat template failed: {reason}") from error
        return text


def _can_continue(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and bool(message.get("content"))


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """The message as chat templates take it: null is absent, the text parts of `content` are one
    text, a line each, and the `arguments` of a tool call are a map, empty if there are none.

    Raises ChatTemplateError on a part that is not text, and on arguments that are not JSON.
    """
    where = f"messages[{index}]"
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(content := plain.get("content"), list):
        plain["content"] = "\n".join(
            _text(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    if isinstance(calls := plain.get("tool_calls"), list):
        plain.setdefault("content", "")
        plain["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return plain


def _text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ChatTemplateError(f"{where}: only parts of type 'text' are served, not {kind!r}")
    text: str = part["text"]
    return text


def _tool_call(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str | None):
        return call
    try:
        arguments = msgspec.json.decode(function.get("arguments") or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ChatTemplateError(f"{where}.function.arguments: not a JSON object: {error}") from None
    return {**call, "function": {**function, "arguments": arguments}}
