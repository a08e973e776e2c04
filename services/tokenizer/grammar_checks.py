"""Whether grammars can be served: found out on threads, so that a costly grammar delays its own
request alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from nanovllm.grammar_threads import GrammarThreads
from nanovllm.grammars import GrammarError, Grammars
from nanovllm.mailbox import Mailbox
from nanovllm.messages import AnswerMarks, Refused, Tokenize, Tokenized, unpack_list
from nanovllm.protocol import StructuredOutputs

log = logging.getLogger(__name__)


class GrammarChecks:
    """Checks grammars.

    Args:
        load: reads the vocabulary, see `GrammarThreads`.
    """

    def __init__(self, load: Callable[[], Grammars]) -> None:
        self._mailbox: Mailbox[Tokenized | Refused] = Mailbox()
        self._threads = GrammarThreads(load, self._check)

    @property
    def descriptor(self) -> int:
        """Readable when there are answers."""
        return self._mailbox.descriptor

    def start(self, request: Tokenize, answer: Tokenized) -> None:
        """Begins the check of a request; `answer` is due if its grammar can be served."""
        asked = answer.sampling.structured_outputs
        if asked is None:
            raise ValueError(f"request {request.uid:x} has no grammar")
        self._threads.submit(asked, (request, answer))

    def take(self) -> list[Tokenized | Refused]:
        """The answers since the last call."""
        return self._mailbox.take()

    def _check(
        self, grammars: Future[Grammars], requests: Sequence[tuple[Tokenize, Tokenized]]
    ) -> None:
        self._mailbox.put(*(_checked(grammars, *one) for one in requests))


def _checked(
    grammars: Future[Grammars], request: Tokenize, answer: Tokenized
) -> Tokenized | Refused:
    try:
        return checked(grammars.result(), request, answer)
    except BaseException:  # whatever a grammar brings about ends this request, and no other
        log.exception("the grammar of request %x could not be checked", request.uid)
        return Refused(request.uid, "internal", "the grammar could not be checked")


def checked(grammars: Grammars, request: Tokenize, answer: Tokenized) -> Tokenized | Refused:
    """`answer`, or the reason why the request's grammar cannot be served."""
    asked = answer.sampling.structured_outputs
    if asked is None:
        return answer
    resumed = unpack_list(request.resumed)
    stops = {*answer.sampling.stop_token_ids}
    end = next((i for i, token in enumerate(resumed, 1) if token in stops), len(resumed))
    key = "sampling.structured_outputs"
    try:
        if not grammars.matcher(asked).has_begin:
            raise GrammarError("no text fits, or the grammar takes too much work")
    except GrammarError as error:
        return Refused(request.uid, "invalid_request", f"{key}: {error}")
    try:
        if resumed:
            _follow(grammars, asked, answer.answer_marks, resumed[:end])
    except GrammarError as error:
        return Refused(request.uid, "invalid_request", f"resume_token_ids: {key} {error}")
    return answer


def _follow(
    grammars: Grammars,
    asked: StructuredOutputs,
    marks: AnswerMarks | None,
    output: Sequence[int],
) -> None:
    """Raises GrammarError if the grammar does not take the output."""
    try:
        grammars.matcher(asked, marks, output)
    except GrammarError:
        if grammars.matcher(asked).has_begin:
            raise
        # All outputs together took too much work. This output alone may not.
        grammars.matcher(asked, marks, output, alone=True)
