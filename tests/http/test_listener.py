"""What the launcher checks before it hands a socket and keys to HTTP servers."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.launch.http import Listener
from nanovllm.settings import Settings, SettingsError
from tests.http.server import TIMEOUT_S
from tests.launch.test_launch import SIM, refused


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_API_KEY", raising=False)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The paths of a certificate for 127.0.0.1 and of its key."""
    directory = tmp_path_factory.mktemp("tls")
    certificate, key = str(directory / "certificate.pem"), str(directory / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", certificate, "-keyout", key),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_a_taken_port_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
        line = refused("--runtime-dir", str(tmp_path / "run"), "--http", address, *SIM)
    assert f"--http {address} is taken by another process: stop that one, name another" in line


@pytest.mark.parametrize("http", ["8000", "127.0.0.1", "http://127.0.0.1:8000", "h:65536", "::1:8"])
def test_a_wrong_http_address_is_refused(http: str) -> None:
    with pytest.raises(SettingsError, match=r"--http .*must be HOST:PORT"):
        Settings(http=http)


def test_an_address_beyond_loopback_needs_a_key_or_insecure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anywhere = Settings(http="*:0")
    with pytest.raises(SettingsError, match=r"beyond loopback.*--api-key-file.*--insecure"):
        Listener(anywhere)
    Listener(Settings(http="*:0", insecure=True)).close()
    keys = tmp_path / "keys"
    keys.write_text("one\n# two\n three \n")
    listener = Listener(Settings(http="*:0", api_key_file=str(keys)))
    assert listener.environment["NANOVLLM_API_KEY"] == "one,three"
    assert listener.url.startswith("http://127.0.0.1:")
    listener.close()
    monkeypatch.setenv("NANOVLLM_API_KEY", "four, five")
    listener = Listener(anywhere)
    assert listener.environment["NANOVLLM_API_KEY"] == "four,five"
    listener.close()
    assert "NANOVLLM_API_KEY" not in os.environ, "every service would inherit it"


def test_keys_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    settings = Settings(http="127.0.0.1:0", api_key_file=str(file))
    with pytest.raises(SettingsError, match=r"--api-key-file .* cannot be read: No such file"):
        Listener(settings)
    for content, said in (
        (b"# none\n", "has no key"),
        (b"two words\n", "printable ASCII"),
        (b"\xff\xfe\n", "cannot be read: it is no text"),
    ):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=said) as caught:
            Listener(settings)
        assert "two words" not in str(caught.value)


def test_tls_files_that_cannot_be_used_are_refused(tls: tuple[str, str], tmp_path: Path) -> None:
    certificate, key = tls
    with pytest.raises(SettingsError, match="belong together"):
        Settings(tls_certificate=certificate)
    encrypted = str(tmp_path / "encrypted.pem")
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", key, "-out", encrypted],
        check=True,
        capture_output=True,
    )
    for used, said in (
        ((certificate, str(tmp_path / "none")), "--tls-key .* cannot be read"),
        ((certificate, encrypted), "--tls-key .* is encrypted"),
        ((key, key), "--tls-certificate .* cannot be used"),
    ):
        with pytest.raises(SettingsError, match=said):
            Listener(Settings(http="127.0.0.1:0", tls_certificate=used[0], tls_key=used[1]))


def test_https(tls: tuple[str, str], start_pipeline: Callable[..., Pipeline]) -> None:
    files = ("--tls-certificate", tls[0], "--tls-key", tls[1])
    url = start_pipeline("", *SIM, "--http", "127.0.0.1:0", *files).status().http
    assert url.startswith("https://")
    trusting = ssl.create_default_context(cafile=tls[0])
    with urllib.request.urlopen(f"{url}/health", timeout=TIMEOUT_S, context=trusting) as answer:
        assert answer.status == 200


def test_an_ipv6_address_is_written_in_brackets() -> None:
    listener = Listener(Settings(http="[::1]:0"))
    assert listener.url.startswith("http://[::1]:")
    listener.close()
