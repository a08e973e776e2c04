"""`/metrics`: what is exported, what the page and the dashboard say, and the real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.support.pipeline import LOOK_AGAIN_S, Pipeline
from nanovllm.control import Status
from nanovllm.names import ServiceId
from nanovllm.services.http import __main__ as http_server
from nanovllm.services.http.__main__ import Door
from nanovllm.services.http.errors import ApiError
from tests.http.server import TIMEOUT_S, Server
from tests.http.test_door import HTTP, SIM
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.recovery.streams import services, wait_for_another

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \|", re.MULTILINE)
PAGE = (ROOT / "docs" / "metrics.md").read_text()
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
DOCUMENTED = ROW.findall(PAGE)
# Labels that Prometheus makes of a histogram.
OWN_LABELS = {"le"}
DETOKENIZER = ServiceId("detokenizer", 0)


class Doors(NamedTuple):
    """A pipeline with two HTTP servers, which have served a few requests.

    Attributes:
        later_tokens: the tokens of all streams that came after a stream's first chunk.
    """

    pipeline: Pipeline
    later_tokens: int


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    with Pipeline("", *SIM, *HTTP, "--http-servers", "2") as running:
        door = Server(running.http_port)
        keys = {"prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True, "logprobs": 0}
        later = 0
        for _ in range(2):
            assert door.complete(**keys).status == 200
            choices = [chunk["choices"][0] for chunk in door.complete(**keys, stream=True).chunks]
            tokens = [len(c["logprobs"]["tokens"]) for c in choices if c.get("logprobs")]
            assert sum(tokens) == 8
            later += sum(tokens[1:])
        assert door.complete(prompt="x " * 9000, max_tokens=8).status == 400
        wait_until_nothing_is_left(running)  # by then every service has reported the requests
        yield Doors(running, later)


@pytest.fixture
def door(doors: Doors) -> Server:
    return Server(doors.pipeline.http_port)


def families(door: Server) -> dict[str, Metric]:
    """Metrics by the names that their samples have, but for a histogram's endings."""
    answer = door.get("/metrics")
    assert answer.status == 200
    return {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(answer.body.decode())
    }


def total(metric: Metric, ending: str = "", **labels: str) -> float:
    return sum(
        sample.value
        for sample in metric.samples
        if sample.name.endswith(ending) and labels.items() <= sample.labels.items()
    )


def test_the_page_lists_what_is_exported(door: Server) -> None:
    exported = []
    for name, family in families(door).items():
        assert family.documentation
        labels = {label for sample in family.samples for label in sample.labels} - OWN_LABELS
        exported.append((name, family.type, labels))
    documented = [
        (name, kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in DOCUMENTED
    ]
    assert sorted(exported, key=str) == sorted(documented, key=str)


def test_the_page_s_command_shows_them(door: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing")
    (command,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert "127.0.0.1:8000" in command
    command = command.replace("http://127.0.0.1:8000", door.url)
    shown = subprocess.run(["sh", "-e"], input=command, capture_output=True, text=True, check=True)
    assert DOCUMENTED[0][0] in shown.stdout


def test_the_figures_are_those_of_all_doors(door: Server, doors: Doors) -> None:
    found = families(door)
    finished = found["nanovllm_request_success_total"]
    assert total(finished, finished_reason="length") == 4
    assert total(finished, finished_reason="context_length_exceeded") == 1
    assert {sample.labels["door"] for sample in finished.samples} == {"0", "1"}
    assert total(found["nanovllm_time_to_first_token_seconds"], "_count") == 2
    between = found["nanovllm_inter_token_latency_seconds"]
    # A chunk may wait for the rest of a character: the first then has several tokens' outputs.
    assert doors.later_tokens <= total(between, "_count") <= 14
    assert total(found["nanovllm_e2e_request_latency_seconds"], "_count") == 5
    assert total(found["nanovllm_generation_tokens_total"]) == 32
    assert total(found["nanovllm_prompt_tokens_total"]) > 0
    assert total(found["nanovllm_device_busy_seconds_total"], rank="0") > 0
    for gauge in ("http_requests_running", "num_requests_running", "num_requests_waiting"):
        assert total(found[f"nanovllm_{gauge}"]) == 0


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = (ROOT / "deploy" / "grafana" / "nanovllm.json").read_text()
    json.loads(dashboard)
    asked = {re.sub("_bucket$", "", name) for name in re.findall(r"nanovllm_\w+", dashboard)}
    assert asked == {name for name, _, _ in DOCUMENTED}


def test_the_alerts_are_those_of_the_page_and_ask_for_what_is_exported() -> None:
    rules = ALERTS.read_text()
    asked = {re.sub("_bucket$", "", name) for name in re.findall(r"nanovllm_\w+", rules)}
    assert asked <= {name for name, _, _ in DOCUMENTED}
    page = (ROOT / "docs" / "operations.md").read_text()
    documented = re.findall(r"^\| `(Nanovllm\w+)` \| (\w+) \|", page, re.MULTILINE)
    alerts = re.findall(r"alert: (\w+)$.*?severity: (\w+)$", rules, re.DOTALL | re.MULTILINE)
    assert documented == alerts


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_fires_the_alerts(tmp_path: Path) -> None:
    ended = 'nanovllm_request_success_total{finished_reason="%s"}'
    series = {
        'up{job="nanovllm"}': "0x30",
        "nanovllm_num_requests_running": "3x30",
        "nanovllm_num_requests_waiting": "4x30",
        "nanovllm_generation_tokens_total": "0+9x15 135x15",
        "nanovllm_service_restarts_total": "0+1x30",
        "nanovllm_num_preemptions_total": "0+90x30",
        ended % "stop": "0+90x30",
        ended % "overloaded": "0+1x30",
        ended % "poisoned": "_x24 1x6",
        'nanovllm_time_to_first_token_seconds_bucket{le="10"}': "0+90x30",
        'nanovllm_time_to_first_token_seconds_bucket{le="30"}': "0+100x30",
        'nanovllm_time_to_first_token_seconds_bucket{le="+Inf"}': "0+100x30",
    }
    firing = "count(ALERTS{alertstate='firing'}) by (alertname)"

    def expected(minutes: int, *missing: str) -> dict[str, object]:
        names = set(re.findall(r"alert: (\w+)", ALERTS.read_text())) - {*missing}
        samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(names)]
        return {"expr": firing, "eval_time": f"{minutes}m", "exp_samples": samples}

    test = {
        "interval": "1m",
        "input_series": [{"series": s, "values": v} for s, v in series.items()],
        "promql_expr_test": [
            expected(14, "NanovllmStalled", "NanovllmPoisoned"),
            expected(26),
        ],
    }
    file = tmp_path / "test.json"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "tests": [test]}))
    for command, rules in (("check", ALERTS), ("test", file)):
        ran = subprocess.run(
            ["promtool", command, "rules", rules],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_promtool_has_nothing_to_say(door: Server) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=door.get("/metrics").body,
        capture_output=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus")
def test_the_real_prometheus_scrapes_it(door: Server, tmp_path: Path) -> None:
    targets = [f"127.0.0.1:{door.port}"]
    jobs = [{"job_name": "nanovllm", "static_configs": [{"targets": targets}]}]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    prometheus = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        expression = {"query": "sum(nanovllm_request_success_total)"}
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                answer = Server(port).get(f"/api/v1/query?{urlencode(expression)}")
                if answer.status == 200 and (found := answer.json["data"]["result"]):
                    break
            except ConnectionError:  # it does not listen yet
                pass
            assert time.monotonic() < deadline, "nothing was scraped"
            time.sleep(LOOK_AGAIN_S)
        assert found[0]["value"][1] == "5"
    finally:
        prometheus.kill()
        prometheus.wait()


def test_restarts_are_counted_by_role(doors: Doors, door: Server) -> None:
    before = services(doors.pipeline)[DETOKENIZER]
    before.kill()
    wait_for_another(doors.pipeline, DETOKENIZER, before)
    restarts = families(door)["nanovllm_service_restarts_total"]
    assert total(restarts, role="detokenizer", index="0") == 1
    assert total(restarts, role="http") == 0


def test_one_that_asks_in_vain_takes_no_answer_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first question to the supervisor is lost."""
    monkeypatch.setattr(http_server, "STATUS_S", 0.2)
    asked = 0

    class Supervisor:
        def on_told(self, handler: Callable[[Status], None]) -> None:
            self._answer = handler

        def ask_status(self) -> bool:
            nonlocal asked
            asked += 1
            if asked > 1:
                self._answer(Status("", "", "", []))
            return True

    async def test() -> None:
        door = Door(cast(Any, Supervisor()))
        first = asyncio.create_task(door._metrics(cast(Any, None)))
        await asyncio.sleep(0)  # it asks
        monkeypatch.setattr(http_server, "STATUS_S", TIMEOUT_S)
        second = asyncio.create_task(door._metrics(cast(Any, None)))
        with pytest.raises(ApiError, match="does not answer"):
            await first
        assert (await second).status_code == 200
        assert (await door._metrics(cast(Any, None))).status_code == 200
        assert asked == 3

    asyncio.run(test())
