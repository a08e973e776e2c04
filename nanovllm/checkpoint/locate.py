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
        return path.resolve()
    looks_like_hub_id = len(name.split("/")) == 2 and not name.startswith((".", "/", "~"))
    if path.exists() or not looks_like_hub_id:
        raise CheckpointError(f"no such model: {name} is neither a directory nor a hub id")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"no such model: {name} is not a directory, and the hub did not give it ({reason})"
        ) from None


def model_name(directory: Path) -> str:
    """What people call the model in `directory`; the hub's cache keeps a model as
    `models--OWNER--NAME/snapshots/REVISION`."""
    if directory == DEMO_CHECKPOINT:
        return "demo"
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.split("--", 2)[-1]
    return directory.name
