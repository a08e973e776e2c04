"""The runtime directory: what is there of others stays as it is."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from nanovllm.launch.runtime_dir import runtime_dir
from nanovllm.settings import Settings, SettingsError


def test_a_missing_runtime_dir_is_made_private_and_removed_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with runtime_dir(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        with pytest.raises(SettingsError, match=f"{path} is in use"), runtime_dir(path):
            pass
    assert not path.exists()


def test_only_what_services_leave_there_is_removed(tmp_path: Path) -> None:
    others = {tmp_path / name for name in ("other.sock", "other.sock.lock", "notes.txt")}
    ours = [tmp_path / name for name in ("control.sock", "scheduler-7.sock.lock")]
    for path in (*others, *ours):
        path.touch()
    with runtime_dir(tmp_path):
        assert not any(path.exists() for path in ours), "left by a pipeline that was killed"
        for path in ours:
            path.touch()
    assert set(tmp_path.iterdir()) == others


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o707])
def test_a_runtime_dir_open_to_others_is_refused_and_left_alone(tmp_path: Path, mode: int) -> None:
    (tmp_path / "control.sock").touch()
    tmp_path.chmod(mode)
    refused = pytest.raises(SettingsError, match=r"open to other users.*chmod 700")
    with refused, runtime_dir(tmp_path):
        pass
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["control.sock"]


def test_a_runtime_dir_without_a_name_is_refused() -> None:
    with pytest.raises(SettingsError, match="--runtime-dir is empty"):
        Settings(runtime_dir="")
