"""A double of huggingface.co, which tests cannot reach: a server with one small model, as far as
`snapshot_download` asks."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

import msgspec

MODEL: Final = "owner/small"
COMMIT: Final = "5" * 40
TIMEOUT_S: Final = 120.0


class Hub(ThreadingHTTPServer):
    """Serves the files of `directory` as `MODEL`.

    Each node has an endpoint of its own, by which it is known. No file is sent to a node before as
    many processes as `processes` says have begun there.

    Attributes:
        files: by their names.
        sent: how often each file was sent to each node, by node and name.
    """

    daemon_threads = True

    def __init__(self, directory: Path, processes: Mapping[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()}
        self.sent: Counter[tuple[str, str]] = Counter()
        self._processes = processes
        self._begun: Counter[str] = Counter()
        self._changed = threading.Condition()

    def endpoint(self, node: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{node}"

    def begins(self, node: str) -> None:
        with self._changed:
            self._begun[node] += 1
            self._changed.notify_all()

    def sends(self, node: str, name: str) -> None:
        with self._changed:
            self.sent[node, name] += 1
            if not self._changed.wait_for(
                lambda: self._begun[node] >= self._processes[node], TIMEOUT_S
            ):
                raise TimeoutError(f"only {self._begun[node]} have begun on {node}")


class _Request(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.do_HEAD()

    def do_HEAD(self) -> None:
        _, node, path = self.path.partition("?")[0].split("/", 2)
        files = self.server.files
        if path == f"api/models/{MODEL}/revision/main":
            self.server.begins(node)
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": MODEL, "sha": COMMIT, "siblings": siblings})
        elif path == f"api/models/{MODEL}/tree/{COMMIT}":
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}
                    for name, content in files.items()
                ]
            )
        elif (name := path.removeprefix(f"{MODEL}/resolve/{COMMIT}/")) in files:
            if self.command == "GET":
                self.server.sends(node, name)
            self._answer(files[name])
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _json(self, value: object) -> None:
        self._answer(msgspec.json.encode(value))

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_hash(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def hub(directory: Path, processes: Mapping[str, int]) -> Iterator[Hub]:
    with Hub(directory, processes) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield serving
        finally:
            serving.shutdown()
            thread.join()
