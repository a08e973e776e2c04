"""The log: one event a line, as text or as a JSON object.

A service that the launcher started writes JSON, and the launcher shows the events in its format.
"""

from __future__ import annotations

import datetime
import logging
import sys
import threading
import time
from typing import Final, Literal

import msgspec

LogFormat = Literal["text", "json"]
# What an event keeps of a message, in characters, and of a traceback its end: an event with both
# is one line that the launcher reads whole.
LONGEST_MESSAGE: Final = 3000
LONGEST_TRACEBACK: Final = 6000


class Event(msgspec.Struct, omit_defaults=True):
    """One event.

    Attributes:
        time: ISO 8601, with milliseconds and the offset from UTC.
        level: a level of `logging` in lower case; None for output that no logger wrote.
        service: role and index, or "supervisor".
        message: may have several lines.
        traceback: of an exception.
    """

    time: str
    level: str | None
    service: str
    message: str
    traceback: str | None = None

    @property
    def lines(self) -> list[str]:
        return f"{self.message}\n{self.traceback or ''}".splitlines()


_decoder = msgspec.json.Decoder(Event)


def render(event: Event, log_format: LogFormat) -> str:
    """The event as a line; in text, an event with several lines is as many."""
    if log_format == "json":
        return msgspec.json.encode(event).decode()
    when = event.time[:23].replace("T", " ")
    head = f"{when} {(event.level or '-').upper():7} {event.service} |"
    return "\n".join(f"{head} {line}" for line in event.lines)


def event_of(line: str, service: str) -> Event:
    """The event that a service wrote as `line`; an event of its own for any other output."""
    if line.startswith('{"time":'):
        try:
            return _decoder.decode(line)
        except msgspec.DecodeError:  # cut, as nobody read it in time
            pass
    return Event(_iso(time.time()), None, service, line)


class EventFormatter(logging.Formatter):
    """Formats the records of one service."""

    def __init__(self, service: str, log_format: LogFormat) -> None:
        super().__init__()
        self._service = service
        self._log_format = log_format

    def format(self, record: logging.LogRecord) -> str:
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        event = Event(
            _iso(record.created),
            record.levelname.lower(),
            self._service,
            record.getMessage()[:LONGEST_MESSAGE],
            traceback and traceback[-LONGEST_TRACEBACK:],
        )
        return render(event, self._log_format)


def log_to_stderr(service: str, log_format: LogFormat, level: str) -> None:
    """Logs to stderr from now on, Python's warnings and exceptions that nothing catches too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(EventFormatter(service, log_format))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    log = logging.getLogger(__name__)
    sys.excepthook = lambda *what: log.critical("ends with an exception", exc_info=what)
    threading.excepthook = lambda thread: log.critical(
        "a thread ends with an exception",
        exc_info=thread.exc_value,
    )


def _iso(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds).astimezone()
    return moment.isoformat(timespec="milliseconds")
