"""File locks have one holder at a time, also while holders come and go."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.launch.runtime_dir import runtime_dir
from nanovllm.settings import SettingsError
from nanovllm.transport.endpoints import EndpointTaken, bind

Holds = Callable[[Path], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def runtime(path: Path) -> Iterator[None]:
    try:
        with runtime_dir(path):
            yield
    except SettingsError as error:
        if "in use by another" not in str(error):
            raise
        raise BlockingIOError from None


@contextlib.contextmanager
def endpoint(path: Path) -> Iterator[None]:
    try:
        release = bind(f"ipc://{path}", lambda: None)
    except EndpointTaken:
        raise BlockingIOError from None
    try:
        yield
    finally:
        release()


@pytest.fixture(params=[runtime, endpoint])
def held(request: pytest.FixtureRequest) -> Holds:
    made: Holds = request.param
    return made


def test_a_lock_on_a_removed_file_holds_nothing(
    held: Holds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the second one's open and its lock, the first one ends and a third one begins."""
    path = tmp_path / "here"
    first, third = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(held(path))
    lock = fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.close()
        third.enter_context(held(path))
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with third:
        with pytest.raises(BlockingIOError), held(path):
            pass
        with pytest.raises(BlockingIOError), held(path):
            pass
    with held(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_directory_that_goes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "here"
    first = contextlib.ExitStack()
    first.enter_context(runtime(path))
    make = Path.mkdir

    def make_early(self: Path, **kwargs: Any) -> None:
        monkeypatch.setattr(Path, "mkdir", make)
        make(self, **kwargs)
        first.close()

    monkeypatch.setattr(Path, "mkdir", make_early)
    with runtime(path):
        assert path.is_dir()
        with pytest.raises(BlockingIOError), runtime(path):
            pass
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "launch.lock").symlink_to(tmp_path / "missing" / "file")
    with pytest.raises(SettingsError, match="cannot be used: No such file"), runtime_dir(tmp_path):
        pass
