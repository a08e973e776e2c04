"""A pipeline on a Ray cluster of local nodes, whose nodes and actors die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest

pytest.importorskip("ray")

import ray
from ray.util import list_named_actors, placement_group_table

from benchmarks.support.on_ray import OnRay, on_ray
from nanovllm.keys import make_keys
from nanovllm.settings import KEYS_VARIABLE
from tests.machines.ports import free_services
from tests.recovery.streams import (
    MODEL_STOPS,
    TIMEOUT_S,
    Outcome,
    Streams,
    mixed_cases,
    undisturbed,
)

CASES = mixed_cases(MODEL_STOPS)
HTTP_CASES = (CASES * 3)[:32]
LOOK_AGAIN_S = 0.1


class Served(NamedTuple):
    """A pipeline of two engines on the cluster, by its addresses; and what it says of each case
    while nothing is killed."""

    on: OnRay
    http: str
    ingress: str
    keys: Path
    expected: dict[str, list[Outcome]]

    def check(self, streams: Streams, over: str) -> None:
        for number, outcome, _ in streams.finish():
            assert outcome == self.expected[over][number], f"case {number}"

    def engines(self) -> dict[int, str]:
        """The node of each engine that is ready."""
        _, engines = self.on.cluster.state()
        groups = {group["name"]: group for group in placement_group_table().values()}
        return {
            number: groups[f"nanovllm:engine-{number}"]["bundles_to_node_id"][0]
            for number, state in engines.items()
            if state.ready
        }

    def address(self) -> str:
        """Where the ingress is for clients elsewhere."""
        head, _ = self.on.cluster.state()
        return "" if head is None else head.addresses.get("ingress", "")

    def remove_node(self, node_id: str) -> None:
        nodes = self.on.nodes
        (node,) = (node for node in nodes.worker_nodes if node.node_id == node_id)
        nodes.remove_node(node, allow_graceful=False)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(LOOK_AGAIN_S)


def wait_until_nothing_is_left(on: OnRay, name: str = "") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while left := [one for one in left_behind(on) if name in one]:
        assert time.monotonic() < deadline, left
        time.sleep(LOOK_AGAIN_S)


def _node(_: object) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def pid_of(actor: str, namespace: str = "nanovllm") -> int:
    ask = ray.get_actor(actor, namespace).__ray_call__
    pid: int = ray.get(ask.remote(lambda _: os.getpid()), timeout=TIMEOUT_S)
    return pid


def launched_by(pid: int) -> list[psutil.Process]:
    """The launcher of an actor's process, and its services."""
    children: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    return children


def left_behind(on: OnRay) -> list[str]:
    """The processes, actors, placement groups and files of pipelines that are there."""
    here = {"TMPDIR": str(on.directory)}.items()
    found = [str(path) for path in on.directory.glob("nanovllm-*")]
    found += list_named_actors(all_namespaces=True)
    groups = placement_group_table().values()
    found += [group["name"] for group in groups if group["state"] != "REMOVED"]
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            if here <= process.environ().items() and (
                "nanovllm." in words or words.startswith(("ray::Head", "ray::Engine"))
            ):
                found.append(words)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def on() -> Iterator[OnRay]:
    """This program's node, which has room for nothing, and four with room for the head or an
    engine."""
    with on_ray((0, 1, 1, 1, 1)) as running:
        yield running


@pytest.fixture(scope="module")
def served(on: OnRay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys")
    *_, key = make_keys(keys, "tester")
    ingress, http = free_services(), free_services().replace("tcp", "http")
    on.command(
        *("up", "--engines", "2", "--device", "cpu", "--dtype", "float32", "--keys", str(keys)),
        *("--port", free_services().rpartition(":")[2], "--http", http.removeprefix("http://")),
        *("--ingress", ingress.replace("127.0.0.1", "*")),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEYS_VARIABLE, str(key))
        expected = {http: undisturbed(http, HTTP_CASES), ingress: undisturbed(ingress, CASES)}
        yield Served(on, http, ingress, keys, expected)
        on.command("down")


def test_streams_survive_the_death_of_a_node(served: Served) -> None:
    """All that ran on the node dies, and its engine is back on another one."""
    node = served.engines()[1]
    died = launched_by(pid_of("engine-1"))
    assert len(died) == 3  # the launcher, the scheduler and its worker
    over_http, over_zmq = Streams(served.http, HTTP_CASES), Streams(served.ingress, CASES)
    for streams in (over_http, over_zmq):
        streams.wait_for_news()
    served.remove_node(node)
    psutil.wait_procs(died, TIMEOUT_S)
    assert not any(process.is_running() for process in died)
    wait_until(lambda: len(served.engines()) == 2)
    assert node not in served.engines().values()
    for streams in (over_http, over_zmq):
        streams.wait_for_news()
    served.check(over_http, served.http)
    served.check(over_zmq, served.ingress)


def test_clients_resume_when_the_head_is_back(served: Served) -> None:
    """At the same address, since no other node has room: its engines have not started anew."""
    engines = [launched_by(pid_of(f"engine-{number}")) for number in served.engines()]
    streams = Streams(served.ingress, CASES)
    streams.wait_for_news()
    pid, address = pid_of("head"), served.address()
    died = launched_by(pid)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(died, TIMEOUT_S)
    streams.wait_for_news()
    served.check(streams, served.ingress)
    assert served.address() == address
    assert all(process.is_running() for launched in engines for process in launched)


def test_engines_come_and_go_under_streams(served: Served) -> None:
    served.on.add_node(1)
    streams = Streams(served.http, HTTP_CASES)
    for count in (3, 1, 2):
        streams.wait_for_news()
        served.on.command("scale", "engine", str(count))
        assert len(served.engines()) == count
    streams.wait_for_news()
    served.check(streams, served.http)


def test_a_head_on_another_node_says_its_address(served: Served) -> None:
    """Its engines start anew, and join it there."""
    before = served.address()
    streams = Streams(served.ingress, CASES)
    streams.wait_for_news()
    served.remove_node(ray.get(ray.get_actor("head").__ray_call__.remote(_node), timeout=TIMEOUT_S))
    streams.wait_for_news()
    served.check(streams, served.ingress)
    # The streams may have ended before Ray knows that the node is gone.
    wait_until(lambda: served.address() not in ("", before))
    shown = served.on.command("status")
    assert served.address() in shown
    served.on.add_node(1)


def test_an_engine_whose_actor_dies_is_back(served: Served) -> None:
    pid = pid_of("engine-0")
    died = launched_by(pid)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs(died, TIMEOUT_S)
    wait_until(lambda: len(served.engines()) == 2 and pid_of("engine-0") != pid)


def test_the_status_says_which_engine_is_which(served: Served) -> None:
    shown, table = served.on.command("status").split("\n\n", 1)
    numbers = re.findall(r"^engine +\d+ .* ready, as the pipeline's engine (\d+)$", shown, re.M)
    assert len({*numbers}) == 2
    for number in numbers:
        assert re.search(rf"^\S+ +scheduler {number} .* ready ", table, re.M)


def test_keys_are_in_no_command_line_and_no_log(served: Served) -> None:
    services = served.keys / "services.key"
    (secret,) = re.findall(r'secret-key = "(.*)"', services.read_text())
    held = [*served.on.directory.glob("nanovllm-ray-*/keys/services.key")]
    assert len(held) == 3  # the head's and the engines'
    for file in held:
        assert secret in file.read_text()
        assert file.stat().st_mode & 0o777 == 0o600
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            assert secret not in " ".join(process.cmdline())
    logs = [file for file in served.on.directory.glob("ray/session_*/logs/**/*") if file.is_file()]
    assert logs
    assert not [file for file in logs if secret.encode() in file.read_bytes()]


def test_a_second_pipeline_of_the_same_name_is_refused(served: Served) -> None:
    with pytest.raises(RuntimeError, match="a pipeline 'nanovllm' runs there"):
        served.on.command("up")


def test_down_leaves_nothing(served: Served) -> None:
    assert left_behind(served.on)
    assert served.on.command("down").endswith("everything has ended\n")
    wait_until_nothing_is_left(served.on)
    assert served.on.command("down") == "there was nothing to end\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("/no/such/model",), "the head cannot start: no such model: /no/such/model"),
        (
            ("/no/such/model", "--log-format", "json"),
            r"^Error: the head cannot start: no such model: /no/such/model is [^\"{}]*$",
        ),
        (("--name", ""), "--name is empty"),
        (("--engines", "0"), "--engines is 0: name one"),
        (("--ingress", "tcp://127.0.0.1:5555"), "--ingress: only clients with keys reach it"),
    ],
)
def test_what_cannot_start_says_why_and_leaves_nothing(
    on: OnRay, words: tuple[str, ...], why: str
) -> None:
    with pytest.raises(RuntimeError, match=why):
        on.command("up", "--name", "other", *words)
    wait_until_nothing_is_left(on, "other")


def test_a_port_that_is_taken_is_named(on: OnRay) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(RuntimeError, match=r"cannot start: --port: --services .* is taken"):
            on.command("up", "--name", "other", "--port", port, "--http", "")
    wait_until_nothing_is_left(on, "other")


def test_down_ends_an_up_that_waits(on: OnRay) -> None:
    """It says what has happened, though launchers of its engines end with the pipeline."""
    up = on.start(
        *("up", "--name", "other", "--engines", "6", "--device", "sim", "--http", ""),
        *("--port", free_services().rpartition(":")[2]),
    )
    assert up.stdout is not None
    assert "no node has a CPU free for engine" in up.stdout.readline()
    wait_until(lambda: "ready" in on.command("status", "--name", "other").partition("MACHINE")[0])
    assert on.command("down", "--name", "other").endswith("everything has ended\n")
    printed, _ = up.communicate(timeout=TIMEOUT_S)
    assert printed == "Error: another command has ended the engines meanwhile\n"
    wait_until_nothing_is_left(on, "other")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_all_away_again(on: OnRay, number: signal.Signals) -> None:
    """More engines than there is room for."""
    up = on.start("up", "--name", "other", "--engines", "6", "--device", "sim", "--http", "")
    assert up.stdout is not None
    assert "no node has a CPU free for engine" in up.stdout.readline()
    up.send_signal(number)
    assert up.wait(TIMEOUT_S) == 130
    wait_until_nothing_is_left(on, "other")


def test_engines_have_the_gpus_that_ray_gives_and_http_has_its_keys(
    on: OnRay, tmp_path: Path
) -> None:
    (tmp_path / "api-keys").write_text("a-key-of-sixteen")
    on.add_node(2, gpus=4)
    printed = on.command(
        *("up", "--name", "other", "--engines", "2", "--tp", "2"),
        *("--port", free_services().rpartition(":")[2]),
        *("--http", free_services().replace("tcp://127.0.0.1", "0.0.0.0")),
        *("--api-key-file", str(tmp_path / "api-keys")),
    )
    visible = [
        launched_by(pid_of(f"engine-{number}", "other"))[0].environ()["CUDA_VISIBLE_DEVICES"]
        for number in range(2)
    ]
    assert sorted(",".join(visible).split(",")) == ["0", "1", "2", "3"]
    (http,) = re.findall(r"HTTP +(http://127\.0\.0\.\d+:\d+)", printed)
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{http}/v1/models")
    with_key = Request(f"{http}/v1/models", headers={"Authorization": "Bearer a-key-of-sixteen"})
    assert urlopen(with_key).status == 200
    on.command("down", "--name", "other")
    wait_until_nothing_is_left(on, "other")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265"])
def test_without_a_cluster_the_command_says_so(on: OnRay, address: str) -> None:
    with pytest.raises(RuntimeError, match=f"no Ray cluster at {address}: `ray start --head`"):
        on.command("down", "--address", address)


def test_without_ray_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; from nanovllm.ray.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "down"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1
    assert ran.stderr == "Error: Ray is not installed: pip install 'nanovllm[ray]'\n"
