"""What `nanovllm-ray up` reads, and hands to the head."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from nanovllm.api_keys import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from nanovllm.keys import make_keys
from nanovllm.launch.cli import main
from nanovllm.ray.plan import EnginePlan, Plan, secrets_of
from nanovllm.settings import Settings, SettingsError

FILES = ("api_key_file", "admin_key_file", "tls_certificate", "tls_key")


def test_the_head_has_what_options_and_variables_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine of `up` has these files, and perhaps no other."""
    for name in FILES:
        (tmp_path / name).write_text(f"the {name}")
    variables = {name: f"the {name}" for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = msgspec.structs.replace(
        Settings(ingress=""), **{name: str(tmp_path / name) for name in FILES}
    )
    secrets = secrets_of(settings)
    assert secrets.environment == variables
    head = Plan(settings, 5600, EnginePlan(0, 30.0), secrets).head("10.0.0.1")
    taken = main.make_context("nanovllm-launch", head.arguments(Path("/private"))).params
    for name in FILES:
        assert secrets.files[name] == f"the {name}".encode()
        assert taken[name] == f"/private/{name}"
    assert not [value for value in taken.values() if str(value).startswith(str(tmp_path))]


def test_keys_that_are_open_to_others_are_refused(tmp_path: Path) -> None:
    """As the launcher does, which has copies of them."""
    keys = tmp_path / "keys"
    make_keys(keys, None)
    settings = msgspec.structs.replace(Settings(ingress=""), keys=str(keys))
    assert {"keys/services.key", "keys/server.key"} <= secrets_of(settings).files.keys()
    for name in ("services.key", "server.key"):
        (keys / name).chmod(0o644)
        with pytest.raises(SettingsError, match=f"{name} is open to other users"):
            secrets_of(settings)
        (keys / name).chmod(0o600)
