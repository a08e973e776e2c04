"""The pictures of docs/page.md: `NANOVLLM_PICTURES=docs pytest tests/page/test_pictures.py`."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from playwright.sync_api import expect

from benchmarks.support.pipeline import Pipeline
from tests.http.server import Server
from tests.page.browser import TIMEOUT_MS, Visitor, needs_chromium, running_browser

PICTURES = os.environ.get("NANOVLLM_PICTURES")
LARGEST = 200_000  # bytes

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(not PICTURES, reason="pictures are made with NANOVLLM_PICTURES=DIRECTORY"),
]


def keep_busy(door: Server, over: threading.Event) -> None:
    while not over.is_set():
        door.complete(prompt="Once upon a time", max_tokens=300, ignore_eos=True)


def test_pictures() -> None:
    over = threading.Event()
    with (
        Pipeline("", "--http", "127.0.0.1:0", "--num-kvcache-blocks", "64") as pipeline,
        running_browser() as browser,
    ):
        door = Server(pipeline.http_port)
        others = [threading.Thread(target=keep_busy, args=(door, over)) for _ in range(12)]
        for other in others:
            other.start()
        try:
            for colours in ("light", "dark"):
                picture(
                    Visitor(browser, door, colours),
                    Path(PICTURES or "") / f"page-{colours}.png",
                )
        finally:
            over.set()
            for other in others:
                other.join()


def picture(visitor: Visitor, file: Path) -> None:
    """The scheduler has just died in mid-answer, and another process before it."""
    page = visitor.page
    page.get_by_role("button", name="Kill gpu_worker 0.0").click()
    expect(page.locator("#events")).to_contain_text("gpu_worker 0.0 is ready", timeout=TIMEOUT_MS)
    page.wait_for_timeout(15_000)  # for the curve
    visitor.set(endless=True, maxTokens="400", temperature="0.5")
    visitor.send("Tell me a story about a fox.")
    visitor.wait_for_text(300)
    page.get_by_role("button", name="Kill scheduler 0").click()
    expect(page.locator("#story")).to_contain_text("scheduler 0 has died")
    page.mouse.move(0, 0)
    page.screenshot(path=file, animations="disabled")
    assert file.stat().st_size < LARGEST
    visitor.wait_for_end()
    visitor.end()
