"""Files of keys: what `keygen` writes, and what pipelines and clients take."""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
import zmq.auth
from click.testing import CliRunner, Result

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client
from nanovllm.client.cli import main
from nanovllm.keys import PipelineKeys, client_keys, make_keys
from nanovllm.settings import KEYS_VARIABLE, SettingsError

TCP = "tcp://127.0.0.1:1"
# User and group of a process that is not root.
POD = 10001
KEY_TEXT = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def keygen(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["keygen", *map(str, words)])


def secrets_in(directory: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_keygen_makes_private_files_and_prints_no_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    ran = keygen(keys, "--client", "alice")
    assert ran.exit_code == 0, ran.output
    made = ["clients/alice.key", "clients/alice.pub", "server.key", "services.key"]
    assert sorted(str(file.relative_to(keys)) for file in secrets_in(keys)) == made
    for path in (keys, keys / "clients"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in secrets_in(keys):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not any(KEY_TEXT.search(word) for word in ran.output.replace(str(keys), "").split())


def test_keygen_overwrites_nothing(tmp_path: Path) -> None:
    keygen(tmp_path / "keys", "--client", "alice")
    before = secrets_in(tmp_path)
    again = keygen(tmp_path / "keys", "--client", "alice")
    assert again.exit_code == 1
    assert "--client alice" in again.output
    assert keygen(tmp_path / "keys").exit_code == 0
    assert secrets_in(tmp_path) == before
    (tmp_path / "keys" / "clients" / "alice.pub").unlink()
    taken_back = keygen(tmp_path / "keys", "--client", "alice")
    assert taken_back.exit_code == 1
    assert "alice.key" in taken_back.output
    assert keygen(tmp_path / "keys", "--client", "bob").exit_code == 0


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-" * 65, "é"])
def test_a_clients_name_is_a_files_name(tmp_path: Path, name: str) -> None:
    ran = keygen(tmp_path / "keys", "--client", name)
    assert ran.exit_code == 1
    assert "--client" in ran.output
    assert not (tmp_path / "keys").exists()


def test_keygen_refuses_a_directory_that_others_can_read(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    ran = keygen(tmp_path)
    assert ran.exit_code == 1
    assert "chmod 700" in ran.output


def test_other_libraries_read_the_files(tmp_path: Path) -> None:
    """They are certificates as ZeroMQ's own tools write them."""
    make_keys(tmp_path, "alice")
    public, secret = zmq.auth.load_certificate(tmp_path / "clients" / "alice.key")
    assert secret is not None
    assert zmq.curve_public(secret) == public
    assert zmq.auth.load_certificate(tmp_path / "clients" / "alice.pub") == (public, None)


def test_what_opens_which_sockets(tmp_path: Path) -> None:
    make_keys(tmp_path, "alice")
    keys = PipelineKeys(str(tmp_path))
    services = keys.services.own.public
    alice = client_keys(TCP, str(tmp_path / "clients" / "alice.key"))
    assert alice is not None
    assert alice.server == keys.clients.own.public == keys.door.server
    assert keys.trusted("services") == {services}
    assert keys.trusted("clients") == {services, alice.own.public}
    (tmp_path / "clients" / "alice.pub").unlink()
    assert keys.trusted("clients") == {services}


def test_a_public_key_that_is_replaced_or_damaged_is_not_trusted(tmp_path: Path) -> None:
    make_keys(tmp_path, "alice")
    make_keys(tmp_path, "bob")
    keys = PipelineKeys(str(tmp_path))
    alice, bob = (tmp_path / "clients" / f"{name}.pub" for name in ("alice", "bob"))
    both = keys.trusted("clients")
    assert both is not None
    os.replace(bob, alice)
    one = keys.trusted("clients")
    assert one is not None
    assert len(both - one) == 1
    alice.write_text('curve\n    public-key = "short"\n')
    assert keys.trusted("clients") == keys.trusted("services")


def test_keys_that_cannot_be_read_now_are_not_taken_back(tmp_path: Path) -> None:
    make_keys(tmp_path, "alice")
    keys = PipelineKeys(str(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert keys.trusted("clients") is None
        assert keys.trusted("services") == {keys.services.own.public}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert keys.trusted("clients") == {keys.services.own.public, public_key(tmp_path, "alice")}


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A pipeline's keys as Kubernetes mounts a secret for a pod with an fsGroup: files of root that
    a group may read, behind links that one rename replaces. This process has the pod's rights."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to a group")
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    make_keys(root / "..1", None)
    (root / "..1").chmod(0o755)
    (root / "..data").symlink_to("..1")
    for name in ("server.key", "services.key"):
        os.chown(root / "..1" / name, 0, POD)
        (root / "..1" / name).chmod(0o440)
        (root / name).symlink_to(f"..data/{name}")
    before = os.getgroups()
    os.setgroups([POD])
    os.setegid(POD)
    os.seteuid(POD)
    try:
        yield root
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
        shutil.rmtree(root)


def test_a_secret_that_kubernetes_mounts_is_taken(mounted: Path) -> None:
    assert PipelineKeys(str(mounted)).clients.own.secret


@pytest.mark.parametrize(
    ("owner", "mode"), [(POD, 0o440), (0, 0o444), (0, 0o460)], ids=["own", "others", "writable"]
)
def test_a_secret_that_is_open_to_others_is_refused(mounted: Path, owner: int, mode: int) -> None:
    file = mounted / "..1" / "services.key"
    os.seteuid(0)
    os.chown(file, owner, POD)
    file.chmod(mode)
    os.seteuid(POD)
    with pytest.raises(SettingsError, match=r"services\.key is open to other users"):
        PipelineKeys(str(mounted))


def public_key(directory: Path, name: str) -> bytes:
    return zmq.auth.load_certificate(directory / "clients" / f"{name}.pub")[0]


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    make_keys(tmp_path, "alice")
    alice = client_keys(TCP, str(tmp_path / "clients" / "alice.key"))
    assert alice is not None
    assert alice.own.secret.decode() not in repr(alice)


def test_a_client_takes_its_key_from_a_path_or_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path, "alice")
    file = str(tmp_path / "clients" / "alice.key")
    assert client_keys(TCP, None) is None
    monkeypatch.setenv(KEYS_VARIABLE, file)
    assert client_keys(TCP, None) == client_keys(TCP, file)
    monkeypatch.setenv(KEYS_VARIABLE, "/nowhere")
    assert client_keys("ipc:///x", None) is None, "ipc needs no key"
    assert client_keys(TCP, "") is None
    of_services = client_keys(TCP, str(tmp_path))
    assert of_services == PipelineKeys(str(tmp_path)).door, "a directory is that of a pipeline"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file.unlink(), "cannot be read"),
        (lambda file: file.chmod(0o640), "chmod 600"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "it is no text"),
        (lambda file: file.write_text(file.read_text().replace("secret", "s")), "no valid secret"),
        (lambda file: file.write_text(file.read_text().replace("server", "s")), "no valid server"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_named(tmp_path: Path, change: object, told: str) -> None:
    make_keys(tmp_path, "alice")
    file = tmp_path / "clients" / "alice.key"
    assert callable(change)
    change(file)
    with pytest.raises(ValueError, match=f"alice.key.*{told}"):
        Client(TCP, keys=str(file))


@pytest.mark.parametrize("missing", ["keys", "server.key"])
def test_a_pipeline_without_its_keys_does_not_start(tmp_path: Path, missing: str) -> None:
    keys = tmp_path / "keys"
    if missing != "keys":
        make_keys(keys, None)
        (keys / missing).unlink()
    options = ("--device", "sim", "--ingress", TCP, "--keys", str(keys))
    with pytest.raises(RuntimeError, match=f"{missing} .*"):
        Pipeline("", *options).start()


def test_a_directory_without_the_services_key_is_refused(tmp_path: Path) -> None:
    make_keys(tmp_path, None)
    (tmp_path / "services.key").unlink()
    with pytest.raises(SettingsError, match=r"services\.key cannot be read"):
        PipelineKeys(str(tmp_path))


def test_without_curve_in_libzmq_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_keys(tmp_path, None)
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(SettingsError, match=r"without CURVE.*install pyzmq"):
        PipelineKeys(str(tmp_path))
    with pytest.raises(SettingsError, match="without CURVE"):
        client_keys(TCP, str(tmp_path))
    assert "without CURVE" in keygen(tmp_path / "new").output
