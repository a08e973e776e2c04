"""Threads that compile grammars."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from threading import Event
from unittest.mock import Mock

from nanovllm.grammar_threads import LARGE_BYTES, THREADS, GrammarThreads
from nanovllm.grammars import Grammars
from nanovllm.protocol import StructuredOutputs

MOST_TURNS = 100_000


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


def test_a_grammar_is_worked_on_again_after_work_has_raised() -> None:
    begun, release = Event(), Event()
    worked: SimpleQueue[Sequence[int]] = SimpleQueue()

    def work(_: Future[Grammars], requests: Sequence[int]) -> None:
        begun.set()
        assert release.wait(60)
        worked.put(requests)
        raise ValueError

    threads = GrammarThreads(Mock(), work)
    grammar = StructuredOutputs(regex="a")
    threads.submit(grammar, 0)
    assert begun.wait(30)
    threads.submit(grammar, 1)  # while the first is worked on
    release.set()
    assert [worked.get(timeout=30) for _ in range(2)] == [[0], [1]]
    threads.submit(grammar, 2)
    assert worked.get(timeout=30) == [2]


def test_grammars_that_are_asked_for_without_pause_keep_no_other_waiting() -> None:
    done = Event()
    turns = count()

    def work(_: Future[Grammars], requests: Sequence[StructuredOutputs | None]) -> None:
        for grammar in requests:
            if grammar is None:
                done.set()
            elif not done.is_set() and next(turns) < MOST_TURNS:
                threads.submit(grammar, grammar)

    threads = GrammarThreads[StructuredOutputs | None](Mock(), work)
    for number in range(2 * THREADS):
        grammar = StructuredOutputs(regex=f"a{number}")
        threads.submit(grammar, grammar)
    threads.submit(StructuredOutputs(regex="b"), None)
    assert done.wait(30)
    assert next(turns) < MOST_TURNS
