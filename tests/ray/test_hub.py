"""A model that is named by its hub id, on nodes that have not got it."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

pytest.importorskip("ray")

from benchmarks.support.on_ray import on_ray
from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.machines.ports import free_services
from tests.ray.hub import MODEL, hub


def test_each_node_fetches_a_model_once(tmp_path: Path) -> None:
    """One node has the head, the other two engines, which start at the same time."""
    with hub(DEMO_CHECKPOINT, {"heads": 1, "engines": 2}) as serving:

        def node(name: str) -> dict[str, str]:
            return {"HF_ENDPOINT": serving.endpoint(name), "HF_HOME": str(tmp_path / name)}

        with patch.dict(os.environ, node("heads")), on_ray((1,)) as on:
            with patch.dict(os.environ, node("engines")):
                on.add_node(2)
            on.command(
                *("up", MODEL, "--engines", "2", "--device", "sim", "--http", ""),
                *("--port", free_services().rpartition(":")[2]),
            )
            shown = on.command("status")
            on.command("down")
    assert shown.count("ready, as the pipeline's engine") == 2
    assert serving.sent == {(n, f): 1 for n in ("heads", "engines") for f in serving.files}
