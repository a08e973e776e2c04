"""Debian's Chromium, and the page in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Request, Route, expect, sync_playwright

from tests.http.server import Server

TIMEOUT_MS = 90_000
# Where `make chromium` unpacks it.
UNPACKED = Path(sys.prefix) / "chromium"
# What a browser says by itself of an answer that was cut off or refused.
NETWORK = "Failed to load resource"
CHAT = "**/v1/chat/completions"
SIM = ("--device", "sim", "--sim-step-ms", "8", "--http", "127.0.0.1:0")


def chromium() -> str | None:
    """The path of the browser; None if there is none."""
    unpacked = UNPACKED / "usr/lib/chromium/chromium"
    return str(unpacked) if unpacked.exists() else shutil.which("chromium")


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="there is no chromium: `make chromium` unpacks it"
)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Until its end, no other event loop can run in this thread."""
    libraries = [str(path.parent) for path in UNPACKED.glob("usr/lib/**/*.so*")]
    path = ":".join([*dict.fromkeys(libraries), os.environ.get("LD_LIBRARY_PATH", "")])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), env={**os.environ, "LD_LIBRARY_PATH": path}
        )
        yield browser
        browser.close()


class Visitor:
    """One visit to the page, from a browser that has not been there.

    Args:
        colours: light or dark.
        width: of the window, in pixels.
    """

    def __init__(
        self, browser: Browser, door: Server, colours: str = "light", width: int = 1440
    ) -> None:
        self.door = door
        self.complaints: list[str] = []
        self.asked: list[Any] = []  # bodies of requests for answers
        self._context = browser.new_context(
            color_scheme="dark" if colours == "dark" else "light",
            viewport={"width": width, "height": 900},
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)
        self.page.goto(door.url)

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(self.door.url):
            self.complaints.append(f"the page asks {request.url}")
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(json.loads(request.post_data or ""))

    def set(self, **settings: str | bool) -> None:
        """Sets these settings, and leaves the others."""
        self.page.get_by_role("button", name="Settings").click()
        for name, value in settings.items():
            field = self.page.locator(f"#settings [name={name}]")
            if isinstance(value, bool):
                field.set_checked(value)
            elif name == "thinking":
                field.select_option(value)
            else:
                field.fill(value)
        self.page.locator("#settings [name=system]").focus()
        self.page.get_by_role("button", name="Settings").click()

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def wait_for_text(self, characters: int = 1) -> None:
        """Until the answer has so many characters, reasoning included."""
        self.page.wait_for_function(
            "n => (document.querySelector('#messages > :last-child.assistant')?.textContent.length"
            " ?? 0) > n",
            arg=characters + 60,  # labels
        )

    def wait_for_end(self) -> None:
        expect(self.page.locator("#send")).to_be_visible(timeout=TIMEOUT_MS)

    @property
    def answer(self) -> dict[str, Any]:
        """The latest answer, as the browser keeps it."""
        kept = self.page.evaluate("localStorage.getItem('nanovllm.conversations')")
        answer: dict[str, Any] = json.loads(kept)[0]["messages"][-1]
        return answer

    def undisturbed(self) -> dict[str, Any]:
        """What the server answers to the latest question when nothing is killed."""
        body = {**self.asked[-1], "stream": False}
        del body["stream_options"]
        message = self.door.post("/v1/chat/completions", body).json["choices"][0]["message"]
        return {"content": message["content"], "reasoning": message.get("reasoning_content", "")}

    def end(self, forgiven: Sequence[str] = ()) -> None:
        """Leaves. The console must be empty, but for what contains one of `forgiven`."""
        self._context.close()
        assert [c for c in self.complaints if not any(f in c for f in forgiven)] == []


Visit = Callable[..., Visitor]


def answered(*deltas: dict[str, object], reason: str = "stop") -> Callable[[Route], None]:
    """Answers a chat with these deltas."""
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, last])

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=body + "data: [DONE]\n\n")

    return answer
