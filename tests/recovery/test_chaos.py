"""Services are killed and stopped at random: a short run of `tests.chaos`."""

from __future__ import annotations

import random

import pytest

from tests.chaos import wreak_havoc

# One of each service and rank, of two tokenizers and two detokenizers.
KILLS = 8


@pytest.mark.parametrize(("device", "http"), [("sim", False), ("cpu", True)])
def test_nothing_is_lost_whatever_dies(device: str, http: bool) -> None:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    figures = wreak_havoc(KILLS, 40, device, tp=2, seed=seed, pauses_s=(0.3, 1.2), http=http)
    assert sum(figures["kills"].values()) == KILLS
    assert figures["streams"]["hit"] >= 40
    assert figures["changed"] == 0
    if http:
        assert all(figures["chats"].values())
