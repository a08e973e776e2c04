"""Decodes what clients send, hostile bytes included: a message of the protocol, or the `Error`
that answers the frame.

Nothing here raises, whatever the bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import msgspec

from nanovllm.protocol import ClientMessage, Error, ErrorCode, Generate
from nanovllm.wording import key_and_reason

T = TypeVar("T")

MAX_ID_BYTES = 128
MAX_KWARGS_BYTES = 64 << 10
MAX_TOOLS_BYTES = 1 << 20
# Shallow enough to be encoded again.
MAX_DEPTH = 32
# An error says what is wrong without giving all of it back.
MAX_REASON_CHARS = 300
# The first byte of a MessagePack map: fixmap, map 16, map 32.
MAP_TYPES = {bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF)}
FRAMING = "a ZeroMQ message is one frame with one MessagePack map"


class Limits(NamedTuple):
    """What the model and the settings allow."""

    vocab_size: int
    max_model_len: int
    max_message_bytes: int


class _Outline(msgspec.Struct):
    """The keys that are checked before a message is decoded in full."""

    id: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    chat_template_kwargs: msgspec.Raw = msgspec.Raw()


_outline = msgspec.msgpack.Decoder(_Outline)
_str = msgspec.msgpack.Decoder(str)
_any = msgspec.msgpack.Decoder()
_raw = msgspec.msgpack.Decoder(msgspec.Raw)
_items = msgspec.msgpack.Decoder(dict[str, msgspec.Raw] | list[msgspec.Raw])
_message: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)


def parse(frame: bytes | None, limits: Limits) -> ClientMessage | Error:
    """Decodes one message and checks every range of the protocol; an Error says what is wrong.

    Args:
        frame: None for a ZeroMQ message that was not one frame.
        limits: what a request may be.
    """
    if frame is None:
        return _invalid(None, f"not one frame: {FRAMING}")
    if len(frame) > limits.max_message_bytes:
        return _invalid(
            None,
            f"a frame of {len(frame)} bytes is longer than max_message_bytes"
            f" ({limits.max_message_bytes})",
        )
    if frame[:1] not in MAP_TYPES:
        value = _decode(_raw, frame)
        reason = "not MessagePack" if isinstance(value, str) else "not a map"
        return _invalid(None, f"{reason}: {FRAMING}")
    outline = _decode(_outline, frame)
    if isinstance(outline, str):
        return _invalid(None, outline)
    for key, raw, most in (
        ("tools", outline.tools, MAX_TOOLS_BYTES),
        ("chat_template_kwargs", outline.chat_template_kwargs, MAX_KWARGS_BYTES),
    ):
        if memoryview(raw).nbytes > most:
            return _invalid(_readable_id(outline), f"{key}: longer than {most} bytes")
    message = _decode(_message, frame)
    if isinstance(message, str):
        return _invalid(_readable_id(outline), message)
    if isinstance(message, Generate):
        return _checked(message, limits)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T | str:
    """The decoded value, or (never a T here) the reason why there is none."""
    try:
        return decoder.decode(frame)
    except RecursionError:
        return "nested too deeply"
    except UnicodeDecodeError as error:
        where = _key_of_broken_text(frame).lstrip(".")
        reason = f"not valid UTF-8: {error.reason}"
        return _naming_the_key(f"{reason} - at `$.{where}`" if where else reason)
    except ValueError as error:  # msgspec's own, numbers out of range
        return _naming_the_key(str(error))


def _key_of_broken_text(value: bytes | msgspec.Raw, levels: int = 3) -> str:
    """The path of the first value that is not valid UTF-8, as `.sampling.stop[1]`: no deeper than
    the protocol's own keys. Empty if it is a key of `value`, or `value` itself."""
    try:
        items = _items.decode(value)
    except (ValueError, RecursionError):
        return ""
    named = (
        ((f".{key}", item) for key, item in items.items())
        if isinstance(items, dict)
        else ((f"[{index}]", item) for index, item in enumerate(items))
    )
    for name, item in named:
        try:
            _any.decode(item)
        except UnicodeDecodeError:
            return name + (_key_of_broken_text(item, levels - 1) if levels > 1 else "")
        except (ValueError, RecursionError):
            continue  # a key that comes again behind the broken text
    return ""


def _naming_the_key(reason: str) -> str:
    """msgspec's "Expected `int` … - at `$.sampling.seed`", with the key in front."""
    reason = ": ".join(filter(None, key_and_reason(reason)))
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[:MAX_REASON_CHARS] + "…"
    return reason


def _readable_id(outline: _Outline) -> str | None:
    try:
        return _str.decode(outline.id)
    except ValueError:
        return None


def _invalid(request_id: str | None, reason: str, code: ErrorCode = "invalid_request") -> Error:
    return Error(id=request_id, code=code, message=reason)


def _checked(ask: Generate, limits: Limits) -> Generate | Error:
    """Checks the rules that types cannot express."""
    for key, name in (("id", ask.id), ("client", ask.client or "")):
        if len(name.encode()) > MAX_ID_BYTES:
            return _invalid(ask.id, f"{key}: longer than {MAX_ID_BYTES} bytes")
    prompts = (ask.prompt, ask.prompt_token_ids, ask.messages)
    if sum(prompt is not None for prompt in prompts) != 1:
        return _invalid(
            ask.id, "exactly one of prompt, prompt_token_ids and messages must be given"
        )
    if ask.sampling.min_tokens > ask.sampling.max_tokens:
        most = ask.sampling.max_tokens
        return _invalid(ask.id, f"sampling.min_tokens: more than max_tokens ({most})")
    if ask.sampling.structured_outputs is not None and ask.sampling.ignore_eos:
        reason = "sampling.ignore_eos: not beside structured_outputs, which say where to end"
        return _invalid(ask.id, reason)
    if wrong := _wrong_in_chat(ask):
        return _invalid(ask.id, wrong)
    prompt_length = len(ask.prompt_token_ids or ())
    longest = limits.max_model_len
    if prompt_length >= longest:
        reason = (
            f"prompt_token_ids: {prompt_length} tokens; the prompt must be shorter than"
            f" max_model_len ({longest})"
        )
        return _invalid(ask.id, reason, "context_length_exceeded")
    # A prompt has a token at least, also where it has not been tokenized yet.
    if max(prompt_length, 1) + len(ask.resume_token_ids) > longest:
        reason = (
            f"resume_token_ids: {len(ask.resume_token_ids)} tokens and the prompt are more than"
            f" max_model_len ({longest})"
        )
        return _invalid(ask.id, reason, "context_length_exceeded")
    for key, listed in (
        ("stop_token_ids", ask.sampling.stop_token_ids),
        ("allowed_token_ids", ask.sampling.allowed_token_ids or []),
    ):
        if len(listed) > limits.vocab_size:
            reason = f"{len(listed)} token ids, and the vocabulary has {limits.vocab_size}"
            return _invalid(ask.id, f"sampling.{key}: {reason}")
    for key, ids in (
        ("prompt_token_ids", ask.prompt_token_ids),
        ("resume_token_ids", ask.resume_token_ids),
        ("sampling.stop_token_ids", ask.sampling.stop_token_ids),
        ("sampling.logit_bias", ask.sampling.logit_bias),
        ("sampling.allowed_token_ids", ask.sampling.allowed_token_ids),
        (
            "sampling.bad_words",
            [i for w in ask.sampling.bad_words if isinstance(w, list) for i in w],
        ),
        ("reasoning", ask.reasoning and [ask.reasoning.open, ask.reasoning.close]),
    ):
        if ids and max(ids) >= limits.vocab_size:
            reason = f"{key}: {max(ids)} is not below the vocabulary size ({limits.vocab_size})"
            return _invalid(ask.id, reason)
    return ask


def _wrong_in_chat(ask: Generate) -> str | None:
    """The reason why the arguments of the chat template are refused, or None."""
    for key, value in (
        ("messages", ask.messages),
        ("tools", ask.tools),
        ("chat_template_kwargs", ask.chat_template_kwargs),
        ("continue_final_message", ask.continue_final_message or None),
    ):
        if value is not None and ask.messages is None:
            return f"{key}: goes with messages only"
        if value is not None and not _is_plain(value):
            return (
                f"{key}: only maps with string keys, lists, strings, numbers, booleans and nil, at"
                f" most {MAX_DEPTH} deep"
            )
    for index, message in enumerate(ask.messages or ()):
        role = message.get("role")
        if not isinstance(role, str) or not role:
            return f"messages[{index}].role: {'a string' if 'role' in message else 'missing'}"
    return None


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether JSON could express the value: no extension types, no bytes, only strings as keys."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, list):
        return all(_is_plain(v, depth + 1) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
