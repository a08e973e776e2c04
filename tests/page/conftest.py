"""A browser, and a pipeline whose page it visits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from benchmarks.support.pipeline import Pipeline
from tests.http.server import Server
from tests.page.browser import NETWORK, SIM, Visit, Visitor, running_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline("", *SIM) as running:
        yield running


@pytest.fixture
def visit(browser: Browser, pipeline: Pipeline) -> Iterator[Visit]:
    visitors: list[Visitor] = []

    def begin(colours: str = "light", width: int = 1440, door: Server | None = None) -> Visitor:
        door = door or Server(pipeline.http_port)
        visitors.append(Visitor(browser, door, colours, width))
        return visitors[-1]

    yield begin
    for visitor in visitors:
        visitor.end([NETWORK])
