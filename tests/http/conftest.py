"""A server before the pipeline that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.support.pipeline import Pipeline
from tests.http.server import Server, serving


@pytest.fixture(scope="session")
def server(pipeline: Pipeline) -> Iterator[Server]:
    with serving(pipeline.endpoint) as running:
        yield running
