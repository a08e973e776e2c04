from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.support.pipeline import Pipeline
from tests.pipeline.wire import Wire


@pytest.fixture
def wire(pipeline: Pipeline) -> Iterator[Wire]:
    with Wire(pipeline.endpoint) as connection:
        yield connection
