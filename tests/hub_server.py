"""A Hub on the loopback: as much of its API as a push and reading back need, over real sockets, kept in memory.

    with Hub() as hub:
        hub.fail("PUT", "/lfs/", 500)          # from now on
        hub.fail("POST", "/commit/", 409, times=1)
        hub.fail("PUT", "/lfs/", BREAK)        # closes the connection half way
        ...                                    # HF_ENDPOINT=hub.url
        hub.repos["me/model"].commits[-1].files

It checks what it is sent: who writes, that commits are whole, that LFS objects
are what their SHA-256 says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "a-token-that-looks-like-nothing-1234567"
READ_TOKEN = "another-token-that-can-only-read-7654321"
USER = "me"
LFS = (".safetensors", ".bin", ".png", ".pt", ".pth", ".model")
BREAK = -1
"""A status: the connection is closed without an answer."""


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    """All files of the repository, weights as their content."""
    pointers: dict[str, str]
    """Path → SHA-256 of what is in LFS."""


@dataclass
class Repo:
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    @property
    def commits(self) -> list[Commit]:
        return self.branches["main"]

    def head(self, branch: str) -> Commit:
        history = self.branches[branch]
        return history[-1] if history else Commit("0" * 40, "", {}, {})


@dataclass
class Failure:
    method: str
    part: str
    status: int
    times: float
    message: str


class Problem(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server; ``part_size`` is from which size on LFS files are uploaded in parts of that size."""

    def __init__(self, part_size: int = 2**30) -> None:
        self.part_size = part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        """``METHOD path`` of each request, in order."""
        self.tokens: set[str | None] = set()
        """All tokens that requests came with."""
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        # A short poll: shutting down waits for it.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, part: str, status: int, *, times: float = float("inf"), message: str = "") -> None:
        """Answer requests whose path contains ``part`` with an error."""
        self.failures.append(Failure(method, part, status, times, message))

    def count(self, start: str) -> int:
        return sum(request.startswith(start) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""

    # A request and its answer

    def answer(self) -> None:
        hub, address = self.hub, urlsplit(self.path)
        self.query = parse_qs(address.query)
        path = unquote(address.path)
        kind, _, token = (self.headers.get("Authorization") or "").partition(" ")
        if kind == "Basic":
            token = base64.b64decode(token).decode().partition(":")[2]
        self.token = token or None
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.token)
            failure = next((f for f in hub.failures if f.method == self.command and f.part in path and f.times), None)
            if failure is not None:
                failure.times -= 1
        if failure is not None and failure.status == BREAK:
            self.close_connection = True
            return
        body = self.read_body()
        try:
            if failure is not None:
                raise Problem(failure.status, failure.message)
            with hub.lock:
                status, content, headers = self.route(path, body)
        except Problem as problem:
            status, content = problem.status, json.dumps({"error": str(problem)} if str(problem) else {}).encode()
            headers = {"X-Error-Code": problem.code} if problem.code else {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        words = path.strip("/").split("/")
        match [self.command, *words]:
            case ["GET", "api", "whoami-v2"]:
                self.needs_token()
                return as_json({"type": "user", "name": USER, "orgs": []})
            case ["POST", "api", "repos", "create"]:
                return self.create(json.loads(body))
            case ["POST", "api", "validate-yaml"]:
                return validate(json.loads(body)["content"])
            case ["POST", "api", "models", owner, name, "preupload", branch]:
                return self.preupload(self.repo(f"{owner}/{name}", write=True), branch, json.loads(body))
            case ["POST", "api", "models", owner, name, "commit", branch]:
                return self.commit(f"{owner}/{name}", branch, body)
            case ["GET", "api", "models", owner, name] | ["GET", "api", "models", owner, name, "revision", _]:
                return self.info(f"{owner}/{name}", words[5] if len(words) > 5 else "main")
            case ["GET", "api", "models", owner, name, "tree", branch, *folder]:
                return self.tree(f"{owner}/{name}", branch, "/".join(folder))
            case ["POST", owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self.repo(f"{owner}/{name.removesuffix('.git')}", write=True)
                return self.lfs_batch(json.loads(body), f"{self.hub.url}/{owner}/{name}/info/lfs/objects/verify")
            case ["POST", owner, name, "info", "lfs", "objects", "verify"]:
                return self.lfs_verify(json.loads(body))
            case ["PUT" | "POST", "lfs", oid, *part]:
                return self.lfs_upload(oid, part, body)
            case ["HEAD" | "GET", owner, name, "resolve", branch, *file]:
                return self.resolve(f"{owner}/{name}", branch, "/".join(file))
        raise Problem(404, f"{self.command} {path} is nothing that this server knows")

    # Who may do what

    def needs_token(self) -> None:
        if self.token is None or self.token not in (TOKEN, READ_TOKEN):
            raise Problem(401, "Invalid username or password.")

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        known = self.hub.repos.get(repo_id)
        if write:
            self.needs_token()
        if known is None or (known.private and self.token not in (TOKEN, READ_TOKEN)):
            raise Problem(404 if self.token else 401, "Repository not found", "RepoNotFound")
        if write and (self.token != TOKEN or not repo_id.startswith(f"{USER}/")):
            raise Problem(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return known

    def head(self, repo_id: str, branch: str) -> Commit:
        repo = self.repo(repo_id)
        for commit in (commit for history in repo.branches.values() for commit in history):
            if commit.oid == branch:
                return commit
        if branch not in repo.branches:
            raise Problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return repo.head(branch)

    # Repositories

    def create(self, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        self.needs_token()
        owner = asked.get("organization") or USER
        if owner != USER or self.token != TOKEN:
            raise Problem(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            return as_json({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[repo_id] = Repo(private)
        return as_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def info(self, repo_id: str, branch: str) -> tuple[int, bytes, dict[str, str]]:
        head = self.head(repo_id, branch)
        siblings = [{"rfilename": name} for name in sorted(head.files)]
        private = self.repo(repo_id).private
        return as_json({"id": repo_id, "sha": head.oid, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, branch: str, folder: str) -> tuple[int, bytes, dict[str, str]]:
        head = self.head(repo_id, branch)
        under = f"{folder}/" if folder else ""
        files = {name: content for name, content in head.files.items() if name.startswith(under)}
        if folder and not files:
            raise Problem(404, f'{folder} does not exist on "{branch}"', "EntryNotFound")
        entries = []
        for name, content in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            if name in head.pointers:
                entry["lfs"] = {"oid": head.pointers[name], "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return as_json(entries)

    def resolve(self, repo_id: str, branch: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        head = self.head(repo_id, branch)
        headers = {"X-Repo-Commit": head.oid}
        if file not in head.files:
            raise Problem(404, "Entry not found", "EntryNotFound")
        content = head.files[file]
        if file in head.pointers:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{head.pointers[file]}"'}
        headers["ETag"] = f'"{head.pointers.get(file) or git_oid(content)}"'
        return 200, content, headers

    # Commits

    def preupload(self, repo: Repo, branch: str, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        if branch not in repo.branches:
            raise Problem(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head, said = repo.head(branch), []
        for file in asked["files"]:
            name = file["path"]
            known = head.pointers.get(name) or (git_oid(head.files[name]) if name in head.files else None)
            mode = "lfs" if name.endswith(LFS) else "regular"
            said.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return as_json({"files": said})

    def commit(self, repo_id: str, branch: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        repo = self.repo(repo_id, write=True)
        head = repo.head(branch)
        files, pointers, message = dict(head.files), dict(head.pointers), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            name = value.get("path", "")
            if line["key"] == "header":
                message = value["summary"]
                continue
            if line["key"] == "deletedFile" and name not in files:
                raise Problem(404, "A file with this name doesn't exist", "EntryNotFound")
            files.pop(name, None)
            pointers.pop(name, None)
            if line["key"] == "file":
                files[name] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    raise Problem(400, f"{name} was not uploaded")
                files[name], pointers[name] = self.hub.objects[value["oid"]], value["oid"]
        oid = hashlib.sha1(body + head.oid.encode()).hexdigest()
        repo.branches[branch].append(Commit(oid, message, files, pointers))
        return as_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    # LFS

    def lfs_batch(self, asked: dict[str, Any], verify: str) -> tuple[int, bytes, dict[str, str]]:
        objects = []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}?X-Signature=signed"}
                if size > self.hub.part_size:
                    parts = range(1, -(-size // self.hub.part_size) + 1)
                    upload["href"] = f"{self.hub.url}/lfs/{oid}/complete"
                    upload["header"] = {"chunk_size": str(self.hub.part_size)}
                    upload["header"] |= {str(n): f"{self.hub.url}/lfs/{oid}/{n}" for n in parts}
                each = {**each, "actions": {"upload": upload, "verify": {"href": verify}}}
            objects.append(each)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, part: list[str], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if part == ["complete"]:
            parts = self.hub.parts.pop(oid)
            if [each["etag"] for each in json.loads(body)["parts"]] != [etag(parts[n]) for n in sorted(parts)]:
                raise Problem(400, "parts are missing")
            body = b"".join(parts[n] for n in sorted(parts))
        elif part:
            self.hub.parts.setdefault(oid, {})[int(part[0])] = body
            return 200, b"", {"ETag": etag(body)}
        if hashlib.sha256(body).hexdigest() != oid:
            raise Problem(400, "the content is another one than its SHA-256 says")
        self.hub.objects[oid] = body
        return as_json({})

    def lfs_verify(self, asked: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Problem(404, "not uploaded")
        return as_json({})


def as_json(content: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json"}


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def validate(readme: str) -> tuple[int, bytes, dict[str, str]]:
    """A card whose head is no YAML mapping is refused; what else the Hub checks, such as licenses, is not."""
    _, *parts = readme.split("---\n", 2) if readme.startswith("---\n") else [readme]
    try:
        good = not parts or isinstance(yaml.safe_load(parts[0]) or {}, dict)
    except yaml.YAMLError:
        good = False
    errors = [] if good else [{"message": "the head is no YAML"}]
    return as_json({"errors": errors, "warnings": []}, 200 if good else 400)
