"""Traces: what a `traceparent` says, and spans on their way to an OTLP collector."""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol
from urllib.parse import urlsplit

from nanovllm.wording import counted

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger(__name__)

_EXPORTER: Final = "opentelemetry.exporter.otlp.proto.http"
# Where a collector takes traces.
_PATH: Final = "/v1/traces"
# Traces that wait for the collector, at most.
MAX_WAITING: Final = 1024
# Traces in one request to the collector, and for how long it waits for more of them.
BATCH: Final = 128
GATHER_S: Final = 0.5
# For one request to the collector, with all that is tried again.
EXPORT_S: Final = 10.0
# How often at most the log tells of what was not sent.
TELL_DROPS_S: Final = 60.0
# The id of no span.
NO_SPAN: Final = 0


class TraceContext(NamedTuple):
    """Where spans belong: what a `traceparent` says.

    Attributes:
        span_id: the parent's; NO_SPAN where a trace begins.
        sampled: whether spans are recorded.
    """

    trace_id: int
    span_id: int
    sampled: bool

    @classmethod
    def of(cls, traceparent: str) -> TraceContext:
        """What a valid `traceparent` (`protocol.TRACEPARENT`) says."""
        _, trace_id, span_id, flags = traceparent.split("-")
        return cls(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & 1))

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.sampled:02x}"


class Span(NamedTuple):
    """One span that has ended.

    Attributes:
        start_ns: of `time.monotonic_ns`, as `end_ns`.
        error: why it failed.
        serves: whether a client of another process waits for its end.
    """

    name: str
    context: TraceContext
    parent_id: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | int]
    error: str | None = None
    serves: bool = False


class Tracer(Protocol):
    """Decides what is traced, and takes the spans."""

    def parent(self, traceparent: str | None) -> TraceContext:
        """Where the first span of a request belongs: a new trace, where no `traceparent` says."""

    def add(self, spans: list[Span]) -> None: ...


def child_of(parent: TraceContext) -> TraceContext:
    """The context of a new span."""
    return parent._replace(span_id=secrets.randbits(64) or 1)


def exporter_is_installed() -> bool:
    """Whether the extra nanovllm[otlp] is installed."""
    try:
        return find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        return False


def check_endpoint(endpoint: str) -> None:
    """Raises ValueError, which says what is wrong, unless a collector can be at `endpoint`."""
    form = "must be http://HOST:PORT or https://HOST:PORT, with a PORT of 1 to 65535"
    try:
        parts = urlsplit(endpoint)
        port = parts.port
    except ValueError:
        raise ValueError(form) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(form)
    if re.search(r"\s", endpoint):
        raise ValueError("must hold no white space")
    if parts.query or parts.fragment:
        raise ValueError("must end before ? and #, since /v1/traces is added to it")
    if parts.path.rstrip("/").endswith(_PATH):
        raise ValueError("must end before /v1/traces, which is added to it")


def check_environment() -> None:
    """Raises ValueError for a variable that OpenTelemetry does not start with."""
    import opentelemetry.sdk.trace  # noqa: F401


class OtlpTracer:
    """Sends spans to an OTLP collector, from a thread of its own.

    A collector that is slow, hangs or is absent costs spans, which are counted in the log, and
    nothing else. OpenTelemetry's environment variables hold (OTEL_TRACES_SAMPLER,
    OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS and others).

    Args:
        endpoint: the collector's, to which `/v1/traces` is added.
    """

    def __init__(self, endpoint: str) -> None:
        # What nobody needs who does not trace.
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider

        logging.getLogger("opentelemetry.util.re").addFilter(_without_values)
        named = Resource.create({"service.name": "nanovllm"})
        self._resource = named.merge(OTELResourceDetector().detect())
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        self._url = endpoint.rstrip("/") + _PATH
        session = requests.Session()
        session.stream = True  # an answer's body may be without end
        session.hooks["response"].append(_take_status)
        self._exporter = OTLPSpanExporter(self._url, timeout=EXPORT_S, session=session)
        self._waiting: queue.Queue[list[Span]] = queue.Queue(MAX_WAITING)
        # Spans: two counts, since each has a thread of its own that counts.
        self._refused = self._failed = 0
        self._dropped = threading.Event()
        self._complaint = _Complaint()
        for run in (self._send, self._tell):
            threading.Thread(target=run, name="otlp", daemon=True).start()

    def parent(self, traceparent: str | None) -> TraceContext:
        from opentelemetry import trace

        if traceparent is None:
            parent, around = TraceContext(secrets.randbits(128) or 1, NO_SPAN, False), None
        else:
            parent = TraceContext.of(traceparent)
            flags = trace.TraceFlags(parent.sampled)
            remote = trace.SpanContext(parent.trace_id, parent.span_id, True, flags)
            around = trace.set_span_in_context(trace.NonRecordingSpan(remote))
        decision = self._sampler.should_sample(around, parent.trace_id, "request").decision
        return parent._replace(sampled=decision.name == "RECORD_AND_SAMPLE")

    def add(self, spans: list[Span]) -> None:
        """Takes spans, and never waits."""
        try:
            self._waiting.put_nowait(spans)
        except queue.Full:
            self._refused += len(spans)
            self._dropped.set()

    def _send(self) -> None:
        from opentelemetry.sdk.trace.export import SpanExportResult

        while True:
            batch = [self._waiting.get()]
            time.sleep(GATHER_S)
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            # Of this moment: the wall clock may have been set.
            epoch_ns = time.time_ns() - time.monotonic_ns()
            spans = [self._readable(span, epoch_ns) for trace in batch for span in trace]
            if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
                self._failed += len(spans)
                self._dropped.set()

    def _tell(self) -> None:
        """Tells of dropped spans, also while the other thread hangs."""
        told = 0
        while True:
            self._dropped.wait()
            time.sleep(EXPORT_S)  # until then the reason is known
            self._dropped.clear()
            if not (dropped := self._refused + self._failed - told):
                continue  # told before their event came
            told += dropped
            what = f"{counted(dropped, 'span')} of traces"
            log.warning("%s did not reach %s: %s", what, self._url, self._complaint.latest)
            time.sleep(TELL_DROPS_S)

    def _readable(self, span: Span, epoch_ns: int) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: int) -> SpanContext:
            return SpanContext(
                span.context.trace_id, span_id, is_remote=False, trace_flags=TraceFlags(1)
            )

        return ReadableSpan(
            span.name,
            context(span.context.span_id),
            None if span.parent_id == NO_SPAN else context(span.parent_id),
            self._resource,
            span.attributes,
            kind=SpanKind.SERVER if span.serves else SpanKind.INTERNAL,
            status=Status() if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_ns + epoch_ns,
            end_time=span.end_ns + epoch_ns,
        )


def _without_values(record: logging.LogRecord) -> bool:
    """Of a header that is not valid, OpenTelemetry logs the value: a secret."""
    record.args = ("it is not shown here",)
    return True


def _take_status(answer: requests.Response, **_: object) -> None:
    """Leaves the body, and raises ValueError for a redirection, which OpenTelemetry takes for a
    success and does not follow."""
    answer.close()
    if 300 <= answer.status_code < 400:
        raise ValueError(f"it answers {answer.status_code}, a redirection")


class _Complaint(logging.Handler):
    """Keeps the latest that OpenTelemetry logs, which would log each failure."""

    def __init__(self) -> None:
        super().__init__()
        self.latest = "there were more than are sent"
        logger = logging.getLogger("opentelemetry")
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.latest = record.getMessage()


def tracer_to(endpoint: str) -> Tracer | None:
    """The tracer for `--otlp`; None where it names no endpoint."""
    return OtlpTracer(endpoint) if endpoint else None
