"""Threads that compile grammars."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event
from unittest.mock import Mock

from nanovllm.grammar_threads import LARGE_BYTES, GrammarThreads
from nanovllm.grammars import Grammars
from nanovllm.protocol import StructuredOutputs


def test_the_vocabulary_is_read_before_the_first_grammar_comes() -> None:
    loaded = Event()
    GrammarThreads[None](Mock(side_effect=loaded.set), Mock())
    assert loaded.wait(30)


def test_a_small_grammar_waits_for_no_large_one() -> None:
    load = Mock()
    release, done = Event(), Event()

    def work(_: Future[Grammars], requests: Sequence[Event]) -> None:
        for event in requests:
            if event is done:
                done.set()
            else:
                event.wait(60)

    threads = GrammarThreads(load, work)
    try:
        for number in range(9):
            threads.submit(StructuredOutputs(regex=f"{number}" * (LARGE_BYTES + 1)), release)
        threads.submit(StructuredOutputs(regex="a" * LARGE_BYTES), done)
        assert done.wait(30)
    finally:
        release.set()
    load.assert_called_once_with()


def test_requests_with_one_grammar_wait_for_one_compilation() -> None:
    begun, release = Event(), Event()
    worked: SimpleQueue[Sequence[int]] = SimpleQueue()

    def work(_: Future[Grammars], requests: Sequence[int]) -> None:
        begun.set()
        worked.put(requests)
        assert release.wait(60)

    threads = GrammarThreads(Mock(), work)
    grammar, other = (StructuredOutputs(regex=letter) for letter in "ab")
    try:
        threads.submit(grammar, 0)
        assert begun.wait(30)
        for number in range(1, 100):
            threads.submit(grammar, number)
        threads.submit(other, 100)
        assert [worked.get(timeout=30) for _ in range(2)] == [[0], [100]]
    finally:
        release.set()
    assert worked.get(timeout=30) == [*range(1, 100)]
    threads.submit(grammar, 101)
    assert worked.get(timeout=30) == [101]
