"""A hub on this machine that takes uploads: the routes of an account, a new repository and a commit, over real HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class UploadHub(ThreadingHTTPServer):
    """`files`: repository -> name -> content, of what was committed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextlib.contextmanager
def running_upload_hub() -> Iterator[UploadHub]:
    hub = UploadHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadHub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self._known():
            self._send(200, {"name": "someone", "type": "user", "auth": {"type": "access_token"}})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._known():
            return
        path = self.path.split("?")[0].strip("/")
        if path == "api/repos/create":
            name = f"someone/{json.loads(body)['name']}"
            self.server.files.setdefault(name, {})
            self._send(200, {"url": f"{self.server.address}/{name}", "name": name})
        elif path == "api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            entries = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._send(200, {"files": entries})
        elif "/commit/" in path:
            self._commit("/".join(path.split("/")[2:4]), body)
        else:
            self._send(404, {"error": path})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self._send(200, {"commitUrl": f"{self.server.address}/{repo}/commit/1", "commitOid": "1" * 40, "success": True})

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._send(401, {"error": "Invalid credentials"})
        return False

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
