"""Tells a service manager how the launcher does, as sd_notify(3) of systemd does."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import MutableMapping
from typing import Final

log = logging.getLogger(__name__)

# When a manager that is busy is told again.
RETRY_S: Final = 0.1


class Notifier:
    """The socket that the variable NOTIFY_SOCKET names; without the variable nobody is told.

    Args:
        environment: what the service manager has set in it is removed, so that no service has it.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        period_us = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", "") in ("", str(os.getpid()))
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        pings = watched and period_us.isdecimal() and int(period_us) > 0
        self._ping_every_s = int(period_us) / 2e6 if pings else math.inf
        self._ping_at = 0.0 if pings else math.inf
        self._told: dict[str, str] = {}

    def tell(self, now: float, status: str, *, ready: bool = False, stopping: bool = False) -> None:
        """Tells what is new since the last call, and pings the watchdog when that is due."""
        news = {"STATUS": status}
        if ready:
            news["READY"] = "1"
        if stopping:
            news["STOPPING"] = "1"
        news = {name: value for name, value in news.items() if self._told.get(name) != value}
        pings = {"WATCHDOG": "1"} if now >= self._ping_at else {}
        if not news and not pings:
            return
        sent = self._send({**news, **pings})
        if sent:
            self._told |= news
        if pings:
            self._ping_at = now + (self._ping_every_s if sent else RETRY_S)

    def wait_s(self, now: float) -> float:
        """The seconds until `tell` must be called again."""
        return math.inf if self._socket is None else max(0.0, self._ping_at - now)

    def _send(self, assignments: dict[str, str]) -> bool:
        """Returns False if nobody is told now."""
        if self._socket is None:
            return False
        text = "\n".join(f"{name}={value}" for name, value in assignments.items())
        try:
            self._socket.sendto(text.encode(), self._address)
        except BlockingIOError:
            return False  # the manager is busy: `tell` is called again
        except OSError as error:
            log.warning("the service manager cannot be told: %s", error.strerror or error)
            self._socket.close()
            self._socket = None
            return False
        return True
