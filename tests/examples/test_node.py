"""The JavaScript examples, run as a person would."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.keys import make_keys
from tests.http.server import serving
from tests.keys.bad_network import bad_network
from tests.keys.locked import locked_pipeline

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "node"

pytestmark = pytest.mark.skipif(
    shutil.which("node") is None or shutil.which("npm") is None, reason="node or npm is missing"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its packages installed."""
    directory = tmp_path_factory.mktemp("node")
    for source in EXAMPLE.glob("*.*"):
        shutil.copy(source, directory)
    subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=directory,
        check=True,
        timeout=100,
    )
    return directory


def test_it_streams_a_chat_and_aborts_another(installed: Path, pipeline: Pipeline) -> None:
    ran = subprocess.run(
        ["node", "chat.mjs", pipeline.endpoint],
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    assert pipeline.endpoint in lines[0]
    story = "\n".join(lines[1:-2])
    assert len(story.split()) > 5, "a story was told, however short"
    assert lines[-2].startswith(("[stop:", "[length:"))
    assert lines[-1].startswith("[abort, after ")


def test_with_a_key_it_goes_on_where_its_connection_was_cut(
    installed: Path, tmp_path: Path
) -> None:
    with locked_pipeline(tmp_path / "keys") as locked, bad_network(locked.port, (3000,)) as proxy:
        key = locked.client_key("node")
        told = {
            endpoint: subprocess.run(
                ["node", "chat.mjs", endpoint],
                cwd=installed,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
                env={**os.environ, "NANOVLLM_KEYS": key},
            )
            for endpoint in (locked.pipeline.endpoint, proxy.endpoint)
        }
        locked.take_back("node")
        make_keys(tmp_path / "other", None)
        make_keys(tmp_path / "other", "node")
        others_key = str(tmp_path / "other" / "clients" / "node.key")
        script = (installed / "chat.mjs").read_text()
        (installed / "hurried.mjs").write_text(script.replace("60_000", "2_000"))
        first_use = "const client = new Client(endpoint, options);\n"
        pause = "await new Promise((done) => setTimeout(done, 300));\n"
        script = script.replace(first_use, first_use + pause)
        assert pause in script
        (installed / "slow.mjs").write_text(script)  # is refused before it sends anything
        refused, refused_early, others = (
            subprocess.run(
                ["node", name, locked.endpoint, file],
                cwd=installed,
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            for name, file in (("chat.mjs", key), ("slow.mjs", key), ("hurried.mjs", others_key))
        )
    local, cut = told.values()
    assert (local.returncode, cut.returncode) == (0, 0), cut.stderr
    assert cut.stderr == "[disconnected; going on]\n"
    assert cut.stdout.splitlines()[1:-1] == local.stdout.splitlines()[1:-1]
    assert cut.stdout.splitlines()[-1].startswith("[abort, after ")
    for ran in (refused, refused_early):
        assert ran.returncode == 1
        assert "refuses this client's key" in ran.stderr
    assert others.returncode == 1
    assert others.stderr.endswith(", or it has another server-key\n")
    assert others.stderr.count("[disconnected; going on]") == 1


def test_it_says_when_nothing_answers(installed: Path, tmp_path: Path) -> None:
    late = "300; Date.now = () => 0;"  # ZeroMQ's clock is ahead
    script = (installed / "chat.mjs").read_text().replace("60_000;", late)
    assert late in script
    hurried = installed / "hurried.mjs"
    hurried.write_text(script)
    ran = subprocess.run(
        ["node", hurried, f"ipc://{tmp_path}/none.sock"],
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr == f"no pipeline answers at ipc://{tmp_path}/none.sock\n"


def test_the_openai_package_streams_a_chat(installed: Path, pipeline: Pipeline) -> None:
    with serving(pipeline.endpoint) as server:
        ran = subprocess.run(
            ["node", "openai.mjs", f"{server.url}/v1"],
            cwd=installed,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr
    story, _, end = ran.stdout.rpartition("[")
    assert len(story.split()) > 5, "a story was told, however short"
    assert end.endswith(" tokens]\n")
