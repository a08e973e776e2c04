"""What the tests of keys share: a running pipeline with keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.keys.locked import Locked, locked_pipeline


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """For all tests of a run."""
    with locked_pipeline(tmp_path_factory.mktemp("keys")) as running:
        yield running
