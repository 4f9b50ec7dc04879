"""A Hub on loopback that keeps repositories in memory and fails as it is told: the protocol's upload half.

Each route takes a script, a list of faults; each request of it uses one up, and when none is left the route works.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS = (".safetensors", ".mp4")
ROUTES = {
    "info": r"GET /api/(?:models|spaces)/(?P<name>[\w.-]+/[\w.-]+)(?:/revision/(?P<revision>[^/?]+))?",
    "create": r"POST /api/repos/create",
    "branch": r"POST /api/(?:models|spaces)/(?P<name>[\w.-]+/[\w.-]+)/branch/(?P<revision>[^/?]+)",
    "card": r"POST /api/validate-yaml",
    "preupload": r"POST /api/(?:models|spaces)/(?P<name>[\w.-]+/[\w.-]+)/preupload/(?P<revision>[^/?]+)",
    "batch": r"POST /(?:spaces/)?(?P<name>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(?P<oid>\w+)",
    "verify": r"POST /lfs/verify",
    "xet": r"GET /api/(?:models|spaces)/(?P<name>[\w.-]+/[\w.-]+)/xet-write-token/(?P<revision>[^/?]+)",
    "commit": r"POST /api/(?:models|spaces)/(?P<name>[\w.-]+/[\w.-]+)/commit/(?P<revision>[^/?]+)",
}

Fault = Callable[["Handler"], None]


@dataclass
class Repository:
    """One repository: branches of files, and what was done to it."""

    kind: str
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    """Without the first one, which the Hub makes itself."""


@dataclass
class FakeHub:
    """What the server knows and what it was asked."""

    url: str = ""
    xet_url: str = "http://127.0.0.1:9"
    """Xet's storage; nobody is there."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    script: dict[str, list[Fault]] = field(default_factory=lambda: defaultdict(list))
    requests: Counter = field(default_factory=Counter)
    """Route -> how often it was asked."""
    bodies: list[bytes] = field(default_factory=list)
    """All that was sent, headers apart."""
    authorizations: set[str] = field(default_factory=set)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds, without the Hub's own file."""
        return {key: each for key, each in self.repositories[name].branches[branch].items() if key != ".gitattributes"}

    def add(self, name: str, kind: str = "model", private: bool = True) -> Repository:
        made = Repository(kind=kind, private=private)
        made.branches["main"], made.heads["main"] = {".gitattributes": b"*.safetensors filter=lfs\n"}, oid(name)
        self.repositories[name] = made
        return made


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A server while the block runs."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub
    answered = False

    def log_message(self, *arguments: Any) -> None:
        pass

    def respond(self) -> None:
        path = self.path.partition("?")[0]
        found = ((name, re.fullmatch(route, f"{self.command} {path}")) for name, route in ROUTES.items())
        self.route, match = next(((name, match) for name, match in found if match), ("unknown", None))
        with self.hub.lock:
            self.hub.requests[self.route] += 1
            if value := self.headers.get("authorization"):
                self.hub.authorizations.add(value)
            fault = self.hub.script[self.route].pop(0) if self.hub.script[self.route] else None
        self.match = match
        self.answered = False
        with contextlib.suppress(ConnectionError, Dropped):
            if fault:
                fault(self)
            if not self.answered:
                self.work()

    do_GET = do_POST = do_PUT = respond

    def work(self) -> None:
        """Do what the route is for."""
        body = self.body()
        with self.hub.lock:
            self.hub.bodies.append(body)
            getattr(self, f"on_{self.route}", self.on_unknown)(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        content = b"" if value is None else json.dumps(value).encode()
        self.answered = True
        self.send_response(status)
        for name, each in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, each)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def repository(self) -> Repository | None:
        """The repository that is meant; where there is none, or not that branch, that is the answer."""
        assert self.match is not None
        found = self.hub.repositories.get(self.match["name"])
        revision = self.match.groupdict().get("revision") or "main"
        if found is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in found.branches:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            found = None
        self.branch = revision
        return found

    def on_unknown(self, body: bytes) -> None:
        self.answer(404, {"error": "no such route"})

    def on_info(self, body: bytes) -> None:
        assert self.match is not None
        if found := self.repository():
            siblings = [{"rfilename": name} for name in found.branches[self.branch]]
            about = {"id": self.match["name"], "sha": found.heads[self.branch], "private": found.private}
            self.answer(200, {**about, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def on_create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        assert wanted.get("type") != "space" or wanted["sdk"] == "gradio"
        self.hub.add(name, wanted.get("type") or "model", wanted.get("visibility") == "private")
        self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def on_branch(self, body: bytes) -> None:
        assert self.match is not None
        found = self.hub.repositories[self.match["name"]]
        found.branches[self.match["revision"]] = dict(found.branches["main"])
        found.heads[self.match["revision"]] = found.heads["main"]
        self.answer(200, {})

    def on_card(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def on_preupload(self, body: bytes) -> None:
        if found := self.repository():
            files = []
            for each in json.loads(body)["files"]:
                name, there = each["path"], found.branches[self.branch].get(each["path"])
                mode = "lfs" if name.endswith(LFS) else "regular"
                files.append({"path": name, "uploadMode": mode, "shouldIgnore": False})
                if there is not None:
                    blob = b"blob %d\0" % len(there) + there
                    files[-1]["oid"] = sha256(there) if mode == "lfs" else hashlib.sha1(blob).hexdigest()
            self.answer(200, {"files": files})

    def on_xet(self, body: bytes) -> None:
        """Leave to send to a storage, `hub.xet_url`."""
        about = {"casUrl": self.hub.xet_url, "exp": int(time.time()) + 3600, "accessToken": "of-xet"}
        self.answer(200, about)

    def on_batch(self, body: bytes) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            if each["oid"] not in self.hub.objects:
                actions = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}?signature=secret"}}
                actions["verify"] = {"href": f"{self.hub.url}/lfs/verify"}
                each = {**each, "actions": actions}
            objects.append(each)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def on_put(self, body: bytes) -> None:
        assert self.match is not None
        if sha256(body) != self.match["oid"]:
            self.answer(400, {"error": "the content is not what was announced"})
            return
        self.hub.objects[self.match["oid"]] = body
        self.answer(200)

    def on_verify(self, body: bytes) -> None:
        self.answer(200 if json.loads(body)["oid"] in self.hub.objects else 404, {})

    def on_commit(self, body: bytes) -> None:
        if found := self.repository():
            lines = [json.loads(line) for line in body.splitlines()]
            header = lines[0]["value"]
            if header.get("parentCommit", found.heads[self.branch]) != found.heads[self.branch]:
                self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            files = found.branches[self.branch]
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.objects[value["oid"]]
                else:
                    assert line["key"] == "deletedFile", line
                    del files[value["path"]]
            found.commits.append({"summary": header["summary"], "branch": self.branch})
            found.heads[self.branch] = oid(f"{self.match['name'] if self.match else ''}{len(found.commits)}")
            url = f"{self.hub.url}/{self.match and self.match['name']}/commit/{found.heads[self.branch]}"
            self.answer(200, {"commitUrl": url, "commitOid": found.heads[self.branch]})


@contextmanager
def silent_server() -> Iterator[str]:
    """An address that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Dropped(Exception):
    """The connection is gone."""


def oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def status(code: int, message: str = "no", **headers: str) -> Fault:
    """An answer without doing anything."""

    def fault(handler: Handler) -> None:
        handler.body()
        handler.answer(code, {"error": message}, {name.replace("_", "-"): each for name, each in headers.items()})

    return fault


def cut(handler: Handler) -> None:
    """The connection is reset before anything is done."""
    drop(handler)


def cut_midway(handler: Handler) -> None:
    """The connection is reset when part of what is sent has come."""
    handler.rfile.read(1000)
    drop(handler)


def cut_afterwards(handler: Handler) -> None:
    """What is asked is done, and the answer is lost."""
    real, handler.wfile = handler.wfile, Nowhere()  # type: ignore[assignment]
    handler.work()
    handler.wfile = real
    drop(handler)


def truncated(handler: Handler) -> None:
    """What is asked is done, and of the answer half comes, with a length that fits the half."""
    keep, handler.wfile = handler.wfile, Nowhere()  # type: ignore[assignment]
    handler.work()
    handler.wfile = keep
    half = b'{"commitUrl": "http://'
    handler.wfile.write(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(half) + half
    )


def stall(handler: Handler) -> None:
    """Nothing comes, and nothing is done."""
    handler.body()
    wait_until_left(handler, 20.0)


def drip(handler: Handler) -> None:
    """An answer that comes byte by byte, for ever."""
    handler.body()
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n")
    with contextlib.suppress(OSError):
        for _ in range(400):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    drop(handler)


def batch_error(handler: Handler) -> None:
    """The storage refuses each file."""
    objects = json.loads(handler.body())["objects"]
    refused = [{**each, "error": {"code": 500, "message": "internal error"}} for each in objects]
    handler.answer(200, {"transfer": "basic", "objects": refused})


def wait_until_left(handler: Handler, seconds: float) -> None:
    handler.connection.settimeout(seconds)
    with contextlib.suppress(OSError):
        handler.connection.recv(1)
    drop(handler)


def drop(handler: Handler) -> None:
    """Close so that the other side sees a reset."""
    handler.answered = handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.connection.shutdown(socket.SHUT_RDWR)
    raise Dropped


class Nowhere:
    """Takes all that is written."""

    def write(self, content: bytes) -> int:
        return len(content)

    def flush(self) -> None:
        pass

    closed = False

    def close(self) -> None:
        pass
