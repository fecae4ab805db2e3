"""A hub on this machine: the routes that downloads use, over real HTTP, with ranges and broken connections."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath

from diffusion.checkpoints import hub as hub_client

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves `files` (repository -> name -> content); the repository of a data set is `datasets/owner/name`.

    break_after: bytes of a file after which the next GET's connection is cut; None = never.
    ranges: the Range headers that came. statements: sha256 that the listing states instead of the true one.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.break_after: int | None = None
        self.ranges: list[str | None] = []
        self.statements: dict[str, str] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running_hub(files: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(files)
    hub_client._silent.pop(hub.address, None)  # of a test before, which had this port silent
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        if not path:  # whether anybody is there
            self._send(200, b"")
            return
        api = re.fullmatch(r"api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/(revision|tree)/[^/]+/?(.*)|)", path)
        if api is not None:
            repository, route, folder = api.groups()
            files = self.server.files.get(repository)
            if files is None:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif route != "tree":
                siblings = [{"rfilename": file} for file in files]
                info = {
                    "id": repository.removeprefix("datasets/"),
                    "sha": COMMIT,
                    "siblings": siblings,
                    "cardData": {"license": "openrail++"},
                }
                self._send(200, json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode())
            elif "recursive=true" in self.path.lower():
                self._send(200, json.dumps([self._entry(*item) for item in files.items()]).encode())
            else:
                self._send(200, json.dumps(self._children(files, folder)).encode())
            return
        repository, _, file = path.partition("/resolve/")
        content = self.server.files.get(repository, {}).get(file.partition("/")[2])
        if content is None and repository.startswith("datasets/") and repository not in self.server.files:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        self._send_file(content, body)

    def _children(self, files: dict[str, bytes], folder: str) -> list[dict]:
        inner = [name.removeprefix(f"{folder}/") for name in files if not folder or name.startswith(f"{folder}/")]
        first = dict.fromkeys(str(PurePosixPath(folder, name.split("/")[0])) for name in inner)
        return [
            self._entry(name, files[name]) if name in files else {"type": "directory", "path": name, "oid": COMMIT}
            for name in first
        ]

    def _entry(self, name: str, content: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        if not name.endswith(".json"):
            stated = self.server.statements.get(name, hashlib.sha256(content).hexdigest())
            entry["lfs"] = {"size": len(content), "oid": stated, "pointerSize": 130}
        return entry

    def _send_file(self, content: bytes, body: bool) -> None:
        asked = self.headers.get("Range")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if not body:
            self._send(200, b"", {**headers, "Content-Length": str(len(content))})
            return
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut, self.server.break_after = self.server.break_after, None
        self._send(206 if asked else 200, content[start:], headers, cut)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
