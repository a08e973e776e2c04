"""deploy/kubernetes as `kubectl kustomize` renders it, and what its pods say."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

OVERLAYS = Path(__file__).parents[2] / "deploy" / "kubernetes" / "overlays"
KUBECTL = Path(sys.executable).with_name("kubectl")
# A manifest, or a part of one.
Json = dict[str, Any]


@cache
def rendered(overlay: str) -> list[Json]:
    command = [str(KUBECTL), "kustomize", str(OVERLAYS / overlay)]
    return list(yaml.safe_load_all(subprocess.check_output(command, text=True)))


def of_kind(overlay: str, *kinds: str) -> list[Json]:
    return [manifest for manifest in rendered(overlay) if manifest["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Json:
    (found,) = [m for m in of_kind(overlay, kind) if m["metadata"]["name"] == name]
    return found


class Pod(NamedTuple):
    """The pods of a Deployment or StatefulSet, which have one container."""

    overlay: str
    workload: Json

    @property
    def name(self) -> str:
        name: str = self.workload["metadata"]["name"]
        return name

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.workload["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def spec(self) -> Json:
        spec: Json = self.workload["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Json:
        container: Json
        (container,) = self.spec["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def environment(self) -> dict[str, str]:
        """Where it has its own address, that is 10.1.2.3."""
        of_the_pod = {"status.podIP": "10.1.2.3"}
        return {
            one["name"]: one.get("value") or of_the_pod[one["valueFrom"]["fieldRef"]["fieldPath"]]
            for one in self.container["env"]
        }

    @property
    def arguments(self) -> list[str]:
        """With the values of variables, as the kubelet puts them in."""
        return [
            re.sub(r"\$\((\w+)\)", lambda found: self.environment[found[1]], argument)
            for argument in self.container["args"]
        ]

    @property
    def mounts(self) -> dict[str, Json]:
        """The volume at each path."""
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        mounts = self.container["volumeMounts"]
        assert {mount["name"] for mount in mounts} == set(volumes)
        return {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}

    def secret_files(self, path: str) -> set[str]:
        """The files of the secret that is mounted there."""
        return {item["path"] for item in self.mounts[path]["secret"]["items"]}


def pods(overlay: str) -> list[Pod]:
    return [Pod(overlay, w) for w in of_kind(overlay, "Deployment", "StatefulSet")]


def selected(overlay: str, selector: dict[str, str]) -> list[str]:
    """The workloads whose pods have these labels."""
    return [pod.name for pod in pods(overlay) if selector.items() <= pod.labels.items()]
