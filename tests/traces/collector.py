"""A collector that keeps the spans that it is sent by OTLP over HTTP."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TIMEOUT_S = 60.0


class Collector:
    """
    Attributes:
        endpoint: for `--otlp`.
        services: the `service.name` of all that has come.
    """

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.services: set[str] = set()
        self._spans: list[Span] = []
        self._news = threading.Condition()

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self._news:
            for resource in request.resource_spans:
                attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
                self.services.add(attributes["service.name"])
                for scope in resource.scope_spans:
                    self._spans += scope.spans
            self._news.notify_all()

    def trace(self, trace_id: int, *names: str) -> list[Span]:
        """The spans of a trace, once spans of these names are among them, by their start."""
        deadline = time.monotonic() + TIMEOUT_S
        with self._news:
            while not set(names) <= (came := {span.name for span in self._of(trace_id)}):
                if not self._news.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"of {names} only {came} came")
            found = self._of(trace_id)
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    @property
    def trace_ids(self) -> set[int]:
        with self._news:
            return {int.from_bytes(span.trace_id) for span in self._spans}

    def _of(self, trace_id: int) -> list[Span]:
        return [span for span in self._spans if int.from_bytes(span.trace_id) == trace_id]


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/v1/traces":
                collector.take(ExportTraceServiceRequest.FromString(raw))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(server.server_port)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield collector
        server.shutdown()
        thread.join(TIMEOUT_S)
