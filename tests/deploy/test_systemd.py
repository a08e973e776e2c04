"""deploy/systemd: systemd takes the units, and the launcher takes the commands in them."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from nanovllm.launch.cli import main
from nanovllm.launch.groups import GRACE_S
from nanovllm.launch.policy import MOVE_S
from nanovllm.settings import Settings

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
CONFIGS = {
    "pipeline": "engines = 2\n",
    "blue": 'join = "tcp://127.0.0.1:5600"\nengines = 1\n',
}


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    return parser["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    launcher = tmp_path / "nanovllm-launch"
    launcher.write_text("#!/bin/sh\n")
    launcher.chmod(0o755)
    assert len(UNITS) == 2
    for unit in UNITS:
        text = unit.read_text().replace("/opt/nanovllm/bin/nanovllm-launch", str(launcher))
        named = tmp_path / unit.name.replace("@", "@blue")
        named.write_text(text)
        for words in (["verify", "--man=no"], ["security", "--offline=yes", "--threshold=25"]):
            ran = subprocess.run(
                ["systemd-analyze", *words, str(named)], capture_output=True, text=True, check=False
            )
            said = ran.stderr.strip()
            assert (ran.returncode, said) == (0, ""), (unit.name, words, ran.stdout)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_the_launcher_takes_the_command(unit: Path, tmp_path: Path) -> None:
    for name, text in CONFIGS.items():
        (tmp_path / f"{name}.toml").write_text(text)
    says = service(unit)
    command = says["ExecStart"].replace("/etc/nanovllm", str(tmp_path)).replace("%i", "blue")
    _, *words = shlex.split(command.replace("${RUNTIME_DIRECTORY}", "/run/nanovllm"))
    taken = main.make_context("nanovllm-launch", words).params
    assert taken["runtime_dir"] == "/run/nanovllm"
    assert bool(taken["join"]) == ("join" in unit.name)
    assert taken["engines"] == (1 if taken["join"] else 2)
    assert says["RuntimeDirectoryMode"] == "0700"
    drain_s = Settings().drain_timeout
    assert float(says["TimeoutStopSec"]) > drain_s + MOVE_S + 2 * GRACE_S
