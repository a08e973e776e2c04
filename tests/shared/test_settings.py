"""Options: made from one struct, and back again."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from nanovllm.launch.cli import main as launch
from nanovllm.options import settings_argv, settings_from, settings_options
from nanovllm.settings import JOINING, Settings, SettingsError, flag, with_fitting_defaults


def parse(*argv: str) -> Settings:
    parsed: list[Settings] = []

    @click.command()
    @settings_options()
    def command(**options: Any) -> None:
        parsed.append(settings_from(options))

    result = CliRunner().invoke(command, list(argv), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return parsed[0]


def another_of_each() -> dict[str, Any]:
    """A value of each option that is not its default."""
    changed: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(Settings()).items():
        if isinstance(value, bool):
            changed[name] = not value
        elif isinstance(value, float):
            changed[name] = value / 2
        elif isinstance(value, int):
            changed[name] = max(2, value - 1)
    return changed | {"device": "sim", "dtype": "float16", "model": "some/where", "ingress": ""}


def test_every_field_is_an_option_and_survives_the_round_trip() -> None:
    for settings in (Settings(**another_of_each()), Settings()):
        assert parse(*settings_argv(settings)) == settings


def test_nano_vllms_names_and_defaults() -> None:
    settings = Settings()
    assert settings.max_num_batched_tokens == 16384
    assert settings.max_num_seqs == 512
    assert settings.max_model_len == 4096
    assert settings.gpu_memory_utilization == 0.9
    assert settings.tensor_parallel_size == 1
    assert settings.enforce_eager is False
    assert settings.kvcache_block_size == 256
    assert settings.num_kvcache_blocks == -1
    assert parse("--tp", "4").tensor_parallel_size == 4


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--tp", "9"], "--tensor-parallel-size"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
        (["--gpu-memory-utilization", "0"], "--gpu-memory-utilization"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization"),
        (["--max-num-batched-tokens", "16", "--max-num-seqs", "17"], "--max-num-batched-tokens"),
        (["--max-num-batched-tokens", "511", "--max-num-seqs", "512"], "--max-num-batched-tokens"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens"),
    ],
)
def test_a_value_out_of_range_names_its_option(argv: list[str], named: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(*argv)
    said = caught.value.format_message()
    assert named in said
    assert not said.startswith(":")


@pytest.mark.parametrize(
    ("given", "budget", "sequences"),
    [
        ({}, 16384, 512),
        ({"max_num_batched_tokens": 128}, 128, 128),
        ({"max_num_batched_tokens": 1000}, 1000, 512),
        ({"max_num_seqs": 20_000}, 20_000, 20_000),
        ({"max_num_seqs": 16}, 16384, 16),
        ({"max_num_batched_tokens": 128, "max_num_seqs": 2}, 128, 2),
    ],
)
def test_a_default_gives_way_to_what_is_given(
    given: dict[str, int], budget: int, sequences: int
) -> None:
    argv = [word for name, value in given.items() for word in (flag(name), str(value))]
    for settings in (parse(*argv), Settings(**with_fitting_defaults(given))):
        assert (settings.max_num_batched_tokens, settings.max_num_seqs) == (budget, sequences)


@pytest.mark.parametrize("value", [0, -5, "many", None, 0.5])
@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs"])
def test_a_value_that_is_none_moves_no_default(name: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=name):
        msgspec.convert(with_fitting_defaults({name: value}), Settings)


def test_help_shows_choices_in_their_order_and_ranges() -> None:
    shown = " ".join(CliRunner().invoke(launch, ["--help"]).output.split())
    assert "[debug|info|warning|error]" in shown
    assert "[default: 1; 1<=x<=8]" in shown
    assert "[default: 0.9; 0<x<=1]" in shown


def test_the_launcher_tells_its_version() -> None:
    assert CliRunner().invoke(launch, ["--version"]).output.strip().endswith(version("nanovllm"))


def test_the_ingress_binds_each_endpoint_once() -> None:
    local = "ipc:///run/x/ingress.sock"
    for ingress, bound in {
        "": [local],
        local: [local],
        "tcp://*:5560": ["tcp://*:5560", local],
    }.items():
        settings = Settings(runtime_dir="/run/x", ingress=ingress, insecure=True)
        assert settings.client_endpoints == bound


def test_a_runtime_dir_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(SettingsError, match="--runtime-dir is too long"):
        _ = Settings(runtime_dir="/tmp/" + "x" * 100).scheduler_endpoint(0)


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "10.0.0.1", "node", "127.example", "128.0.0.1"])
def test_an_ingress_beyond_loopback_needs_insecure(host: str) -> None:
    endpoint = f"tcp://{host}:5560"
    with pytest.raises(click.UsageError, match=r"--ingress .* beyond loopback.*--insecure"):
        parse("--ingress", endpoint)
    assert parse("--ingress", endpoint, "--insecure").ingress == endpoint


@pytest.mark.parametrize("ingress", ["", "tcp://127.0.0.1:5", "tcp://127.9.0.1:5", "ipc:///x"])
def test_an_ingress_on_this_machine_needs_nothing(ingress: str) -> None:
    assert parse("--ingress", ingress, "--runtime-dir", "/run/x").ingress == ingress
    assert Settings(ingress="tcp://localhost:5").ingress


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--services", "tcp://10.0.0.1:5600"), "beyond loopback"),
        (("--services", "tcp://*:5600", "--insecure"), "name an address"),
        (("--services", "tcp://127.0.0.1:65535"), "below 65535"),
        (("--services", "ipc:///x"), "must be tcp"),
        (("--services", "tcp://127.0.0.1:5600", "--join", "tcp://127.0.0.1:5700"), "joins"),
        (("--services", "tcp://127.0.0.1:5600", "--advertise", "10.0.0.1"), "--advertise"),
        (("--join", "tcp://10.0.0.1:5600", "--engines", "1"), "--join .*beyond loopback"),
        (("--advertise", "10.0.0.1"), "--advertise goes with"),
        (("--engines", "0"), "--engines is 0"),
        (("--detokenizers", "0"), "--detokenizers is 0"),
    ],
)
def test_what_other_machines_could_not_join_is_refused(
    arguments: tuple[str, ...], why: str
) -> None:
    with pytest.raises(click.UsageError, match=why):
        parse(*arguments)


def test_where_services_of_other_machines_meet() -> None:
    main = parse("--services", "tcp://127.0.0.1:5600", "--engines", "0")
    joined = parse("--join", "tcp://127.0.0.1:5600", "--engines", "2", "--advertise", "127.0.0.2")
    assert main.services_beyond == joined.services_endpoint == "tcp://127.0.0.1:5601"
    assert main.scheduler_beyond == "tcp://127.0.0.1:0"
    assert joined.scheduler_beyond == "tcp://127.0.0.2:0"
    assert [getattr(joined, name) for name in JOINING] == [2, 0, 0, 0]
    assert parse().services_beyond == parse().scheduler_beyond == ""


@pytest.mark.parametrize(
    "option", ["--api-key-file", "--admin-key-file", "--tls-certificate", "--cors"]
)
def test_options_of_http_need_http(option: str) -> None:
    with pytest.raises(click.UsageError, match=f"--http '' serves no HTTP, and {option} "):
        parse("--http", "", option, "*")


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://a/b", "**"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(click.UsageError, match=r"--cors .* must be an origin"):
        parse("--cors", f"https://page.example:8443, {origin}")
