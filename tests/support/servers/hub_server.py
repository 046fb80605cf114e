"""A Hugging Face hub on the loopback: the part of its HTTP API that fetching a model takes, over folders of files.

As the hub does it: weights are redirected to a download host, other files come at once; a repository that is not
there is a 401 to strangers and a 404 to those with a token; a gated one can be listed but not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<call>revision|tree)/(?P<revision>[^/]+)")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(?P<call>resolve|cdn)/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Repository:
    """A folder, served as one commit with branches that point at it."""

    folder: Path
    commit: str
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    parameters: dict[str, int] | None = None  # elements by dtype, as the hub counts them

    def files(self) -> dict[str, Path]:
        return {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }


@dataclass
class Seen:
    """One request that was answered."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Faults:
    """What goes wrong.

    Args:
        status: answer everything with it.
        mute: accept connections and say nothing.
        html: answer everything with a page, as a network's login portal does.
        cut: file name -> from which byte on the connection is dropped, once.
        stall: file name -> after which byte nothing more comes.
        drip: file name -> seconds before each MiB of it.
        file_status: file name -> answer to requests for it.
    """

    status: int | None = None
    mute: bool = False
    html: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    stall: dict[str, int] = field(default_factory=dict)
    drip: dict[str, float] = field(default_factory=dict)
    file_status: dict[str, int] = field(default_factory=dict)


class HubServer:
    """A context manager; `url` is what HF_ENDPOINT shall be."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: set[str] = set()  # those that open gated repositories
        self.faults = Faults()
        self.seen: list[Seen] = []
        self.stalled = threading.Event()  # set when a client waits in vain
        self.closing = threading.Event()
        hub = self

        class Bound(Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, in the order of the alphabet."""
        bodies = [seen for seen in self.seen if seen.method == "GET" and FILE.fullmatch(seen.path)]
        return sorted(seen.path.rpartition("/")[2] for seen in bodies)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def do_GET(self) -> None:
        hub, path = self.server_hub, urlsplit(self.path).path
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        if path != "/api/agent-harnesses":  # what the client library asks once a day, whatever it is used for
            hub.seen.append(Seen(self.command, path, self.headers["Range"], token))
        if hub.faults.mute:
            hub.closing.wait(60)
            self.close_connection = True
        elif hub.faults.status is not None:
            self._refuse(hub.faults.status)
        elif hub.faults.html:
            self._answer(200, b"<html>Please sign in</html>", {"Content-Type": "text/html"})
        elif (asked := API.fullmatch(path) or FILE.fullmatch(path)) is None:
            self._refuse(404)
        else:
            self._serve(asked, token)

    do_HEAD = do_GET

    def _serve(self, asked: re.Match[str], token: str | None) -> None:
        repository = self.server_hub.repositories.get(asked["repo"])
        revision = unquote(asked["revision"])
        if repository is None:
            self._refuse(*((404, "RepoNotFound") if token else (401, None)))
        elif revision not in (repository.commit, *repository.branches):
            self._refuse(404, "RevisionNotFound")
        elif asked["call"] == "revision":
            self._json({"id": asked["repo"], "sha": repository.commit, "tags": [], **_sizes(repository)})
        elif asked["call"] == "tree":
            self._json(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for name, path in repository.files().items()
                ]
            )
        elif repository.gated and token not in self.server_hub.tokens:
            self._refuse(403 if token else 401, "GatedRepo")
        elif (path := repository.files().get(unquote(asked["file"]))) is None:
            self._refuse(404, "EntryNotFound")
        elif (status := self.server_hub.faults.file_status.get(path.name)) is not None:
            self._refuse(status)
        else:
            self._file(path, repository.commit, redirect=path.suffix == ".safetensors" and asked["call"] == "resolve")

    def _file(self, path: Path, commit: str, redirect: bool) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        if redirect:
            moved = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(path.stat().st_size)}
            location = {"Location": self.server_hub.url + self.path.replace("/resolve/", "/cdn/")}
            self._answer(302, b"", {**headers, **moved, **location})
            return
        content, start = path.read_bytes(), 0
        if (wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) is not None:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        faults = self.server_hub.faults
        stop, drip = None, faults.drip.get(path.name, 0)
        if self.command == "GET":
            stop = faults.stall.get(path.name, faults.cut.pop(path.name, None))
        self._answer(
            206 if start else 200, content[start:], headers, None if stop is None else max(stop - start, 0), drip
        )
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True
            if path.name in faults.stall:
                self.server_hub.stalled.set()
                self.server_hub.closing.wait(60)

    def _refuse(self, status: int, code: str | None = None) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], part: int | None = None, drip: float = 0
    ) -> None:
        """Send an answer; of its body only the first `part` bytes if that is given."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not drip:
            self.wfile.write(body[:part])
        elif self.command == "GET":
            try:
                for start in range(0, len(body), 2**20):
                    self.server_hub.closing.wait(drip)
                    self.wfile.write(body[start : start + 2**20])
            except OSError:
                self.close_connection = True  # the client left

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `seen` tells the tests what was asked."""


def _sizes(repository: Repository) -> dict[str, Any]:
    """What the hub adds to a model's page if asked for `blobs`."""
    files = [{"rfilename": name, "size": path.stat().st_size} for name, path in repository.files().items()]
    counted = repository.parameters
    return {
        "siblings": files,
        **({"safetensors": {"parameters": counted, "total": sum(counted.values())}} if counted else {}),
    }


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
