"""Clients with keys, and what a key that was taken back still opens: nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq
from click.testing import CliRunner
from zmq.utils.monitor import parse_monitor_message

from benchmarks.support.pipeline import Pipeline
from nanovllm import AsyncClient, Client, PipelineUnavailable, SamplingParams
from nanovllm.client.cli import main
from nanovllm.control import IngressStats
from nanovllm.keys import client_keys, make_keys
from nanovllm.transport.curve import secure_to_connect
from tests.keys.bad_network import bad_network
from tests.keys.locked import Locked
from tests.readers import free_tcp_endpoint

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
        bad_network(locked.port, cuts=(3000, 2000)) as network,
        Client(network.endpoint, TIMEOUT_S, keys=locked.client_key("grace")) as remote,
    ):
        stream = remote.generate("Once", LONG, stream=True)
        assert stream.result().text == local.generate("Once", LONG).text
        assert network.cuts == []


def test_whoever_tampers_with_a_connection_can_end_it_alone(locked: Locked) -> None:
    """In ZMTP's greeting, in each command of the handshake, or in a message."""
    with (
        Client(locked.pipeline.endpoint, TIMEOUT_S) as local,
        bad_network(locked.port, flips=(3, 12, 70, 150, 280, 330, 500, 540, 600)) as network,
        Client(network.endpoint, TIMEOUT_S, keys=locked.client_key("judy")) as remote,
    ):
        completion = None
        while network.flips:
            with contextlib.suppress(PipelineUnavailable):  # it cannot tell who has answered
                completion = remote.generate("Once", LONG, stream=True).result()
        text = local.generate("Once", LONG).text
        assert remote.generate("Once", LONG, stream=True).result().text == text
        assert completion is None or completion.text == text
    assert all(service.restarts == 0 for service in locked.pipeline.status().services)


@pytest.mark.parametrize(
    "words", ["generate Once --max-tokens 4", "bench --requests 4 --warm-up 0 --output 4"]
)
def test_commands_take_a_key(locked: Locked, words: str) -> None:
    command, *arguments = words.split()
    key = locked.client_key(f"for-{command}")
    where = ["--endpoint", locked.endpoint, "--keys", key]
    ran = CliRunner().invoke(main, [command, *arguments, *where])
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


def test_a_key_taken_back_before_its_first_frame_gets_no_answer(locked: Locked) -> None:
    curve = client_keys(locked.endpoint, locked.client_key("heidi"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    secure_to_connect(dealer, locked.endpoint, curve)
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    def next_event() -> int:
        assert monitor.poll(int(TIMEOUT_S * 1000))
        return parse_monitor_message(monitor.recv_multipart())["event"]

    dealer.connect(locked.endpoint)
    assert next_event() == zmq.EVENT_HANDSHAKE_SUCCEEDED
    locked.take_back("heidi")
    dealer.send(msgspec.msgpack.encode({"type": "ping"}))
    assert next_event() == zmq.EVENT_DISCONNECTED
    assert not dealer.poll(0)
    monitor.close()
    context.destroy(linger=0)


def test_a_key_of_another_pipeline_is_refused(locked: Locked, tmp_path: Path) -> None:
    """Even if its owner knows the public key of this one's client socket."""
    (*_, file) = make_keys(tmp_path, "mallory")
    with (
        Client(locked.endpoint, timeout=0.5, keys=str(file)) as client,
        pytest.raises(PipelineUnavailable, match="is the key one of another pipeline's"),
    ):
        client.ping()
    ours, theirs = (client_keys(locked.endpoint, str(keys)) for keys in (locked.keys, file))
    assert ours is not None
    assert theirs is not None
    file.write_text(file.read_text().replace(theirs.server.decode(), ours.server.decode()))
    with (
        Client(locked.endpoint, timeout=600, keys=str(file)) as client,
        pytest.raises(PipelineUnavailable, match="does not take this client's key"),
    ):
        client.ping()


def test_a_client_with_a_key_is_told_that_a_pipeline_takes_none(
    tmp_path: Path, start_pipeline: Callable[..., Pipeline]
) -> None:
    endpoint = free_tcp_endpoint()
    start_pipeline("", "--device", "sim", "--ingress", endpoint)
    (*_, file) = make_keys(tmp_path, "ivan")
    with (
        Client(endpoint, timeout=600, keys=str(file)) as client,
        pytest.raises(PipelineUnavailable, match="takes no keys"),
    ):
        client.ping()
