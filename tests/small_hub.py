"""As much of the hub of Hugging Face as an upload and a download of a small repository ask for, on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

COMMIT = "c" * 40


class SmallHub:
    """Its repositories, by name, with their files."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.refuses = 0
        """A status with which every request is refused; 0 refuses none."""
        self.asked: list[str] = []
        """Method and path of every request."""


class _Handler(BaseHTTPRequestHandler):
    hub: SmallHub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _files(self, name: str) -> dict[str, bytes] | None:
        files = self.hub.repositories.get(name)
        if files is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return files

    def _refused(self) -> bool:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.refuses:
            self._answer({"error": "no"}, self.hub.refuses)
        return bool(self.hub.refuses)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
            return
        if self.path.startswith("/api/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/]+", self.path.partition("?")[0])
        files = self._files(match[1] if match else "")
        if match is None or files is None:
            return
        if match[2] == "preupload":
            wanted = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            self._answer({"files": [{**each, "shouldIgnore": False} for each in wanted]})
            return
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self._answer({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_GET(self) -> None:
        if self._refused():
            return
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)/?(.*))?", path)
        files = self._files(match[1] if match else "")
        if match is None or files is None:
            return
        name, what, revision, file = match.groups()
        if revision not in (None, "main", COMMIT):
            self._answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        elif what == "tree":
            self._answer([self._entry(path, content) for path, content in files.items()])
        elif what == "resolve" and file in files:
            sum_ = hashlib.sha1(files[file]).hexdigest()
            self._answer(files[file], ETag=f'"{sum_}"', X_Repo_Commit=COMMIT, Accept_Ranges="none")
        elif what == "resolve":
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            self._answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    do_HEAD = do_GET

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@contextlib.contextmanager
def small_hub(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[SmallHub]:
    """A hub that `huggingface_hub` talks to inside, with an empty cache."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    hub = _Handler.hub = SmallHub(url)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no_token"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
