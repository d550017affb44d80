"""A Hugging Face hub on the loopback interface: the few addresses that a download asks, and what can go wrong there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_good"
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/revision/([^?]+))?(?:\?.*)?$")
_AUTH = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/auth-check$")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repo:
    """A repository: files by commit, and where its branch ``main`` is."""

    main: str
    commits: dict[str, dict[str, bytes]]
    gated: bool = False


@dataclass
class Hub:
    """What the hub holds and does.

    Attributes:
        repos: by name.
        raw: files at plain addresses, by path.
        breaks: the connection ends after so many bytes of a file, by its path, and the file is refused from then on.
        sent: the file, first byte and number of bytes of each answer with content.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    url: str = ""

    def bytes_sent(self, name: str) -> int:
        """Bytes of one file that went out, over all answers."""
        return sum(count for path, _, count in self.sent if path == name)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub while the context lasts; its address is in ``url``."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:  # noqa: N802 (http.server's name)
        self._answer(body=False)

    def do_GET(self) -> None:  # noqa: N802
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if found := _AUTH.match(self.path):
            self._open_repo(found[2]) and self._json({})
        elif found := _INFO.match(self.path):
            self._info(found[2], found[3] or "main")
        elif found := _FILE.match(self.path):
            self._file(found[2], found[3], found[4], body)
        elif self.path in self.hub.raw:
            self._content(self.path, self.hub.raw[self.path], {}, body)
        else:
            self._refuse(404)

    def _refuse(self, status: int, code: str = "") -> bool:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def _open_repo(self, name: str) -> bool:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        return True

    def _info(self, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo.main if repo and revision == "main" else revision
        if repo is None or commit not in repo.commits:
            self._refuse(404, "RevisionNotFound" if repo else "RepoNotFound")
            return
        files = [{"rfilename": path, "size": len(data)} for path, data in repo.commits[commit].items()]
        self._json({"id": name, "sha": commit, "siblings": files})

    def _json(self, value: object) -> bool:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return True

    def _file(self, name: str, revision: str, path: str, body: bool) -> None:
        if not self._open_repo(name):
            return
        repo = self.hub.repos[name]
        commit = repo.main if revision == "main" else revision
        data = repo.commits.get(commit, {}).get(path)
        if data is None:
            self._refuse(404, "EntryNotFound" if commit in repo.commits else "RevisionNotFound")
            return
        etag = hashlib.sha256(data).hexdigest()
        self._content(path, data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, body)

    def _content(self, path: str, data: bytes, headers: dict[str, str], body: bool) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        end = self.hub.breaks.get(path, len(data))
        if body and start >= end and data:
            self._refuse(503)
            return
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        self.wfile.write(data[start:end])
        self.hub.sent.append((path, start, end - start))
        if end < len(data):
            self.close_connection = True
