"""Text in and out: the tokenizer's decoding, stop strings, chats, characters of many bytes."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.pipeline.wire import Wire

tokenizer = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
STORY: dict[str, Any] = {
    "prompt": "Once upon a time",
    "sampling": {"temperature": 0.0, "max_tokens": 300},
}
FOREIGN = "Zoë said: 日本語のテキスト, 👩‍👩‍👧 and 😀!"


def decode(token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


def with_stops(request: dict[str, Any], *stops: str, **keys: Any) -> dict[str, Any]:
    return {**request, "sampling": {**request["sampling"], "stop": list(stops)}, **keys}


def cut(token_ids: list[int], stops: list[str]) -> tuple[int, str]:
    """By hand: how many tokens there are with the one that completes a stop string, and the text
    before the earliest."""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[:count])
        starts = [text.index(stop) for stop in stops if stop in text]
        if starts:
            return count, text[: min(starts)]
    raise ValueError(f"none of {stops} in {decode(token_ids)!r}")


def test_text_is_the_tokenizers_decoding(wire: Wire) -> None:
    """At temperature 10 tokens are nearly random: most multi-byte characters are cut."""
    requests = [
        {
            "prompt": FOREIGN,
            "stream": seed % 2 == 0,
            "sampling": {"temperature": t, "max_tokens": 40, "seed": seed, "ignore_eos": True},
        }
        for seed, t in enumerate([0.0, 0.0, 1.0, 1.0, *[10.0] * 8])
    ]
    answers = wire.run(*requests)
    for answer in answers:
        assert len(answer.token_ids) == 40
        assert answer.text == decode(answer.token_ids)
    assert any("\ufffd" in answer.text for answer in answers), "there were incomplete characters"


def test_special_tokens_are_counted_but_not_in_the_text(wire: Wire) -> None:
    (story,) = wire.run(STORY)
    end: str = tokenizer.decode(story.token_ids[-1:], skip_special_tokens=False)
    assert end.startswith("<|")
    assert end not in story.text
    assert story.text == decode(story.token_ids)
    assert story.finish.usage.completion_tokens == len(story.token_ids)


def test_where_the_answer_begins_is_told(wire: Wire) -> None:
    """Any two tokens serve as marks of reasoning."""
    (story,) = wire.run(STORY)
    tokens, text = story.token_ids, story.text
    close = tokens[20]
    begins = len(decode(tokens[: tokens.index(close) + 1]))
    opened = {**STORY, "reasoning": {"open": tokens[0], "close": close}}
    unopened = {**STORY, "reasoning": {"open": close, "close": tokens[-1]}}
    never = {**STORY, "reasoning": {"open": tokens[0], "close": 5}}
    stop = text[:3]
    answers = wire.run(opened, {**opened, "stream": False}, unopened, never)
    assert [answer.answer_at for answer in answers] == [begins, begins, 0, None]
    assert {answer.text for answer in answers} == {text}
    (stopped,) = wire.run(with_stops(opened, stop))
    assert stopped.answer_at == begins
    assert stopped.text == text[:begins] + text[begins:].split(stop)[0], "the answer alone stops"
    later = tokens.index(close) + 3
    resumed, just_before = wire.run(
        {**opened, "resume_token_ids": tokens[:later]},
        {**opened, "resume_token_ids": tokens[: later - 4]},
    )
    assert resumed.answer_at == 0
    assert just_before.text[just_before.answer_at or 0 :] == text[begins:]


def test_stop_strings_wherever_they_begin_and_end(wire: Wire) -> None:
    (story,) = wire.run(STORY)
    text, tokens = story.text, story.token_ids
    ends = [len(decode(tokens[:count])) for count in range(1, 40)]
    several_bytes = next(i for i, character in enumerate(text) if not character.isascii())
    stops: list[list[str]] = [
        [text[ends[5] : ends[6]]],  # a whole token
        [text[ends[10] - 1 : ends[10] + 1]],  # over the border of two
        [text[ends[15] - 2 : ends[20] + 1]],  # over many
        [text[ends[30] - 1]],  # the last character of one
        [text[ends[8] : ends[9]], text[ends[7] : ends[12]]],  # the later one to start ends first
        ["never to be read", text[-256:]],  # as long as may be, the last characters included
        [text[:3]],  # at once
        [text[several_bytes - 1 : several_bytes + 4]],
    ]
    for stream in (True, False):
        answers = wire.run(*(with_stops(STORY, *some, stream=stream) for some in stops))
        for some, answer in zip(stops, answers, strict=True):
            count, expected = cut(tokens, some)
            assert answer.token_ids == tokens[:count], some
            assert answer.text == expected
            assert answer.finish.finish_reason == "stop"
            assert answer.finish.usage.completion_tokens == count


def test_a_stop_string_that_almost_comes_changes_nothing(wire: Wire) -> None:
    (story,) = wire.run(STORY)
    almost = [story.text[at : at + 12] + "\x00" for at in range(0, 160, 12)]
    requests = [with_stops(STORY, *almost, stream=stream) for stream in (True, False)]
    for answer in wire.run(*requests):
        assert (answer.text, answer.token_ids) == (story.text, story.token_ids)
        assert answer.finish.finish_reason == "stop"


def test_a_stop_string_that_the_resumed_tokens_complete(wire: Wire) -> None:
    """Its characters are several tokens each; the request may be resumed inside one."""
    stop = "本語 😀 t"
    tokens = tokenizer.encode("Hi 日本語 😀 there").ids
    complete = next(k for k in range(len(tokens) + 1) if stop in decode(tokens[:k]))
    sampling = {"temperature": 0.0, "max_tokens": len(tokens) + 1, "ignore_eos": True}
    request = with_stops({"prompt": "x", "sampling": sampling}, stop)
    points = range(complete - 6, complete + 1)
    answers = wire.run(*({**request, "resume_token_ids": tokens[:k]} for k in points))
    for k, answer in zip(points, answers, strict=True):
        if k < complete:
            assert answer.start == k
        else:
            assert (answer.token_ids, answer.text) == ([], "")
            assert answer.finish.finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_text_goes_on_inside_a_character(wire: Wire, stream: bool) -> None:
    tokens = tokenizer.encode(FOREIGN).ids
    sampling = {"temperature": 0.0, "max_tokens": len(tokens) + 4, "ignore_eos": True}
    requests = [
        {"prompt": "x", "sampling": sampling, "stream": stream, "resume_token_ids": tokens[:k]}
        for k in range(len(tokens) + 1)
    ]
    for k, answer in enumerate(wire.run(*requests)):
        everything = tokens[:k] + answer.token_ids
        assert len(everything) == len(tokens) + 4
        released = decode(tokens[:k]).rstrip("\ufffd")
        assert released + answer.text == decode(everything)


def test_chats_go_through_the_template(wire: Wire) -> None:
    reference = AutoTokenizer.from_pretrained(DEMO_CHECKPOINT)
    chats: list[list[dict[str, str]]] = [
        [{"role": "user", "content": "Tell me a story about a fox."}],
        [
            {"role": "system", "content": "You are a storyteller. 日本語"},
            {"role": "user", "content": "Hello! 😀"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Who lives in the lighthouse?"},
        ],
    ]
    sampling = {"temperature": 0.0, "max_tokens": 40}
    for messages in chats:
        prompt = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        chat, ids = wire.run(
            {"messages": messages, "sampling": sampling},
            {"prompt_token_ids": prompt, "sampling": sampling},
        )
        assert chat.finish.usage.prompt_tokens == len(prompt)
        assert chat.token_ids == ids.token_ids
        assert chat.text


def test_prompts_of_any_characters(wire: Wire) -> None:
    prompts = [FOREIGN, "😀", "日", "e\u0301", " ", "\x00", "<|im_end|>", "a" * 3000]
    answers = wire.run(
        *({"prompt": p, "sampling": {"temperature": 0.0, "max_tokens": 5}} for p in prompts)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.finish.usage.prompt_tokens == len(tokenizer.encode(prompt).ids)
        assert answer.text == decode(answer.token_ids)
