"""Items of threads reach the loop once each, and wake it."""

from __future__ import annotations

import select
import threading

import pytest

from nanovllm.mailbox import Mailbox

THREADS = 4
ITEMS = 2000


def readable(mailbox: Mailbox[int], timeout_s: float) -> bool:
    return bool(select.select([mailbox.descriptor], [], [], timeout_s)[0])


def test_no_item_of_a_thread_is_lost_or_wakes_twice() -> None:
    mailbox = Mailbox[int]()

    def put(first: int) -> None:
        for item in range(first, THREADS * ITEMS, THREADS):
            mailbox.put(item)

    threads = [threading.Thread(target=put, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    while len(taken) < THREADS * ITEMS:
        assert readable(mailbox, 30), f"{len(taken)} items in 30 s"
        found = mailbox.take()
        assert found
        taken += found
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(THREADS * ITEMS))
    assert [i for i in taken if i % THREADS == 1] == list(range(1, THREADS * ITEMS, THREADS))
    assert not readable(mailbox, 0)
    assert not mailbox.take()


def test_an_exception_is_raised_where_items_are_taken() -> None:
    mailbox = Mailbox[int]()
    mailbox.put(1)
    mailbox.put(ValueError("a thread ended"))
    with pytest.raises(ValueError, match="a thread ended"):
        mailbox.take()
