"""What a run loads: a pipeline's ingress socket, or an OpenAI API."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import click

from nanovllm.bench.client import LoadClient, SocketClient
from nanovllm.bench.http import HttpClient, Url
from nanovllm.client.results import PipelineUnavailable
from nanovllm.client.sync import Client
from nanovllm.client.terminal import answering
from nanovllm.client.where import Where
from nanovllm.control import Status

# Between two questions to a pipeline that still loads.
ASK_AGAIN_S: Final = 0.2
ANSWER_S: Final = 10.0


class Target(NamedTuple):
    """
    Attributes:
        name: its address.
        version: the server's; None where it does not say.
        device: what the workers say that they run on; None if the pipeline's supervisor could not
            be asked.
    """

    name: str
    model: str
    version: str | None
    device: str | None
    connect: Callable[[], contextlib.AbstractContextManager[LoadClient]]


def socket_target(where: Where) -> Target:
    """Waits until the pipeline can start requests; raises PipelineUnavailable if none answers."""
    endpoint = where.ingress
    with Client(endpoint, keys=where.keys) as client:
        pong = answering(client, endpoint)
        if not pong.ready:
            _tell_waiting(pong.model, endpoint)
        while not pong.ready:
            time.sleep(ASK_AGAIN_S)
            pong = client.ping()
    device = None
    with (
        contextlib.suppress(PipelineUnavailable),
        where._replace(endpoint=endpoint).control() as control,
    ):
        device = _device(control.status())
    return Target(
        endpoint,
        pong.model,
        pong.version,
        device,
        lambda: SocketClient(endpoint, where.keys),
    )


def http_target(where: Where, url: str, key: str, model: str | None) -> Target:
    """Waits until the server is ready.

    Args:
        url: the server's; empty for that of the HTTP servers of the pipeline at `where`.
        model: None for the first that the server lists.

    Raises:
        PipelineUnavailable: nobody answers, or without a model, or the pipeline has no HTTP server.
        ValueError: `url` is no URL.
    """
    device = None
    if not url:
        with where.control() as control:
            status = control.status()
        url, device = status.http, _device(status)
        if not url:
            raise PipelineUnavailable("this pipeline serves no HTTP: launch it with --http")
    at = Url.parse(url)
    root = at.text.removesuffix("/v1")
    if _get(f"{root}/ready", key).status == 503:
        _tell_waiting("the server", at.text)
        while _get(f"{root}/ready", key).status == 503:
            time.sleep(ASK_AGAIN_S)
    listed = _get(f"{at.text}/models", key)
    if model is None:
        try:
            model = str(listed.json["data"][0]["id"])
        except (LookupError, TypeError):
            raise PipelineUnavailable(
                f"{at.text} lists no model (status {listed.status}{listed.error}): name it by"
                " --model, and give a key if one is needed"
            ) from None
    asked = model
    version = _get(f"{root}/version", key).json
    return Target(
        at.text,
        model,
        version.get("version") if isinstance(version, dict) else None,
        device,
        lambda: HttpClient(at, asked, key),
    )


class _Got(NamedTuple):
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """None if the body is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def error(self) -> str:
        try:
            return f": {self.json['error']['message']}"
        except (LookupError, TypeError):
            return ""


def _get(url: str, key: str) -> _Got:
    """Raises PipelineUnavailable if nobody answers."""
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    # The load goes to the server itself, too.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(asked, timeout=ANSWER_S) as answer:
            return _Got(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        return _Got(error.code, error.read())
    except OSError as error:
        why = getattr(error, "reason", error)
        raise PipelineUnavailable(f"no server answers at {url}: {why}") from None


def _device(status: Status) -> str | None:
    """What the workers say that they run on."""
    said = {service.detail for service in status.services if service.role == "gpu_worker"}
    return "; ".join(sorted(filter(None, said))) or None


def _tell_waiting(what: str, name: str) -> None:
    click.echo(f"{what} at {name} is not ready yet: waiting …", err=True)
