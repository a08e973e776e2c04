"""How the ranks, all on one machine, find one another without a port that is agreed upon."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

HOST = "127.0.0.1"
# For joining, and for any collective while a slower rank still loads. A rank that died is noticed
# by the link between the ranks, at once.
TIMEOUT = timedelta(minutes=30)


def listen() -> TCPStore:
    """Rank 0's store, on a free port (its `port`); does not wait for the others."""
    # A socket of our own: the store's would listen on every interface, and trusts whoever comes.
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        HOST,
        port,
        is_master=True,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reach(port: int) -> TCPStore:
    """Rank 0's store, for another rank."""
    return TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)
