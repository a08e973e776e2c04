"""The page when it is told, or finds in the browser, what it does not expect."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from tests.http.server import Server
from tests.page.browser import CHAT, TIMEOUT_MS, Visit, answered, needs_chromium

pytestmark = needs_chromium


def told(door: Server) -> dict[str, Any]:
    """The status that a page is told first."""
    with urllib.request.urlopen(f"{door.url}/pipeline", timeout=TIMEOUT_MS / 1000) as events:
        line = next(line for line in events if line.startswith(b"data: "))
    status: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return status


def tells(*statuses: object) -> Callable[[Route], None]:
    """Tells these statuses, and ends; the page then asks again."""
    body = "".join(f"data: {json.dumps(status)}\n\n" for status in statuses)
    return lambda route: route.fulfill(content_type="text/event-stream", body=body)


def test_a_status_that_the_page_cannot_show_is_told(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    story = page.locator("#story")
    page.route("**/pipeline", tells({"services": None}))
    page.reload()
    expect(story).to_contain_text("The page cannot show the pipeline", timeout=TIMEOUT_MS)
    page.unroute("**/pipeline")
    expect(story).to_contain_text("Ask something", timeout=TIMEOUT_MS)
    assert any("iterable" in complaint for complaint in visitor.complaints)
    visitor.complaints.clear()


@pytest.mark.parametrize(("width", "columns"), [(1440, 3), (390, 1)])
def test_eight_engines_are_a_grid(visit: Visit, width: int, columns: int) -> None:
    visitor = visit(width=width)
    page = visitor.page
    status = told(visitor.door)
    of_engines = [s for s in status["services"] if s["role"] in ("scheduler", "gpu_worker")]
    status["services"] += [{**s, "engine": n} for n in range(1, 8) for s in of_engines]
    page.route("**/pipeline", tells(status))
    page.reload()
    cards = page.get_by_role("region", name="Engine")
    expect(cards).to_have_count(8)
    corners = cards.evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(({ x, y }) => [x, y])"
    )
    assert len({x for x, _ in corners}) == columns
    assert len({(x, y) for x, y in corners}) == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= width


MESSAGE = {"role": "assistant", "content": "Hello.", "reasoning": "", "calls": []}
KEPT = {"id": "a", "title": "Kept", "messages": [{"role": "user", "content": "Hi"}, MESSAGE]}


ODD = [  # conversations and settings
    ("{", "{"),
    ("{}", "null"),
    ("5", "5"),
    ('"abc"', '"abcdefgh"'),
    ("[null, 1, {}, []]", "[1, 2, 3]"),
    (json.dumps([{**KEPT, "messages": None}]), '{"temperature": {}, "endless": "yes"}'),
    (json.dumps([{**KEPT, "messages": [None, {"role": "assistant"}]}]), '{"tools": "[{"}'),
    (json.dumps([{**KEPT, "messages": [{**MESSAGE, "marks": [None]}]}]), '{"tools": 5}'),
    (json.dumps([{**KEPT, "messages": [{**MESSAGE, "timings": 5}]}]), '{"thinking": "yes"}'),
]


def test_what_the_browser_has_not_kept_from_the_page_stops_nothing(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.route(CHAT, answered({"content": "Hello."}))
    for odd in ODD:
        page.goto(f"{visitor.door.url}/page/icon.svg")  # where no page keeps anything
        page.evaluate(
            "([conversations, settings]) => { localStorage['nanovllm.conversations'] ="
            " conversations; localStorage['nanovllm.settings'] = settings }",
            odd,
        )
        page.goto(visitor.door.url)
        visitor.send("Hi")
        expect(page.locator("#messages"), str(odd)).to_contain_text("Hello.")
        asked = visitor.asked[-1]
        assert sorted(asked) == ["messages", "model", "seed", "stream", "stream_options"], odd
        assert len(asked["messages"]) == 1, odd


def test_an_answer_that_the_page_cannot_read_is_told(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    page.route(CHAT, lambda route: route.fulfill(body='data: {"choices": null}\n\n'))
    visitor.send("Hello")
    expect(page.locator("#messages .error")).to_contain_text("iterable")
    assert len(visitor.asked) == 1


def test_the_time_of_tries_that_failed_is_the_doors(visit: Visit) -> None:
    visitor = visit()
    page = visitor.page
    tries = 3

    def answer(route: Route) -> None:
        if len(visitor.asked) <= tries:
            route.abort()
            return
        usage = {"completion_tokens": 1, "timings": [["prefill", 1000]]}
        last = {"choices": [], "usage": usage}
        route.fulfill(body=f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n")

    page.route(CHAT, answer)
    visitor.send("Hello")
    visitor.wait_for_end()
    (prefill, (name, us)) = visitor.answer["timings"]
    assert (prefill, name) == (["prefill", 1000], "door")
    assert us >= tries * 250_000, "so long the page waits after each"
