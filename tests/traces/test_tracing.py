"""How spans leave, and what needs OpenTelemetry: `--otlp` alone."""

from __future__ import annotations

import contextlib
import http.client
import logging
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import tracing
from nanovllm.services.http.tracing import valid_traceparent
from nanovllm.settings import Settings, SettingsError
from nanovllm.tracing import MAX_WAITING, OtlpTracer, Span, TraceContext
from tests.readers import free_tcp_endpoint
from tests.traces.collector import TIMEOUT_S, collecting

CONTEXT = TraceContext(5, 6, True)
SPAN = Span("ingress", CONTEXT, 7, 1_000, 2_000, {"a": 1}, "it broke")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.put(record.getMessage())


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[queue.Queue[str]]:
    """What is told of spans that do not arrive; requests to a collector end early."""
    monkeypatch.setattr(tracing, "EXPORT_S", 0.2)
    monkeypatch.setattr(tracing, "GATHER_S", 0.05)
    handler = Lines()
    tracing.log.addHandler(handler)
    yield handler.lines
    tracing.log.removeHandler(handler)


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The endpoint of a collector that has `answer` do what it does, once it was sent spans."""

    def run() -> None:
        with contextlib.suppress(OSError):  # also when the server is closed
            while True:
                with server.accept()[0] as connection, contextlib.suppress(OSError):
                    request = connection.makefile("rb")
                    request.readline()
                    size = int(http.client.parse_headers(request)["content-length"])
                    request.read(size)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join(TIMEOUT_S)


@pytest.mark.parametrize("hangs", [True, False])
def test_spans_that_do_not_arrive_are_counted_in_the_log(
    hangs: bool, logged: queue.Queue[str]
) -> None:
    endpoint = free_tcp_endpoint().replace("tcp", "http")
    with socket.create_server(("127.0.0.1", 0)) as server:
        if hangs:
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        tracer = OtlpTracer(endpoint)
        for _ in range(2 * MAX_WAITING):
            tracer.add([SPAN, SPAN])
        line = logged.get(timeout=TIMEOUT_S)
    assert "spans of traces did not reach" in line
    assert endpoint in line
    assert int(line.split()[0].replace(",", "")) >= MAX_WAITING
    assert logged.empty(), "once a minute"


def test_drops_are_told_while_an_answer_drips(logged: queue.Queue[str]) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
        while not over.wait(tracing.EXPORT_S / 4):
            connection.sendall(b"x")

    with answering(drip) as endpoint:
        tracer = OtlpTracer(endpoint)
        for _ in range(2 * MAX_WAITING):
            tracer.add([SPAN])
        assert "did not reach" in logged.get(timeout=TIMEOUT_S)
        over.set()


def test_an_answer_without_end_is_not_read() -> None:
    closed = threading.Event()

    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(64):
                connection.sendall(b"x" * 2**20)
        except OSError:
            closed.set()

    with answering(flood) as endpoint:
        OtlpTracer(endpoint).add([SPAN])
        assert closed.wait(TIMEOUT_S)


def test_a_redirection_is_no_success(
    logged: queue.Queue[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "EXPORT_S", TIMEOUT_S)
    answer = b"HTTP/1.1 307 Elsewhere\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"
    with answering(lambda connection: connection.sendall(answer)) as endpoint:
        tracer = OtlpTracer(endpoint)
        monkeypatch.setattr(tracing, "EXPORT_S", 0.0)  # told at once
        tracer.add([SPAN])
        assert "1 span of traces did not reach" in logged.get(timeout=TIMEOUT_S)


def test_spans_arrive_as_they_are() -> None:
    with collecting() as collector:
        OtlpTracer(collector.endpoint + "/").add([SPAN])
        (span,) = collector.trace(5, "ingress")
    assert int.from_bytes(span.span_id) == 6
    assert int.from_bytes(span.parent_span_id) == 7
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_000
    assert span.status.message == "it broke"


def test_opentelemetry_decides_what_begins_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.0")
    tracer = OtlpTracer("http://127.0.0.1:1")
    assert not tracer.parent(None).sampled
    assert tracer.parent(CONTEXT.traceparent) == CONTEXT


@pytest.mark.parametrize("sampler", ["always_off", "always_on"])
def test_a_caller_has_no_say_where_the_sampler_gives_none(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    tracer, wanted = OtlpTracer("http://127.0.0.1:1"), sampler == "always_on"
    for context in (CONTEXT, CONTEXT._replace(sampled=False)):
        assert tracer.parent(context.traceparent) == context._replace(sampled=wanted)


def test_a_secret_header_that_is_not_valid_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key: hunter2")
    logging.getLogger("opentelemetry").propagate = True  # as in a process that has not traced
    OtlpTracer("http://127.0.0.1:1")
    assert "Header format invalid" in caplog.text
    assert "hunter2" not in caplog.text


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_a_traceparent_says_what_was_written(trace_id: int, span_id: int, sampled: bool) -> None:
    context = TraceContext(trace_id, span_id, sampled)
    assert valid_traceparent(context.traceparent) == context.traceparent
    assert TraceContext.of(context.traceparent) == context


A, B = "a" * 32, "b" * 16


@pytest.mark.parametrize(
    ("header", "valid"),
    [
        (f"00-{A}-{B}-03", f"00-{A}-{B}-03"),
        (f"cc-{A}-{B}-01", f"00-{A}-{B}-01"),
        (f"cc-{A}-{B}-01-what-comes", f"00-{A}-{B}-01"),
        (f"cc-{A}-{B}-01.what-comes", None),
        (f"00-{A}-{B}-01-what-comes", None),
        (f"ff-{A}-{B}-01", None),
        (f"00-{'0' * 32}-{B}-01", None),
        (f"00-{A}-{'0' * 16}-01", None),
        (f"00-{A.upper()}-{B}-01", None),
        (f"00-{A}-{B}-01\n", None),
        ("", None),
    ],
)
def test_the_header_is_read_as_w3c_says(header: str, valid: str | None) -> None:
    assert valid_traceparent(header) == valid


def test_without_otlp_nothing_of_opentelemetry_is_imported() -> None:
    check = (
        "import sys\n"
        "import nanovllm.services.ingress.loop, nanovllm.services.http.__main__\n"
        "from nanovllm.settings import Settings\n"
        "from nanovllm.tracing import tracer_to\n"
        "assert tracer_to(Settings().otlp) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=TIMEOUT_S)


def test_a_launch_without_the_extra_says_what_to_install() -> None:
    launch = (
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "from nanovllm.launch.cli import main\n"
        "main(['--otlp', 'http://127.0.0.1:4318'])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", launch], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ran.returncode != 0
    assert "pip install 'nanovllm[otlp]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_launch_names_a_variable_that_opentelemetry_does_not_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
    launch = [sys.executable, "-m", "nanovllm.launch.cli", "--otlp", "http://127.0.0.1:1"]
    ran = subprocess.run(launch, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 1
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT must be" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("localhost:4318", "must be http://HOST:PORT"),
        ("http://", "must be http://HOST:PORT"),
        ("http://:4318", "must be http://HOST:PORT"),
        ("ftp://localhost:4318", "must be http://HOST:PORT"),
        ("http://local host:4318", "white space"),
        ("http://[::1:4318", "must be http://HOST:PORT"),
        ("http://127.0.0.1:99999", "a PORT of 1 to 65535"),
        ("http://127.0.0.1:0", "a PORT of 1 to 65535"),
        ("http://127.0.0.1:otlp", "a PORT of 1 to 65535"),
        ("http://127.0.0.1:4318?to=me", "before [?]"),
        ("http://127.0.0.1:4318/v1/traces/", "must end before /v1/traces"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(endpoint: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"--otlp {re.escape(endpoint)}: .*{reason}"):
        Settings(otlp=endpoint)


@pytest.mark.parametrize("endpoint", ["http://[::1]:4318", "https://collector.example/mine/"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    assert Settings(otlp=endpoint).otlp == endpoint


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "nanovllm"),
        ({"OTEL_SERVICE_NAME": ""}, "nanovllm"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine", "OTEL_SERVICE_NAME": "ours"}, "ours"),
    ],
)
def test_opentelemetry_says_the_name(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    with collecting() as collector:
        OtlpTracer(collector.endpoint).add([SPAN])
        collector.trace(5, "ingress")
    assert collector.services == {name}
