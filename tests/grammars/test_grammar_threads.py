"""Threads that compile grammars."""

from __future__ import annotations

from threading import Event
from unittest.mock import Mock

from nanovllm.grammar_threads import LARGE_BYTES, GrammarThreads


def test_the_vocabulary_is_read_before_the_first_grammar_comes() -> None:
    loaded = Event()
    GrammarThreads(Mock(side_effect=loaded.set))
    assert loaded.wait(30)


def test_a_small_grammar_waits_for_no_large_one() -> None:
    load = Mock()
    threads = GrammarThreads(load)
    release, done = Event(), Event()
    try:
        for _ in range(9):
            threads.submit(LARGE_BYTES + 1, lambda _: release.wait(60))
        threads.submit(LARGE_BYTES, lambda _: done.set())
        assert done.wait(30)
    finally:
        release.set()
    load.assert_called_once_with()
