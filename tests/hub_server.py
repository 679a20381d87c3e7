"""A stand-in for the Hugging Face Hub: dataset repositories out of memory, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class HubServer(ThreadingHTTPServer):
    """`repos` has {id: {file name: bytes}}; `gated` the ids that nobody gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/datasets/"):
            self._api(path.split("/")[2:])
        else:
            self._file(path.split("/"))

    def _api(self, parts: list[str]) -> None:
        hub_id, rest = "/".join(parts[:2]), parts[2:]
        if hub_id in self.server.gated:
            self._refuse(403, "GatedRepo")
        elif hub_id not in self.server.repos:
            self._refuse(401, "RepoNotFound")
        elif len(rest) > 1 and rest[1] not in {"main", COMMIT}:
            self._refuse(404, "RevisionNotFound")
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.repos[hub_id].items()
            ]
            self._answer(200, json.dumps(entries).encode(), "application/json")
        else:
            files = self.server.repos[hub_id]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
            about = {"id": hub_id, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False, "tags": [],
                     "disabled": False, "downloads": 0, "likes": 0}  # fmt: skip
            self._answer(200, json.dumps(about).encode(), "application/json")

    def _file(self, parts: list[str]) -> None:
        # datasets/<owner>/<name>/resolve/<revision>/<file>
        content = self.server.repos["/".join(parts[1:3])].get("/".join(parts[5:]))
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self._answer(200, content, "application/octet-stream", {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", "application/json", {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
