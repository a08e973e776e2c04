"""Events of the log: what a service writes, and what the launcher shows of it."""

from __future__ import annotations

import logging
import sys

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.log import Event, EventFormatter, event_of, render


def logged(message: str, *, failure: Exception | None = None) -> logging.LogRecord:
    return logging.LogRecord(
        "name", logging.WARNING, "file", 1, message, None, sys.exc_info() if failure else None
    )


def test_an_event_passes_through_the_launcher_unchanged() -> None:
    try:
        raise ValueError("the reason")
    except ValueError as error:
        line = EventFormatter("ingress 0", "json").format(logged("one\ntwo", failure=error))
    assert "\n" not in line
    event = event_of(line, "another service")
    assert (event.service, event.level, event.message) == ("ingress 0", "warning", "one\ntwo")
    assert render(event, "json") == line
    shown = render(event, "text").splitlines()
    heads = {text.partition(" | ")[0] for text in shown}
    assert heads == {f"{event.time[:10]} {event.time[11:23]} WARNING ingress 0"}
    said = [text.partition(" | ")[2] for text in shown]
    assert said[:3] == ["one", "two", "Traceback (most recent call last):"]
    assert said[-1] == "ValueError: the reason"


@given(st.text())
def test_any_other_output_is_an_event_of_its_own(text: str) -> None:
    whole = EventFormatter("ingress 0", "json").format(logged("x" * 100))
    for line in (text, whole[:60], '{"time": 1}', '{"time":"now"}'):
        event = event_of(line, "ingress 0")
        assert (event.level, event.service, event.message) == (None, "ingress 0", line)
        assert msgspec.json.decode(render(event, "json"), type=Event) == event


def test_a_line_of_the_log_has_an_end() -> None:
    try:
        raise ValueError("y" * 100_000)
    except ValueError as error:
        line = EventFormatter("ingress 0", "json").format(logged("x" * 100_000, failure=error))
    assert len(line) < 1 << 14
