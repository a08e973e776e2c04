"""Clients with keys, and what a key that was taken back still opens: nothing."""

from __future__ import annotations

import asyncio

import pytest
from click.testing import CliRunner

from nanovllm import AsyncClient, Client, PipelineUnavailable, SamplingParams
from nanovllm.client.cli import main
from nanovllm.control import IngressStats
from tests.keys.cutting import cutting_proxy
from tests.keys.locked import Locked

TIMEOUT_S = 60.0
LONG = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)


def test_a_client_with_a_key_gets_what_a_local_one_gets(locked: Locked) -> None:
    key = locked.client_key("alice")
    with (
        Client(locked.pipeline.endpoint, TIMEOUT_S) as local,
        Client(locked.endpoint, TIMEOUT_S, keys=key) as remote,
    ):
        stream = remote.generate("Once", LONG, stream=True)
        assert "".join(delta.text for delta in stream) == local.generate("Once", LONG).text

    async def ask() -> str:
        async with AsyncClient(locked.endpoint, TIMEOUT_S, keys=key) as client:
            return (await client.generate("Once", LONG)).text

    assert asyncio.run(ask()) == stream.result().text


def test_a_stream_that_is_closed_is_aborted(locked: Locked) -> None:
    with Client(locked.endpoint, TIMEOUT_S, keys=locked.client_key("abel")) as client:
        with client.generate("Once", ENDLESS, stream=True) as stream:
            next(stream)
        locked.pipeline.stats_once(IngressStats, lambda stats: stats.requests == 0)


def test_a_stream_whose_connection_is_cut_goes_on(locked: Locked) -> None:
    with (
        Client(locked.pipeline.endpoint, TIMEOUT_S) as local,
        cutting_proxy(locked.port, 3000, 2000) as proxy,
        Client(proxy.endpoint, TIMEOUT_S, keys=locked.client_key("grace")) as remote,
    ):
        stream = remote.generate("Once", LONG, stream=True)
        assert stream.result().text == local.generate("Once", LONG).text
        assert proxy.left == []


def test_commands_take_a_key(locked: Locked) -> None:
    words = ["generate", "Once", "--max-tokens", "4", "--endpoint", locked.endpoint, "--keys"]
    ran = CliRunner().invoke(main, [*words, locked.client_key("carol")])
    assert ran.exit_code == 0, ran.output


def test_without_a_key_a_client_is_told_at_once(locked: Locked) -> None:
    with (
        Client(locked.endpoint, timeout=600) as client,
        pytest.raises(PipelineUnavailable, match=r"wants a key.*NANOVLLM_KEYS"),
    ):
        client.ping()


def test_a_key_taken_back_opens_nothing_and_ends_its_connections(
    locked: Locked,
) -> None:
    with (
        Client(locked.endpoint, timeout=600, keys=locked.client_key("dave")) as gone,
        Client(locked.endpoint, TIMEOUT_S, keys=locked.client_key("eve")) as stays,
    ):
        streams = [client.generate("Once", ENDLESS, stream=True) for client in (gone, stays)]
        for stream in streams:
            next(stream)
        locked.take_back("dave")
        with pytest.raises(PipelineUnavailable, match="does not take this client's key"):
            streams[0].result()
        with pytest.raises(PipelineUnavailable, match="does not take this client's key"):
            gone.ping()
        next(streams[1])
        # No request of the other is left, and this one was never disturbed.
        locked.pipeline.stats_once(IngressStats, lambda stats: stats.requests == 1)
        streams[1].close()
