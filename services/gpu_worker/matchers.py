"""The matchers of sequences that have a grammar: made before a sequence takes a slot, and advanced
by the tokens of each step. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from nanovllm.grammar_threads import LARGE_BYTES, GrammarThreads
from nanovllm.grammars import GrammarError, Grammars, MaskFiller, Masks, Matcher, copy_of
from nanovllm.mailbox import Mailbox
from nanovllm.messages import Admission, Prepare, Prepared, unpack


class Preparer:
    """Makes matchers on threads, so that no step waits for a grammar. The loop's thread calls all
    methods.

    Args:
        load: reads the vocabulary, see `GrammarThreads`.
    """

    def __init__(self, load: Callable[[], Grammars]) -> None:
        self._threads = GrammarThreads(load, self._make)
        self._mailbox: Mailbox[tuple[int, Matcher | None]] = Mailbox()
        self._expected: set[int] = set()
        self._prepared: dict[int, Matcher | None] = {}

    @property
    def descriptor(self) -> int:
        """Readable when there are reports."""
        return self._mailbox.descriptor

    def prepare(self, message: Prepare) -> None:
        if message.number in self._prepared:  # the answer may be lost
            self._mailbox.put((message.number, self._prepared[message.number]))
        elif message.number not in self._expected:
            self._expected.add(message.number)
            self._threads.submit(message.structured_outputs, message)

    def keep(self, numbers: Iterable[int]) -> None:
        self._expected.intersection_update(numbers)
        self._prepared = {n: m for n, m in self._prepared.items() if n in self._expected}

    def reset(self) -> None:
        self.keep(())

    def makes(self, number: int) -> bool:
        """Whether the matcher is prepared, or in preparation."""
        return number in self._expected

    def take(self, admissions: Iterable[Admission]) -> dict[int, Matcher]:
        """The matchers of sequences that take slots, by slot."""
        taken: dict[int, Matcher] = {}
        for admission in admissions:
            if admission.matcher is not None:
                matcher = self._prepared.pop(admission.matcher)
                self._expected.remove(admission.matcher)
                if matcher is None:
                    raise ValueError(f"the matcher of slot {admission.slot} could not be prepared")
                taken[admission.slot] = matcher
        return taken

    def reports(self) -> list[Prepared]:
        """The matchers prepared since the last call."""
        found: list[Prepared] = []
        for number, matcher in self._mailbox.take():
            if number in self._expected:
                self._prepared[number] = matcher
                found.append(Prepared(number, failed=matcher is None))
        return found

    def _make(self, grammars: Future[Grammars], messages: Sequence[Prepare]) -> None:
        made: list[tuple[int, Matcher | None]] = []
        for message in messages:
            try:
                made.append((message.number, _matcher(grammars.result(), message)))
            except BaseException as error:  # the loop raises it again, which ends the process
                self._mailbox.put(error)
            if message.output:  # to replay an output takes as long as to make many matchers
                self._mailbox.put(*made)
                made = []
        self._mailbox.put(*made)


def _matcher(grammars: Grammars, message: Prepare) -> Matcher | None:
    """The matcher, or None if there can be none."""
    small = message.structured_outputs.size <= LARGE_BYTES
    try:
        return grammars.matcher(
            message.structured_outputs,
            message.answer_marks,
            unpack(message.output).tolist(),
            alone=message.alone,
            copy=copy_of(message.number) if small else 0,  # as on each rank
        )
    except GrammarError:
        return None


class SlotMatchers:
    """Which matcher each slot has, and which matchers the tokens of the latest step belong to."""

    def __init__(self) -> None:
        self._filler = MaskFiller()
        self._of_slot: dict[int, Matcher] = {}
        # Of the latest step: the rows with a grammar, and their matchers.
        self._rows = np.empty(0, dtype=np.int32)
        self._awaiting: Sequence[Matcher] = ()

    def admit(self, matchers: Mapping[int, Matcher]) -> None:
        self._of_slot.update(matchers)

    def reset(self) -> None:
        self._of_slot.clear()
        self._awaiting = ()

    @property
    def awaits_tokens(self) -> bool:
        """Whether matchers must be advanced before the next masks are filled."""
        return bool(self._awaiting)

    def advance(self, token_ids: NDArray[np.int32]) -> None:
        """Takes the tokens of the step that `fill` was called for last."""
        for token_id, matcher in zip(token_ids[self._rows].tolist(), self._awaiting, strict=True):
            matcher.advance(token_id)
        self._awaiting = ()

    def of(self, slots: NDArray[np.int32]) -> list[Matcher]:
        """The matchers that the slots have now."""
        return [self._of_slot[slot] for slot in slots.tolist()]

    def fill(self, rows: NDArray[np.int32], matchers: Sequence[Matcher], masks: Masks) -> list[int]:
        """Fills the masks of a step's rows.

        Args:
            rows: int32 [n], of those that the step samples, the rows that have a grammar.
            matchers: the rows' own.
            masks: int32 [n, words], C-contiguous.

        Returns:
            The indices, in `rows`, of those whose matcher failed: their masks are empty.
        """
        self._rows, self._awaiting = rows, matchers
        return self._filler.fill(matchers, masks)
