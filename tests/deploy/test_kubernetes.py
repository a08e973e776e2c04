"""deploy/kubernetes: the API's schemas take what is rendered, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import click
import kubernetes_validate
import msgspec
import pytest

from nanovllm.checkpoint import resolve_model
from nanovllm.client.cli import main as command
from nanovllm.keys import make_keys
from nanovllm.launch.cli import main as launch
from nanovllm.launch.groups import GRACE_S
from nanovllm.launch.join import check_to_join, offer, settings_to_join
from nanovllm.launch.policy import MOVE_S
from nanovllm.options import given_options, settings_from
from nanovllm.services.http.gate import PROBES
from nanovllm.settings import Settings
from nanovllm.transport.endpoints import parse
from tests.deploy.manifests import (
    KUBECTL,
    OVERLAYS,
    Json,
    Pod,
    named,
    of_kind,
    pods,
    rendered,
    selected,
)

NAMES = sorted(path.name for path in OVERLAYS.iterdir())
INGRESS, TOKENIZERS, ENGINES = "nanovllm-ingress", "nanovllm-tokenizers", "nanovllm-engines"
PIPELINE = "nanovllm-pipeline"
ALL = {INGRESS, TOKENIZERS, ENGINES}
KEYS = "/etc/nanovllm/keys"

overlays = pytest.mark.parametrize("overlay", NAMES)
every_pod = pytest.mark.parametrize(
    "pod",
    [pod for name in NAMES for pod in pods(name)],
    ids=lambda pod: f"{pod.overlay}-{pod.name}",
)


class Launch(msgspec.Struct):
    """What a launcher makes of its command line."""

    settings: Settings
    given: set[str]


def launch_of(pod: Pod, files: Path) -> Launch:
    """As the launcher takes the pod's command line; a `--config` is the ConfigMap that is there.
    Names of services are 127.0.0.1, for they resolve in a cluster alone."""
    program, *words = pod.arguments
    assert program == "nanovllm-launch"
    for path, volume in pod.mounts.items():
        if "configMap" in volume:
            for name, text in named(pod.overlay, "ConfigMap", volume["configMap"]["name"])[
                "data"
            ].items():
                (files / name).write_text(text)
            words = [word.replace(path, str(files)) for word in words]
    for service in of_kind(pod.overlay, "Service"):
        words = [w.replace(f"//{service['metadata']['name']}:", "//127.0.0.1:") for w in words]
    with launch.make_context("nanovllm-launch", words) as context:
        given = given_options(context.params)
        return Launch(settings_from(context.params), set(given))


def size(quantity: str) -> int:
    """In bytes, of the units that are used here."""
    return int(quantity[:-2]) << {"Mi": 20, "Gi": 30}[quantity[-2:]]


def pod_of(overlay: str, name: str) -> Pod:
    (found,) = [pod for pod in pods(overlay) if pod.name == name]
    return found


@overlays
@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_the_schemas_take_it(overlay: str, version: str) -> None:
    for manifest in rendered(overlay):
        kubernetes_validate.validate(manifest, version, strict=True)
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == "nanovllm"


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    manifest = msgspec.json.decode(msgspec.json.encode(rendered("cpu")[0]))
    manifest["spec"] = {"unknown": 1}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@overlays
def test_selectors_find_the_pods_that_are_meant(overlay: str) -> None:
    assert {pod.name for pod in pods(overlay)} == ALL
    for workload in of_kind(overlay, "Deployment", "StatefulSet"):
        assert selected(overlay, workload["spec"]["selector"]["matchLabels"]) == [
            workload["metadata"]["name"]
        ]
        for spread in workload["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selected(overlay, spread["labelSelector"]["matchLabels"]) == [
                workload["metadata"]["name"]
            ]
    services = {
        service["metadata"]["name"]: selected(overlay, service["spec"]["selector"])
        for service in of_kind(overlay, "Service")
    }
    assert services == {"nanovllm": [INGRESS], PIPELINE: [INGRESS], ENGINES: [ENGINES]}
    budgets = {
        selected(overlay, budget["spec"]["selector"]["matchLabels"])[0]: budget["spec"]
        for budget in of_kind(overlay, "PodDisruptionBudget")
    }
    assert {name: budget["maxUnavailable"] for name, budget in budgets.items()} == {
        INGRESS: 0,
        TOKENIZERS: 1,
        ENGINES: 1,
    }
    engines = pod_of(overlay, ENGINES).workload["spec"]
    assert named(overlay, "Service", engines["serviceName"])["spec"]["clusterIP"] == "None"


@overlays
def test_there_is_one_ingress(overlay: str) -> None:
    spec = pod_of(overlay, INGRESS).workload["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@overlays
def test_joining_pods_find_the_pipeline_and_fit_it(overlay: str, tmp_path: Path) -> None:
    ingress = pod_of(overlay, INGRESS)
    service = named(overlay, "Service", PIPELINE)["spec"]
    own = launch_of(ingress, tmp_path).settings
    assert parse(own.services) == ("10.1.2.3", ingress.ports["supervisors"])
    assert parse(own.services_beyond) == ("10.1.2.3", ingress.ports["services"])
    # A client connects to the port after the one it was told: they are alike at the service.
    for port in service["ports"]:
        assert port["port"] == ingress.ports[port["targetPort"]]
    assert len(service["ports"]) == 2
    # Engines join before the pipeline is ready.
    assert service["publishNotReadyAddresses"]
    model = resolve_model("")
    joined = offer(msgspec.structs.replace(own, model=""), "", model)
    for name, brings in ((TOKENIZERS, "tokenizers"), (ENGINES, "engines")):
        pod = pod_of(overlay, name)
        assert f"--join=tcp://{PIPELINE}:{ingress.ports['supervisors']}" in pod.arguments
        says = launch_of(pod, tmp_path)
        check_to_join(says.settings, says.given)
        settings, _ = settings_to_join(says.settings, says.given, joined)
        assert settings.advertise == "10.1.2.3"
        assert getattr(settings, brings) == 1
    engine = launch_of(pod_of(overlay, ENGINES), tmp_path).settings
    resources = pod_of(overlay, ENGINES).container["resources"]
    gpus = resources.get("limits", {}).get("nvidia.com/gpu", "0")
    assert int(gpus) == (0 if engine.device == "cpu" else engine.tensor_parallel_size)


@overlays
def test_clients_find_the_ingress(overlay: str, tmp_path: Path) -> None:
    ingress = pod_of(overlay, INGRESS)
    own = launch_of(ingress, tmp_path).settings
    assert own.http == f"0.0.0.0:{ingress.ports['http']}"
    assert parse(own.ingress) == ("", ingress.ports["clients"])
    ports = named(overlay, "Service", "nanovllm")["spec"]["ports"]
    targets = {port["targetPort"]: port["port"] for port in ports}
    assert targets == {"http": 80, "clients": ingress.ports["clients"]}


@overlays
def test_the_network_is_open_for_clients_at_two_ports_alone(overlay: str) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(overlay, "NetworkPolicy")}
    inner, clients = policies["nanovllm-services"], policies["nanovllm-clients"]
    assert len(policies) == 2
    assert set(selected(overlay, inner["podSelector"]["matchLabels"])) == ALL
    ((peer,),) = [rule["from"] for rule in inner["ingress"]]
    assert set(selected(overlay, peer["podSelector"]["matchLabels"])) == ALL
    assert "ports" not in inner["ingress"][0]
    assert selected(overlay, clients["podSelector"]["matchLabels"]) == [INGRESS]
    (rule,) = clients["ingress"]
    assert [port["port"] for port in rule["ports"]] == ["http", "clients"]
    assert {"http", "clients"} <= pod_of(overlay, INGRESS).ports.keys()


@every_pod
def test_files_are_where_the_command_line_says(pod: Pod, tmp_path: Path) -> None:
    settings = launch_of(pod, tmp_path).settings
    assert settings.keys == KEYS
    has = {"services.key", "server.key"} if pod.name == INGRESS else {"services.key"}
    assert pod.secret_files(KEYS) == has
    assert pod.mounts[KEYS]["secret"]["secretName"] == "nanovllm-keys"
    if pod.name == INGRESS:
        where = str(Path(settings.api_key_file).parent)
        assert pod.mounts[where]["secret"]["secretName"] == "nanovllm-api-keys"
    for volume in pod.mounts.values():
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o400
    model = launch_of(pod_of(pod.overlay, INGRESS), tmp_path).settings.model
    if model:
        (volume,) = [v for path, v in pod.mounts.items() if model.startswith(f"{path}/")]
        assert volume["persistentVolumeClaim"] == {
            "claimName": "nanovllm-models",
            "readOnly": True,
        }


@every_pod
def test_nothing_can_be_written_but_what_must_be(pod: Pod) -> None:
    written = {path for path, volume in pod.mounts.items() if "emptyDir" in volume}
    assert written - {"/dev/shm"} == {"/tmp", "/run/nanovllm"}
    # A launcher's own directory, for it must be private, and the volume is not.
    assert str(Path(pod.environment["NANOVLLM_RUNTIME_DIR"]).parent) in written


@every_pod
def test_pods_are_restricted(pod: Pod) -> None:
    """What the pod security standard of that name asks for, and a read-only file system."""
    security: Json = pod.spec["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] > 0
    assert security["fsGroup"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod.spec["automountServiceAccountToken"]
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret"}
    assert all(volume.keys() - {"name"} <= allowed for volume in pod.spec["volumes"])


@every_pod
def test_a_drain_ends_before_the_pod_is_killed(pod: Pod, tmp_path: Path) -> None:
    drain_s = launch_of(pod, tmp_path).settings.drain_timeout
    hook_s = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
    # An HTTP server has its grace after the drain, and then all others have.
    grace_s = hook_s["seconds"] + drain_s + MOVE_S + 2 * GRACE_S
    assert pod.spec["terminationGracePeriodSeconds"] > grace_s


@overlays
def test_pods_that_clients_reach_by_a_service_wait_for_its_change_first(overlay: str) -> None:
    """The drain refuses requests, and Services send them until all nodes know of the pod's end."""
    clients = selected(overlay, named(overlay, "Service", "nanovllm")["spec"]["selector"])
    hooks = {pod.name: pod.container.get("lifecycle") for pod in pods(overlay)}
    assert {name for name, hook in hooks.items() if hook} == {*clients} == {INGRESS}
    assert hooks[INGRESS] == {"preStop": {"sleep": {"seconds": 5}}}


@every_pod
def test_what_a_pod_takes_of_its_node_is_bounded(pod: Pod) -> None:
    resources = pod.container["resources"]
    limit, asked = (size(resources[kind]["memory"]) for kind in ("limits", "requests"))
    scratch = [volume["emptyDir"] for volume in pod.mounts.values() if "emptyDir" in volume]
    in_memory = [size(one["sizeLimit"]) for one in scratch if one.get("medium") == "Memory"]
    assert all("sizeLimit" in one for one in scratch)
    assert limit >= asked + sum(in_memory)  # which count as the pod's memory


@every_pod
def test_probes_ask_what_is_there(pod: Pod) -> None:
    probes = {name: pod.container[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    if pod.name == INGRESS:
        asked = {name: probe["httpGet"] for name, probe in probes.items()}
        assert {ask["port"] for ask in asked.values()} <= pod.ports.keys()
        assert {ask["path"] for ask in asked.values()} == set(PROBES)
        assert asked["readiness"]["path"] == "/ready"
        return
    for name, probe in probes.items():
        program, subcommand, *options = probe["exec"]["command"]
        assert program == "nanovllm"
        found = command.get_command(click.Context(command), subcommand)
        assert found is not None
        with found.make_context(subcommand, options) as context:
            assert context.params["ready"] == (name == "readiness")


def test_the_pages_commands_make_what_the_pods_need(tmp_path: Path) -> None:
    """docs/clusters.md, as far as it can be run without a cluster."""
    page = (OVERLAYS.parents[2] / "docs" / "clusters.md").read_text().partition("## Kubernetes")[2]
    (block,) = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", "").splitlines()]
    make_keys(tmp_path / "keys", None)
    (tmp_path / "api-keys").write_text("key\n")
    secrets = {}
    for words in [words for words in commands if "create" in words]:
        dry = [str(KUBECTL), *words[1:], "--dry-run=client", "-o", "json"]
        made = json.loads(subprocess.check_output(dry, cwd=tmp_path))
        assert made["metadata"]["namespace"] == "nanovllm"
        secrets[made["metadata"]["name"]] = set(made["data"])
    for pod in pods("cpu"):
        for volume in pod.mounts.values():
            if "secret" in volume:
                items = volume["secret"].get("items", [{"key": "keys"}])
                assert {item["key"] for item in items} <= secrets[volume["secret"]["secretName"]]
    applied = [OVERLAYS.parents[2] / words[-1] for words in commands if "apply" in words]
    assert applied == [OVERLAYS.parent / "base" / "namespace.yaml", OVERLAYS / "cpu"]
    assert all(path.exists() for path in applied)
    for kind, name in re.findall(r"\b(deployment|statefulset|service)[/ ](nanovllm[\w-]*)", page):
        kinds = {"deployment": "Deployment", "statefulset": "StatefulSet", "service": "Service"}
        assert named("cpu", kinds[kind], name)
    (forwarded,) = re.findall(r"service/nanovllm \d+:(\d+)", page)
    ports = named("cpu", "Service", "nanovllm")["spec"]["ports"]
    assert int(forwarded) in [port["port"] for port in ports]
