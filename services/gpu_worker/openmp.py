"""How torch's threads wait for one another on a CPU."""

from __future__ import annotations

import os

# About 50 µs: as long as the gaps between the operations of a step.
SPINS = 3000


def spin_briefly() -> None:
    """Makes OpenMP's threads sleep after a short wait; the user's own settings stay.

    Call it before torch is imported: later it has no effect.

    GNU's OpenMP spins for milliseconds before it sleeps. Where the other services need the cores
    as well, it thus takes the time of those who have work, of the very thread that it waits for
    among them, and steps become ten times slower. Sleeping at once is slow too: a thread that is
    woken at every operation tends to be put on the core of the one that woke it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
