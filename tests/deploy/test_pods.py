"""The pods of the overlay for a CPU as processes of this machine: their command lines and probes,
and what `kubectl scale` and a death do. A cluster's network, mounts and kubelet are not here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from click.testing import CliRunner

from benchmarks.support.pipeline import LOOK_AGAIN_S, Pipeline
from nanovllm.client.cli import main as command
from nanovllm.keys import make_keys
from tests.deploy.manifests import Pod, named, pods
from tests.machines.ports import free_services
from tests.readers import free_tcp_endpoint
from tests.recovery.streams import MODEL_STOPS, TIMEOUT_S, Streams, mixed_cases, undisturbed

INGRESS, TOKENIZERS, ENGINES = "nanovllm-ingress", "nanovllm-tokenizers", "nanovllm-engines"
API_KEY = "a-key-of-a-test"
PODS = {pod.name: pod for pod in pods("cpu")}
CASES = mixed_cases(MODEL_STOPS)


class Cluster:
    """Pods as processes, each with a directory instead of its mounts; all have 127.0.0.1."""

    def __init__(self, directory: Path) -> None:
        make_keys(directory / "made", None)
        self._directory = directory
        self._services = free_services().removeprefix("tcp://")
        self._clients, self._http = (free_tcp_endpoint().removeprefix("tcp://") for _ in range(2))
        self.url = f"http://{self._http}"

    def start(self, name: str) -> Pipeline:
        """A pod of this workload, whose launcher has begun."""
        pod = PODS[name]
        root = Path(tempfile.mkdtemp(prefix="nv-", dir=self._directory))
        for path, volume in pod.mounts.items():
            self._mount(pod, root / path[1:], volume)
        words = [part for word in pod.arguments[1:] for part in word.split("=", 1)]
        for here, there in (
            ("10.1.2.3:5600", self._services),
            ("10.1.2.3", "127.0.0.1"),
            ("nanovllm-pipeline:5600", self._services),
            ("*:5555", self._clients),
            ("0.0.0.0:8000", self._http),
            ("/etc/nanovllm", f"{root}/etc/nanovllm"),
        ):
            words = [word.replace(here, there) for word in words]
        runtime_dir = f"{root}{pod.environment['NANOVLLM_RUNTIME_DIR']}"
        pipeline = Pipeline("", *words, "--runtime-dir", runtime_dir)
        pipeline.launch()
        return pipeline

    def _mount(self, pod: Pod, path: Path, volume: dict[str, dict[str, str]]) -> None:
        path.mkdir(parents=True)
        if "configMap" in volume:
            options = named(pod.overlay, "ConfigMap", volume["configMap"]["name"])
            for name, text in options["data"].items():
                (path / name).write_text(text)
        elif volume.get("secret", {}).get("secretName") == "nanovllm-keys":
            for file in pod.secret_files("/etc/nanovllm/keys"):
                shutil.copy2(self._directory / "made" / file, path)
        elif "secret" in volume:
            (path / "keys").write_text(API_KEY)

    def get(self, path: str) -> int:
        try:
            with urlopen(f"{self.url}{path}", timeout=TIMEOUT_S) as answer:
                status: int = answer.status
                return status
        except HTTPError as error:
            return error.code


def probe(name: str, pipeline: Pipeline, kind: str) -> bool:
    """What the kubelet would see."""
    words = PODS[name].container[f"{kind}Probe"]["exec"]["command"][1:]
    environment = {"NANOVLLM_RUNTIME_DIR": str(pipeline.runtime_dir)}
    return CliRunner().invoke(command, words, env=environment).exit_code == 0


def wait_until(so: Callable[[], bool], pipeline: Pipeline) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not so():
        assert time.monotonic() < deadline, pipeline.transcript
        time.sleep(LOOK_AGAIN_S)


def wait_until_ready(name: str, pipeline: Pipeline) -> None:
    wait_until(lambda: probe(name, pipeline, "readiness"), pipeline)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as directory:
        yield Cluster(Path(directory))


def test_the_pods_make_a_pipeline_that_can_be_scaled(cluster: Cluster) -> None:
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Pipeline:
            pod = cluster.start(name)
            stack.callback(pod.stop)
            return pod

        first = start(ENGINES)  # in any order
        assert not probe(ENGINES, first, "startup")
        ingress = start(INGRESS)
        ingress.wait_for("nanovllm serves", TIMEOUT_S)
        assert cluster.get("/health") == 200
        wait_until_ready(ENGINES, first)
        assert probe(ENGINES, first, "liveness")
        assert cluster.get("/ready") == 503, "there is no tokenizer yet"
        tokenizer = start(TOKENIZERS)
        wait_until_ready(TOKENIZERS, tokenizer)
        wait_until(lambda: cluster.get("/ready") == 200, ingress)
        assert cluster.get("/v1/models") == 401
        assert "[DONE]" in streamed(cluster)

        expected = undisturbed(ingress.endpoint, CASES)
        streams = Streams(ingress.endpoint, CASES)
        streams.wait_for_news()
        second = start(ENGINES)  # kubectl scale: one more
        wait_until_ready(ENGINES, second)
        streams.wait_for_news()
        second.process.send_signal(signal.SIGTERM)  # kubectl scale: one less
        grace_s = PODS[ENGINES].spec["terminationGracePeriodSeconds"]
        assert second.process.wait(grace_s) == 0
        assert len(engines(ingress)) == 1, "the pipeline has forgotten it"
        for _ in range(2):
            streams.wait_for_news()
        die(first)  # the container of the only engine dies, and starts again
        again = start(ENGINES)
        wait_until_ready(ENGINES, again)
        streams.wait_for_news()
        for case, outcome, _ in streams.finish():
            assert outcome == expected[case], f"case {case}\n{ingress.transcript}"
        assert engines(ingress) == ["ready"]

        loaded = psutil.Process(again.process.pid).children()
        die(ingress)
        start(INGRESS).wait_for("nanovllm serves", TIMEOUT_S)
        wait_until(lambda: cluster.get("/ready") == 200, again)
        assert "[DONE]" in streamed(cluster)
        assert psutil.Process(again.process.pid).children() == loaded, "the engine kept its model"


def die(pod: Pipeline) -> None:
    """The container's death is that of all its processes."""
    processes = psutil.Process(pod.process.pid).children(recursive=True)
    pod.process.kill()
    assert not psutil.wait_procs(processes, timeout=TIMEOUT_S)[1]


def engines(ingress: Pipeline) -> list[str]:
    return [s.state for s in ingress.status().services if s.role == "scheduler"]


def streamed(cluster: Cluster) -> str:
    ask = {"model": "demo", "prompt": "Once", "max_tokens": 5, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    question = Request(f"{cluster.url}/v1/completions", json.dumps(ask).encode(), headers)
    with urlopen(question, timeout=TIMEOUT_S) as answer:
        text: str = answer.read().decode()
        return text
