"""Which directory a model's name stands for, and which name a directory has."""

from __future__ import annotations

from pathlib import Path

from nanovllm.checkpoint.files import CheckpointError

DEMO_CHECKPOINT = (Path(__file__).parents[1] / "launch" / "demo" / "checkpoint").resolve()


def resolve_model(name: str) -> Path:
    """The checkpoint directory that `name` stands for.

    Args:
        name: a directory, a hub id (`owner/name`, downloaded with a progress bar unless it is
            in the cache), or "" for the demo checkpoint.

    Raises:
        CheckpointError: if there is no such model.
    """
    if not name:
        return DEMO_CHECKPOINT
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists() and any(path.glob("*.gguf")):
            raise CheckpointError(_gguf(name, "has only GGUF files"))
        return path.resolve()
    if path.suffix == ".gguf":
        raise CheckpointError(_gguf(name, "is a GGUF file"))
    if path.is_file():
        raise CheckpointError(f"{name} is a file: name the directory of the checkpoint")
    looks_like_hub_id = len(name.split("/")) == 2 and not name.startswith((".", "/", "~"))
    if path.exists() or not looks_like_hub_id:
        raise CheckpointError(f"no such model: {name} is neither a directory nor a hub id")
    directory = _from_hub(name)
    if not (directory / "config.json").exists():
        raise CheckpointError(_gguf(name, "has no config.json; perhaps only GGUF files are there"))
    return directory


def _gguf(name: str, what: str) -> str:
    return (
        f"{name} {what}, and GGUF is llama.cpp's format, which is not served: name the checkpoint"
        " of the same model with config.json and *.safetensors"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except GatedRepoError:
        why = "its owner lets in only who has asked: do so on its page, and run `hf auth login`"
    except RepositoryNotFoundError:
        why = "the hub has no such model: check the name, or run `hf auth login` if it is private"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        why = (
            f"the hub did not give it ({reason}). Where there is no way to the hub, run"
            f" `hf download {name} --local-dir DIRECTORY` on a machine that has one, and name the"
            " directory; HF_ENDPOINT names a mirror"
        )
    raise CheckpointError(f"no such model: {name} is not a directory, and {why}")


def model_name(directory: Path) -> str:
    """What people call the model in `directory`; the hub's cache keeps a model as
    `models--OWNER--NAME/snapshots/REVISION`."""
    if directory == DEMO_CHECKPOINT:
        return "demo"
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--", 2)[-1]
    return directory.name
