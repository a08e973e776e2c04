"""The page in a real browser: a chat, the pipeline beside it, and deaths that are only pauses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from click.testing import CliRunner
from playwright.sync_api import Page, expect

from benchmarks.support.pipeline import Pipeline
from nanovllm.client.cli import main
from nanovllm.control import IngressStats
from tests.http.server import Server
from tests.page.browser import CHAT, SIM, TIMEOUT_MS, Visit, answered, needs_chromium

pytestmark = needs_chromium

SERVICES = (
    *("ingress 0", "tokenizer 0", "scheduler 0", "gpu_worker 0.0", "detokenizer 0", "http 0"),
)
HOSTILE = 'Not <img src=x onerror="alert(1)"> HTML.\n```js\nlet x = "<b>";\n```\nMore.'


def in_words(page: Page, selector: str) -> str:
    return page.locator(selector).inner_text()


def test_a_chat_streams_and_is_kept(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    visitor.set(endless=True, maxTokens="150", temperature="1.2", system="Be brief.")
    visitor.send("Tell me a story.")
    visitor.wait_for_text()
    assert page.locator("#stop").is_visible(), "the answer has come at once"
    visitor.wait_for_end()
    asked = visitor.asked[-1]
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me a story."},
    ]
    assert (asked["temperature"], asked["max_tokens"], asked["ignore_eos"]) == (1.2, 150, True)
    assert "chat_template_kwargs" not in asked
    answer = visitor.answer
    assert "150 tokens" in answer["note"]
    names, times_us = zip(*answer["timings"], strict=True)
    assert list(names) == ["tokenizer", "queue", "prefill", "decode", "detokenizer", "door"]
    bar = page.locator("#messages article .bar span")
    assert times_us[names.index("decode")] >= 140 * 8000, "149 steps of 8 ms"
    widths = np.array(bar.evaluate_all("all => all.map(e => e.getBoundingClientRect().width)"))
    assert widths / widths.sum() == pytest.approx(np.array(times_us) / sum(times_us), abs=0.05)
    ends = "all => all.map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    [[begin, end]] = page.locator("#messages article .bar").evaluate_all(ends)
    parts = [edge for part in bar.evaluate_all(ends) for edge in part]
    assert parts == sorted(parts), "one beside the other"
    assert (parts[0], parts[-1]) == pytest.approx((begin, end), abs=1)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    assert "decode" in in_words(page, "#messages figcaption")
    assert {key: answer[key] for key in ("content", "reasoning")} == visitor.undisturbed()
    visitor.set(thinking="off")
    visitor.send("Another.")
    visitor.wait_for_end()
    assert visitor.asked[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert len(visitor.asked[-1]["messages"]) == 4, "the history is part of the question"
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("#messages article")).to_have_count(0)
    page.reload()
    page.get_by_role("button", name="Tell me a story.", exact=True).click()
    expect(page.locator("#messages article")).to_have_count(4)
    page.get_by_role("button", name="Delete “Tell me a story.”").click()
    expect(page.locator("#messages article")).to_have_count(0)
    page.reload()
    expect(page.locator("#conversations li")).to_have_count(1)


def test_stop_stops(visit: Visit, pipeline: Pipeline) -> None:
    visitor = visit()
    visitor.set(endless=True, maxTokens="3000")
    visitor.send("Tell me a story.")
    visitor.wait_for_text()
    pipeline.stats_once(IngressStats, lambda stats: stats.requests == 1)
    visitor.page.get_by_role("button", name="Stop").click()
    visitor.wait_for_end()
    pipeline.stats_once(IngressStats, lambda stats: stats.requests == 0)
    assert visitor.answer["note"] == "Stopped."
    visitor.send("Go on.")  # with what has come
    visitor.wait_for_text()
    visitor.page.get_by_role("button", name="Stop").click()
    visitor.wait_for_end()


@pytest.mark.parametrize("name", SERVICES)
def test_a_kill_in_mid_answer_is_only_a_pause(visit: Visit, name: str) -> None:
    visitor = visit()
    page = visitor.page
    visitor.set(endless=True, maxTokens="300", temperature="1.1")
    visitor.send("Tell me a story.")
    visitor.wait_for_text(20)
    page.get_by_role("button", name=f"Kill {name}", exact=True).click()
    events = page.locator("#events")
    expect(events).to_contain_text(f"You killed {name}")
    expect(events).to_contain_text(f"{name} died", timeout=TIMEOUT_MS)
    expect(events).to_contain_text(f"{name} is ready after", timeout=TIMEOUT_MS)
    expect(events).not_to_contain_text("after 0.0 s")
    visitor.wait_for_end()
    answer = visitor.answer
    assert "error" not in answer or not answer["error"]
    assert "300 tokens" in answer["note"]
    assert f"{name} died meanwhile" in answer["note"]
    assert [mark["name"] for mark in answer["marks"]] == [name]
    expect(page.get_by_role("img", name=f"Here {name} died")).to_be_visible()
    assert {key: answer[key] for key in ("content", "reasoning")} == visitor.undisturbed()
    node = page.locator(".node", has=page.get_by_text(name, exact=True))
    expect(node).to_contain_text("restarted 1\N{MULTIPLICATION SIGN}")


def test_a_server_that_does_not_answer_is_told(visit: Visit) -> None:
    page = visit().page
    story = page.locator("#story")
    page.route("**/pipeline", lambda route: route.abort())
    page.reload()
    expect(story).to_contain_text("does not answer", timeout=TIMEOUT_MS)
    page.unroute("**/pipeline")
    expect(story).to_contain_text("Ask something", timeout=TIMEOUT_MS)


def test_an_engine_that_is_added_is_seen(visit: Visit, pipeline: Pipeline) -> None:
    page = visit().page
    expect(page.get_by_role("region", name="Engine 0")).to_be_visible()

    def scale(count: int) -> None:
        words = ["scale", "engine", str(count), "--runtime-dir", str(pipeline.runtime_dir)]
        ran = CliRunner().invoke(main, words)
        assert ran.exit_code == 0, ran.output

    scale(2)
    expect(page.get_by_role("region", name="Engine 1")).to_be_visible()
    expect(page.get_by_role("button", name="Kill gpu_worker 1.0")).to_be_visible()
    expect(page.get_by_role("meter", name="KV cache of engine 1")).to_be_visible()
    scale(1)
    expect(page.get_by_role("region", name="Engine 1")).to_have_count(0)
    expect(page.locator("#events")).to_contain_text("scheduler 1 has left")


def test_what_the_model_writes_is_text(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.route(CHAT, answered({"reasoning_content": "<script>x()</script>"}, {"content": HOSTILE}))
    visitor.send("<b>Hello</b>")
    visitor.wait_for_end()
    messages = page.locator("#messages")
    expect(messages.locator("img, b, script")).to_have_count(0)
    expect(messages).to_contain_text('Not <img src=x onerror="alert(1)"> HTML.')
    expect(messages.locator("pre")).to_have_text('let x = "<b>";\n')
    thought = messages.get_by_text("<script>x()</script>")
    expect(thought).to_be_hidden()  # it is folded
    page.get_by_text("What the model thought").click()
    expect(thought).to_be_visible()


def test_a_tool_call_is_shown_and_answered(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    call = {"id": "call_1", "type": "function", "index": 0}
    function = {"name": "get_weather", "arguments": ""}
    page.route(
        CHAT,
        answered(
            {"tool_calls": [{**call, "function": function}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": ' "Bern"}'}}]},
            reason="tool_calls",
        ),
    )
    page.get_by_role("button", name="Settings").click()
    page.locator("#settings [name=tools]").fill("[{")
    page.locator("#settings [name=system]").focus()
    expect(page.get_by_role("alert")).to_contain_text("no JSON")
    page.get_by_role("button", name="Offer an example tool").click()
    expect(page.locator("#tools-error")).to_be_empty()
    visitor.send("What is the weather in Bern?")
    expect(page.locator(".call")).to_contain_text("get_weather")
    expect(page.locator(".call pre")).to_have_text('{"city": "Bern"}')
    assert visitor.asked[-1]["tools"][0]["function"]["name"] == "get_weather"
    page.unroute(CHAT)
    page.route(CHAT, answered({"content": "It rains."}))
    page.get_by_label("Result of get_weather").fill('{"sky": "rain"}')
    page.get_by_role("button", name="Give result").click()
    expect(page.locator("#messages")).to_contain_text("It rains.")
    _, called, result = visitor.asked[-1]["messages"]
    assert called["tool_calls"][0]["function"]["arguments"] == '{"city": "Bern"}'
    assert result == {"role": "tool", "content": '{"sky": "rain"}', "tool_call_id": "call_1"}
    expect(page.get_by_role("button", name="Give result")).to_have_count(0)


def test_a_call_that_breaks_stops_no_conversation(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    text = '{"city": "Be'
    function = {"name": "get_weather", "arguments": text}
    call = {"id": "call_1", "type": "function", "index": 0, "function": function}
    page.route(CHAT, answered({"tool_calls": [call]}, {"content": text}, reason="length"))
    visitor.send("What is the weather in Bern?")
    visitor.wait_for_end()
    expect(page.locator(".call pre")).to_have_text(text)
    expect(page.get_by_role("button", name="Give result")).to_have_count(0)
    page.route(CHAT, answered({"content": "It rains."}))
    visitor.send("Go on.")
    expect(page.locator("#messages")).to_contain_text("It rains.")
    assert visitor.asked[-1]["messages"][1] == {"role": "assistant", "content": text}


def test_tabs_lose_nothing_of_one_another(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    visitor.set(maxTokens="5")
    visitor.send("One.")
    expect(page.locator(".note")).to_have_count(1)
    other = page.context.new_page()
    other.goto(visitor.door.url)
    other.get_by_label("Message", exact=True).fill("Two.")
    other.keyboard.press("Enter")
    expect(other.locator(".note")).to_have_count(2)
    expect(page.locator(".message.user")).to_have_text(["One.", "Two."])
    page.close()
    other.reload()
    expect(other.locator(".message.user")).to_have_text(["One.", "Two."])


def test_the_conversation_that_is_open_goes_on_when_it_is_chosen(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    visitor.set(endless=True, maxTokens="150")
    visitor.send("Tell me a story.")
    visitor.wait_for_text()
    page.locator("#conversations [aria-current]").click()
    visitor.wait_for_end()
    assert "150 tokens" in visitor.answer["note"]


def test_two_calls_are_answered_together(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    calls = [
        {"id": name, "index": index, "function": {"name": name, "arguments": "{}"}}
        for index, name in enumerate(("one", "two"))
    ]
    page.route(CHAT, answered({"tool_calls": calls}, reason="tool_calls"))
    visitor.send("Call both.")
    for name in ("one", "two"):
        page.get_by_label(f"Result of {name}").fill("done")
        assert len(visitor.asked) == 1, "it is asked before all results are there"
        page.keyboard.press("Enter")
    expect(page.locator(".call")).to_have_count(4)  # the same answer again
    assert [m["role"] for m in visitor.asked[-1]["messages"]] == [
        *("user", "assistant", "tool", "tool")
    ]


def test_a_refusal_is_told(visit: Visit) -> None:
    visitor = visit()
    visitor.set(temperature="-1")
    visitor.send("Hello")
    visitor.wait_for_end()
    expect(visitor.page.locator("#messages .error")).to_contain_text("temperature")


@pytest.mark.parametrize(("colours", "width"), [("light", 1440), ("dark", 1000), ("light", 390)])
def test_nothing_stands_in_anyones_way(visit: Visit, colours: str, width: int) -> None:
    """By axe: names and roles, contrasts, order, and what a keyboard reaches."""
    visitor = visit(colours, width)
    page = visitor.page
    page.route(CHAT, answered({"reasoning_content": "Hm."}, {"content": HOSTILE}))
    visitor.send("Hello")
    visitor.wait_for_end()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("What the model thought").click()
    expect(page.locator(".node")).to_have_count(len(SERVICES))
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_keyboard_is_enough(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # past the header
    page.route(CHAT, answered({"content": "Hello."}))
    page.keyboard.type("Hi")
    page.keyboard.press("Enter")
    expect(page.locator("#messages")).to_contain_text("Hello.")
    expect(page.get_by_role("status")).to_have_text("Hello.")  # for screen readers
    page.get_by_role("button", name="Kill tokenizer 0").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#events")).to_contain_text("tokenizer 0 is ready after")


def test_keys_are_asked_for(
    visit: Visit, monkeypatch: pytest.MonkeyPatch, start_pipeline: Callable[..., Pipeline]
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", "user")
    monkeypatch.setenv("NANOVLLM_ADMIN_KEY", "boss")
    locked = start_pipeline("", *SIM)
    visitor = visit(door=Server(locked.http_port))
    page = visitor.page
    dialog = page.get_by_role("dialog", name="A key is needed")

    def give(key: str) -> None:
        expect(dialog).to_be_visible()
        dialog.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")

    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#story")).to_contain_text("only those who have a key")
    visitor.send("Hello")
    give("wröng")  # no header can hold this
    give("wrong")
    expect(dialog).to_contain_text("does not know this key")
    give("user")
    expect(page.locator(".node")).to_have_count(len(SERVICES))
    page.get_by_role("button", name="Kill detokenizer 0").click()
    expect(dialog).to_contain_text("admin key")
    give("boss")
    expect(page.locator("#events")).to_contain_text("detokenizer 0 is ready after")
    assert page.evaluate("sessionStorage.getItem('nanovllm.key')") == "boss"
    assert page.evaluate("JSON.stringify(localStorage)").count("boss") == 0
