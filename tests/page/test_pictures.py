"""The pictures of docs/page.md: `NANOVLLM_PICTURES=docs pytest tests/page/test_pictures.py`.

Without the variable they are made all the same, and thrown away.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import expect

from benchmarks.support.pipeline import Pipeline
from tests.http.server import Server
from tests.page.browser import TIMEOUT_MS, Visitor, needs_chromium, running_browser

LARGEST = 300_000  # bytes
CURVE = 25  # statuses
OTHERS = 6  # clients

pytestmark = needs_chromium


@contextlib.contextmanager
def busy(door: Server) -> Iterator[None]:
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            door.complete(prompt="Once upon a time", max_tokens=100, ignore_eos=True)

    others = [threading.Thread(target=ask) for _ in range(OTHERS)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        over.set()
        for other in others:
            other.join()


def test_pictures(tmp_path: Path) -> None:
    """The scheduler has just died in mid-answer, and the worker before it. Above is an answer that
    has come to its end, and where its time went."""
    directory = Path(os.environ.get("NANOVLLM_PICTURES", tmp_path))
    with (
        Pipeline("", "--http", "127.0.0.1:0", "--num-kvcache-blocks", "64") as pipeline,
        running_browser() as browser,
        busy(door := Server(pipeline.http_port)),
    ):
        visitor = Visitor(browser, door)
        page = visitor.page
        visitor.set(temperature="0.5")
        visitor.send("Tell me a story about a fox.")
        visitor.wait_for_text(100)
        page.get_by_role("button", name="Kill gpu_worker 0.0").click()
        events = page.locator("#events")
        expect(events).to_contain_text("gpu_worker 0.0 is ready", timeout=TIMEOUT_MS)
        visitor.wait_for_end()
        expect(page.locator("#messages .timings")).to_contain_text("decode")
        page.wait_for_function(
            "n => document.querySelector('#chart .line').getAttribute('d').split('L').length > n",
            arg=CURVE,
        )
        visitor.set(endless=True, maxTokens="3000")
        visitor.send("And one about an owl.")
        visitor.wait_for_text(150)
        page.get_by_role("button", name="Kill scheduler 0").click()
        # Who looks now and then may miss the death itself.
        story = re.compile("scheduler 0 (has died|is back)")
        expect(page.locator("#story")).to_contain_text(story, timeout=TIMEOUT_MS)
        page.mouse.move(0, 0)
        for colours in ("light", "dark"):
            page.emulate_media(color_scheme="light" if colours == "light" else "dark")
            file = directory / f"page-{colours}.png"
            page.screenshot(path=file, animations="disabled")
            assert file.stat().st_size < LARGEST
        page.get_by_role("button", name="Stop").click()
        visitor.wait_for_end()
        visitor.end()
