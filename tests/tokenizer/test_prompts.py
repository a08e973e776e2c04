"""Requests into token ids, against transformers' own tokenizer and chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nanovllm.checkpoint import CheckpointError, ModelConfig
from nanovllm.checkpoint.chat_template import RESERVED
from nanovllm.messages import AnswerMarks, Chat, Refused, Tokenize, Tokenized, pack, unpack
from nanovllm.protocol import Reasoning, Sampling
from nanovllm.services.tokenizer.prompts import PromptEncoder
from nanovllm.vocabulary import Vocabulary
from tests.bpe import EOS, tiny_tokenizer, write_checkpoint_files, write_tokenizer

MAX_MODEL_LEN = 128
LONGEST_ENTRY = 13
UID = 7 << 32 | 1


def request(
    *,
    messages: list[dict[str, Any]] | None = None,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    continue_final_message: bool = False,
    **fields: Any,
) -> Tokenize:
    chat = None
    if messages is not None:
        chat = msgspec.msgpack.encode(
            Chat(messages, tools, chat_template_kwargs or {}, continue_final_message)
        )
    values: dict[str, Any] = {
        "uid": UID,
        "prompt": None,
        "prompt_token_ids": None,
        "chat": chat,
        "sampling": Sampling(max_tokens=16),
        "resumed": b"",
        **fields,
    }
    return Tokenize(**values)


def encoder_of(directory: Path, max_model_len: int = MAX_MODEL_LEN) -> PromptEncoder:
    model = ModelConfig.from_checkpoint(directory)
    return PromptEncoder.from_checkpoint(directory, model, max_model_len)


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(directory: Path) -> PromptEncoder:
    return encoder_of(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def refused(encoder: PromptEncoder) -> Callable[..., tuple[str, str]]:
    def refuse(**fields: Any) -> tuple[str, str]:
        result = encoder.encode(request(**fields))
        assert isinstance(result, Refused)
        assert result.uid == UID
        return result.code, result.message

    return refuse


def tokenized(encoder: PromptEncoder, **fields: Any) -> Tokenized:
    result = encoder.encode(request(**fields))
    assert isinstance(result, Tokenized), result
    return result


def prompt_of(result: Tokenized) -> list[int]:
    ids: list[int] = unpack(result.prompt).tolist()
    return ids


texts = st.one_of(
    st.text(min_size=1, max_size=12),
    st.lists(
        st.sampled_from(["the dog", " 日本語", EOS, "<think>", "e\u0301", " "]), min_size=1
    ).map(lambda parts: "".join(parts)[:30]),
)


@given(texts)
def test_text_has_the_ids_that_transformers_gives(
    encoder: PromptEncoder, theirs: Any, text: str
) -> None:
    result = encoder.encode(request(prompt=text))
    expected = theirs(text)["input_ids"]
    assert isinstance(result, Refused if len(expected) >= MAX_MODEL_LEN else Tokenized)
    if isinstance(result, Tokenized):
        assert prompt_of(result) == expected


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "bos_token": "<|im_start|>"},
        {"add_eos_token": True, "bos_token": None},
        {"chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages }}"}]},
        {"eos_token": {"__type": "AddedToken", "content": EOS, "special": True}},
    ],
)
def test_tokenizer_config_means_what_it_means_to_transformers(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    write_checkpoint_files(tmp_path)
    write_tokenizer(tmp_path, **config)
    encoder, theirs = (
        encoder_of(tmp_path, 400),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert prompt_of(tokenized(encoder, prompt="the dog")) == theirs("the dog")["input_ids"]
    messages = [{"role": "user", "content": "the dog"}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt_of(tokenized(encoder, messages=chat(("user", "the dog")))) == rendered


ADDED_LATER: list[dict[str, Any]] = [
    {"added_tokens_decoder": {400: {"content": "<|a|>"}, 401: {"content": "<|b|>"}}},
    {"added_tokens_decoder": {405: {"content": "<|a|>"}, 402: {"content": "<|b|>"}}},
    {"added_tokens_decoder": {100: {"content": "<|a|>"}, 5: {"content": "<|b|>"}}},
    {"added_tokens_decoder": {403: {"content": "<think>", "special": True}}},
    {"added_tokens_decoder": {403: {"content": EOS, "special": False}}},
    {"added_tokens_decoder": {400: {"content": "<|a|>", "lstrip": True, "special": False}}},
    {"added_tokens_decoder": {400: {"content": "dog", "special": False}}},
    {"eos_token": "<|a|>", "additional_special_tokens": ["<|b|>", "<|a|>", EOS]},
    {"extra_special_tokens": ["<|b|>", "<|a|>"]},
    {"extra_special_tokens": {"image_token": "<|b|>"}, "pad_token": "<|a|>"},
    {"bos_token": "<|a|>", "added_tokens_decoder": {400: {"content": "<|b|>"}}},
]


@pytest.mark.parametrize("config", ADDED_LATER)
def test_tokens_that_tokenizer_json_lacks_have_transformers_ids_and_text(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    decoder = {
        token_id: {**plain, "special": True, **token}
        for token_id, token in config.get("added_tokens_decoder", {}).items()
    }
    write_checkpoint_files(tmp_path)
    write_tokenizer(tmp_path, **{**config, "added_tokens_decoder": decoder})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the dog <|a|> <|b|><think><|im_end|> <|a|>"
    ids = prompt_of(tokenized(encoder_of(tmp_path), prompt=text))
    assert ids == theirs(text)["input_ids"]
    vocabulary = Vocabulary.from_checkpoint(tmp_path)
    assert vocabulary.size == len(theirs)
    for token_id in range(len(theirs)):
        expected = theirs.decode([token_id], skip_special_tokens=True)
        assert vocabulary.text.get(token_id, b"").decode(errors="replace") == expected


def test_tokens_around_the_text(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    tokenizer.post_processor = TemplateProcessing(single=["$A", EOS], special_tokens=[(EOS, eos)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = encoder_of(tmp_path, 400)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    prompt = prompt_of(tokenized(encoder, prompt="the quick brown fox"))
    assert prompt == theirs("the quick brown fox")["input_ids"]
    assert len(prompt) > 3
    assert prompt[-1] == eos
    chatted = prompt_of(tokenized(encoder, messages=chat(("user", "dog"))))
    messages = [{"role": "user", "content": "dog"}]
    assert chatted == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chatted[-1] != eos


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"enable_thinking": False},
        {"tools": [{"name": "é", "parameters": {}}], "enable_thinking": True},
        {"eos_token": "!", "unused": [1, None, {"a": 2.5}]},
    ],
)
def test_chat_is_rendered_as_transformers_does(
    encoder: PromptEncoder, theirs: Any, arguments: dict[str, Any]
) -> None:
    turns = [("system", "be <|im_end|> kind"), ("user", "{{ 7 * 7 }} 日本")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, **arguments)
    kwargs = dict(arguments)
    tools = kwargs.pop("tools", None)
    result = tokenized(encoder, messages=messages, tools=tools, chat_template_kwargs=kwargs)
    assert prompt_of(result) == expected["input_ids"]


def test_messages_have_one_form_for_the_template(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    encoder = encoder_of(tmp_path, 400)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"], "name": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "function": {"name": "f", "arguments": '{"x": [1, null]}'}},
                {"id": "2", "function": {"name": "g", "arguments": {"y": 2}}},
                {"id": "3", "function": {"name": "h", "arguments": ""}},
                {"id": "4", "function": {"name": "i"}},
            ],
        },
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    prompt = prompt_of(tokenized(encoder, messages=messages))
    text = tiny_tokenizer().decode(prompt, skip_special_tokens=False)
    calls = [("1", "f", {"x": [1, None]}), ("2", "g", {"y": 2}), ("3", "h", {}), ("4", "i", {})]
    assert msgspec.json.decode(text) == [
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": call, "function": {"name": name, "arguments": arguments}}
                for call, name, arguments in calls
            ],
        },
        messages[2],
    ]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content[0]: only parts of type"),
        ({"content": ["text"]}, "content[0]: "),
        ({"content": [{"type": "text", "text": 5}]}, "content[0]: "),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls[0].function.arguments: not a JSON object",
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "tool_calls[0].function.arguments: not a JSON object",
        ),
    ],
)
def test_a_message_that_no_template_takes_is_named(
    refused: Callable[..., tuple[str, str]], message: dict[str, Any], named: str
) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", **message}]
    code, reason = refused(messages=messages)
    assert code == "invalid_request"
    assert reason.startswith(f"messages[1].{named}")


def test_the_last_message_can_be_continued(
    encoder: PromptEncoder, theirs: Any, refused: Callable[..., tuple[str, str]]
) -> None:
    turns = chat(("user", "the dog"), ("assistant", "the quick"))
    expected = theirs.apply_chat_template(turns, continue_final_message=True)["input_ids"]
    assert prompt_of(tokenized(encoder, messages=turns, continue_final_message=True)) == expected
    for other in (chat(("user", "the dog")), [{"role": "assistant", "content": None}]):
        code, reason = refused(messages=other, continue_final_message=True)
        assert code == "invalid_request"
        assert reason.startswith("continue_final_message: ")


@pytest.mark.parametrize(
    ("prompt", "reasons", "has_reasoned"),
    [
        ("the dog", False, False),
        ("the <think>", True, False),
        ("the <think>dog", True, False),
        ("the <think></think>dog", False, True),
        ("<think>dog</think> <think>", True, False),
        (f"user: <think>{EOS}assistant: ", False, False),
        (f"user: </think>{EOS}assistant: <think>", True, False),
        (f"user: <think>{EOS}assistant: <think></think>", False, True),
    ],
)
def test_whether_a_prompt_ends_inside_reasoning(
    encoder: PromptEncoder, prompt: str, reasons: bool, has_reasoned: bool
) -> None:
    opening, closing = tiny_tokenizer().encode("<think></think>").ids
    found = tokenized(encoder, prompt=prompt, reasoning=Reasoning(opening, closing)).answer_marks
    assert found == AnswerMarks(opening, closing, reasons, has_reasoned)
    assert tokenized(encoder, prompt=prompt).answer_marks is None


def test_a_bad_word_is_also_one_after_a_space(encoder: PromptEncoder) -> None:
    def encoded(*texts: str) -> list[list[int]]:
        return [tiny_tokenizer().encode(text, add_special_tokens=False).ids for text in texts]

    for word, texts in (("dog", ["dog", " dog"]), (" dog", [" dog"]), ("\n", ["\n", " \n"])):
        sampling = Sampling(bad_words=[word])
        found = tokenized(encoder, prompt="dog", sampling=sampling).sampling.bad_words
        assert found == encoded(*texts)


def test_a_template_in_its_own_file_comes_first(directory: Path, tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    encoder = encoder_of(tmp_path)
    result = tokenized(encoder, messages=chat(("user", "dog")))
    assert result.prompt == tokenized(encoder, prompt="dog!").prompt


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_reserved_template_arguments_are_refused(
    refused: Callable[..., tuple[str, str]], name: str
) -> None:
    code, message = refused(messages=chat(("user", "x")), chat_template_kwargs={name: []})
    assert code == "invalid_request"
    assert name in message


def test_a_template_that_refuses_gives_its_reason(
    refused: Callable[..., tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    code, message = refused(messages=chat(("critic", "x")))
    assert code == "invalid_request"
    assert "no critics here" in message
    assert not caplog.records, "no client fills the log"


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ undefined.attribute }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ messages[9].content }}",
    ],
)
def test_broken_templates_refuse_each_request(tmp_path: Path, template: str) -> None:
    write_checkpoint_files(tmp_path)
    write_tokenizer(tmp_path, chat_template=template)
    encoder = encoder_of(tmp_path)
    for _ in range(2):
        result = encoder.encode(request(messages=chat(("user", "x"))))
        assert isinstance(result, Refused)
        assert result.code == "invalid_request"
    assert tokenized(encoder, prompt="still here").prompt


def test_no_template(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    write_tokenizer(tmp_path, chat_template=None)
    encoder = encoder_of(tmp_path)
    result = encoder.encode(request(messages=chat(("user", "x"))))
    assert isinstance(result, Refused)
    assert "no chat template" in result.message


def test_empty_prompts_are_refused(refused: Callable[..., tuple[str, str]]) -> None:
    for prompt in ({"prompt": ""}, {"prompt_token_ids": b""}, {}):
        assert refused(**prompt)[0] == "invalid_request"


def test_the_prompt_must_be_shorter_than_max_model_len(
    encoder: PromptEncoder, refused: Callable[..., tuple[str, str]]
) -> None:
    result = tokenized(encoder, prompt_token_ids=pack(range(MAX_MODEL_LEN - 1)))
    assert result.sampling.max_tokens == 1
    code, message = refused(prompt_token_ids=pack(range(MAX_MODEL_LEN)))
    assert code == "context_length_exceeded"
    assert "128 tokens" in message
    assert "max_model_len (128)" in message
    assert refused(prompt="日" * MAX_MODEL_LEN)[0] == "context_length_exceeded"


def test_a_token_that_the_model_does_not_embed_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    highest = tiny_tokenizer().get_vocab()["naïve x"]
    write_checkpoint_files(tmp_path, vocab_size=highest, eos_token_id=2)
    encoder = encoder_of(tmp_path)
    (warning,) = caplog.records
    assert f"go up to {highest}" in warning.message
    for prompt in (
        {"prompt": "a naïve x"},
        {"messages": chat(("user", "a naïve x"))},
        {"prompt_token_ids": pack([5, highest])},
    ):
        result = encoder.encode(request(**prompt))
        assert isinstance(result, Refused)
        assert result.code == "invalid_request"
        assert result.message == (
            f"the prompt has token id {highest} ('naïve x'), which is not below the vocabulary size"
            f" ({highest})"
        )
    assert tokenized(encoder, prompt="naïve").prompt

    caplog.clear()
    write_checkpoint_files(tmp_path, vocab_size=highest + 1)
    assert prompt_of(tokenized(encoder_of(tmp_path), prompt="naïve x")) == [highest]
    assert not caplog.records


def test_hopelessly_long_text_is_not_tokenized() -> None:
    # A tokenizer that raises on any text.
    encoder = PromptEncoder(
        Tokenizer(WordLevel({}, unk_token="?")), None, [], LONGEST_ENTRY, 512, MAX_MODEL_LEN
    )
    most = LONGEST_ENTRY * MAX_MODEL_LEN
    result = encoder.encode(request(prompt="é" * (most // 2 + 1)))
    assert isinstance(result, Refused)
    assert result.code == "context_length_exceeded"
    # One that might fit does reach it; and what it raises ends this request alone.
    result = encoder.encode(request(prompt="é" * (most // 2)))
    assert isinstance(result, Refused)
    assert (result.code, result.message) == ("internal", "the prompt could not be tokenized")


def test_hopelessly_long_chats_are_refused(refused: Callable[..., tuple[str, str]]) -> None:
    code, message = refused(messages=chat(("user", "x" * 2000)))
    assert code == "context_length_exceeded"
    assert "bytes" in message


def test_prompt_and_resumed_output_must_fit(
    encoder: PromptEncoder, refused: Callable[..., tuple[str, str]]
) -> None:
    prompt = pack(range(MAX_MODEL_LEN - 4))
    result = tokenized(encoder, prompt_token_ids=prompt, resumed=pack([1] * 4))
    assert result.sampling.max_tokens == 4
    code, message = refused(prompt_token_ids=prompt, resumed=pack([1] * 5))
    assert code == "context_length_exceeded"
    assert "resume_token_ids 5" in message


def test_sampling_passes_through_but_for_stop_tokens(encoder: PromptEncoder, theirs: Any) -> None:
    asked = Sampling(
        temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, max_tokens=16, stop=["x"],
        stop_token_ids=[9], ignore_eos=True, seed=7, logprobs=2,
    )  # fmt: skip
    result = tokenized(encoder, prompt_token_ids=pack([5, 6]), sampling=asked)
    assert result == Tokenized(UID, pack([5, 6]), asked)
    asked = msgspec.structs.replace(asked, ignore_eos=False)
    result = tokenized(encoder, prompt_token_ids=pack([5, 6]), sampling=asked)
    eos = theirs.convert_tokens_to_ids(EOS)
    assert result.sampling == msgspec.structs.replace(asked, stop_token_ids=sorted([9, eos]))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 4}, {"eos_token_id": [3, 2]}, [2, 3]),
        ({"eos_token_id": 4}, {}, [4]),
        ({"eos_token_id": None}, {}, [EOS]),
    ],
)
def test_where_the_end_of_sequence_comes_from(
    tmp_path: Path, theirs: Any, config: Any, generation: Any, expected: list[Any]
) -> None:
    write_checkpoint_files(tmp_path, **config)
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    encoder = encoder_of(tmp_path)
    result = tokenized(encoder, prompt_token_ids=pack([5]))
    ids = [theirs.convert_tokens_to_ids(e) if isinstance(e, str) else e for e in expected]
    assert result.sampling.stop_token_ids == ids


def test_an_end_of_sequence_that_the_model_does_not_have(tmp_path: Path) -> None:
    eos = tiny_tokenizer().get_vocab()[EOS]
    write_checkpoint_files(tmp_path, eos_token_id=None, vocab_size=eos)
    complaint = rf"tokenizer_config\.json: eos_token '.*', id {eos} is not in the vocabulary"
    with pytest.raises(CheckpointError, match=complaint):
        encoder_of(tmp_path)


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        encoder_of(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        encoder_of(tmp_path)


def test_a_chat_template_that_is_not_utf_8(tmp_path: Path) -> None:
    write_checkpoint_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages[0].content }}\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8 text"):
        encoder_of(tmp_path)
