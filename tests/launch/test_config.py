"""`--config`: options from a TOML file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from benchmarks.support.pipeline import READY_TIMEOUT_S
from nanovllm.options import config_option, settings_from, settings_options
from nanovllm.settings import Settings
from tests.shared.test_settings import another_of_each


def parse(file: Path, text: str, *argv: str, **variables: str) -> Settings:
    parsed: list[Settings] = []

    @click.command()
    @click.argument("model", default="")
    @config_option
    @settings_options(without=("model",))
    def command(**options: Any) -> None:
        parsed.append(settings_from(options))

    file.write_text(text)
    arguments = ["--config", str(file), *argv]
    result = CliRunner().invoke(command, arguments, standalone_mode=False, env=variables)
    if result.exception is not None:
        raise result.exception
    return parsed[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pipeline.toml"


def test_every_option_can_be_in_it(file: Path) -> None:
    settings = Settings(**another_of_each())
    lines = [
        f"{name.replace('_', '-')} = {json.dumps(value)}"
        for name, value in msgspec.structs.asdict(settings).items()
    ]
    assert parse(file, "\n".join(lines)) == settings


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(file: Path) -> None:
    text = 'model = "a/b"\ntp = 2\nmax-num-seqs = 8\nenforce-eager = true\nruntime-dir = "/file"'
    assert parse(file, text) == Settings(
        model="a/b",
        tensor_parallel_size=2,
        max_num_seqs=8,
        enforce_eager=True,
        runtime_dir="/file",
    )
    argv = ("c/d", "--tensor-parallel-size", "1", "--no-enforce-eager", "--runtime-dir", "/argv")
    assert parse(file, text, *argv) == Settings(model="c/d", max_num_seqs=8, runtime_dir="/argv")
    assert parse(file, text, NANOVLLM_RUNTIME_DIR="/variable").runtime_dir == "/variable"
    assert parse(file, "max-num-batched-tokens = 128").max_num_seqs == 128


def test_relative_paths_are_relative_to_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = file.parent
    (here / "models" / "one").mkdir(parents=True)
    for model, meant in {
        "models/one": f"{here}/models/one",
        "./missing": f"{here}/./missing",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "/models/one": "/models/one",
        "": "",
    }.items():
        assert parse(file, f'model = "{model}"').model == meant
    monkeypatch.chdir(here)
    text = 'keys = "k"\nruntime-dir = "a/run"\ntls-certificate = "c"\ntls-key = "~/t"\n'
    text += 'api-key-file = "/etc/a"\ningress = "ipc://i"'
    settings = parse(Path(file.name), text)
    assert (settings.keys, settings.runtime_dir) == (f"{here}/k", f"{here}/a/run")
    assert settings.tls_key == os.path.expanduser("~/t")
    assert (settings.api_key_file, settings.ingress) == ("/etc/a", f"ipc://{here}/i")
    assert parse(file, 'ingress = "tcp://localhost:5"').ingress == "tcp://localhost:5"
    assert parse(file, "", "--keys", "k").keys == "k"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_num_seqs = 5", "max_num_seqs is no option: did you mean max-num-seqs?"),
        ("max-num-seq = 5", "max-num-seq is no option: did you mean max-num-seqs?"),
        ("port = 5", "port is no option: nanovllm has --ingress tcp://HOST:PORT"),
        ('api-key = "s3cret"', "api-key is no option: did you mean api-key-file?"),
        ("xyzzy = 5", "xyzzy is no option: there are a"),
        ("config = 'x'", "config is no option: "),
        ("[engines]\ncount = 2", "engines: Expected `int`, got `object`"),
        ("tp = 2\ntensor-parallel-size = 2", "tensor-parallel-size is given twice"),
        ("engines = '2'", "engines: Expected `int`, got `str`"),
        ("engines = 2.5", "engines: Expected `int`, got `float`"),
        ("engines = true", "engines: Expected `int`, got `bool`"),
        ("tp = 0", "tp: Expected `int` >= 1"),
        ("keys = 5", "keys: Expected `str`, got `int`"),
        ("insecure = 'yes'", "insecure: Expected `bool`, got `str`"),
        ("gpu-memory-utilization = nan", "gpu-memory-utilization: Expected `float`"),
        ("device = 'gpu'", "device: Invalid enum value 'gpu': must be one of auto, cuda, cpu, sim"),
        ("engines = ", "is not TOML: Invalid value (at end of document)"),
        ("engines = 1\nengines = 1", "is not TOML: Cannot overwrite a value"),
        ("max-num-seqs = 9\nmax-num-batched-tokens = 8", "--max-num-batched-tokens (8) must be at"),
    ],
)
def test_a_mistake_is_named(file: Path, text: str, told: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        parse(file, text)
    message = refused.value.format_message()
    assert told in message
    assert message.startswith((f"{file}: ", f"{file} is not TOML", "--"))
    assert "s3cret" not in message


def test_both_commands_take_it(file: Path) -> None:
    file.write_bytes(b"engines = \xff")
    for module in (["nanovllm", "serve"], ["nanovllm.launch.cli"]):
        for there, told in ((file, f"{file} is not TOML"), (file.parent / "none", "not exist")):
            ran = subprocess.run(
                [sys.executable, "-m", *module, "--config", there],
                capture_output=True,
                text=True,
                timeout=READY_TIMEOUT_S,
                check=False,
            )
            assert ran.returncode == 2
            assert told in ran.stderr
