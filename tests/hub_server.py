"""A small Hub: the HTTP calls of huggingface_hub for pushing and loading models, kept in memory.

It keeps what it is sent and gives it back, and is strict where a client could go wrong: writing needs the token, an
LFS object must have the SHA-256 it was announced with and be there before a commit refers to it, a card's metadata
must be YAML, and what does not exist is answered with the error code by which huggingface_hub tells what is missing.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_test"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")


class HubError(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str = "", **body: str):
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """As git names it; an LFS file by its content."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        described = [len(self.commits), *sorted((path, file.oid) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(described).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, f"no revision {revision}", "RevisionNotFound")
        return sha


class Hub(ThreadingHTTPServer):
    """The server and all it keeps. `requests` lists the calls, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories: dict[str, Repository] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.verified: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision of a repository holds."""
        repository = self.repositories[repo_id]
        return {path: file.content for path, file in repository.commits[repository.sha(revision)].items()}

    def environment(self, home: str) -> dict[str, str]:
        """The variables that make huggingface_hub talk to this server, to be set before it is imported."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the end of the `with` block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{ID}", "model_info"),
    ("GET", rf"/api/models/{ID}/revision/(?P<revision>.+)", "model_info"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", rf"/api/models/{ID}/branch/(?P<branch>.+)", "create_branch"),
    ("POST", rf"/api/models/{ID}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/(?P<branch>.+)", "commit"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_upload"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "lfs_verify"),
    ("HEAD", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class HubHandler(BaseHTTPRequestHandler):
    """One request: find its route, answer with JSON or a file."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self._read_body()
        try:
            with self.server.lock:
                self.server.requests.append((self.command, path))
                self._answer(200, self._dispatch(path))
        except HubError as error:
            self._answer(error.status, error.body, {"X-Error-Code": error.code, "X-Error-Message": str(error)})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _dispatch(self, path: str) -> Any:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                # LFS uploads carry no token of their own: on the real Hub their address is signed.
                if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise HubError(401, "writing needs the token")
                return getattr(self, name)(**match.groupdict())
        raise HubError(404, f"this Hub has no {self.command} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        if isinstance(body, tuple):
            content, headers = body
        else:
            content = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen; `Hub.requests` keeps the calls."""

    def _json(self) -> Any:
        return json.loads(self.body)

    def _repository(self, repo_id: str) -> Repository:
        if repo_id not in self.server.repositories:
            raise HubError(404, f"no repository {repo_id}", "RepoNotFound")
        return self.server.repositories[repo_id]

    # --- pushing ---

    def create_repository(self) -> dict[str, str]:
        request = self._json()
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.server.endpoint}/{repo_id}"
        if repo_id in self.server.repositories:
            raise HubError(409, f"{repo_id} exists", url=url)
        repository = self.server.repositories[repo_id] = Repository(
            request.get("private") or request.get("visibility") == "private"
        )
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", is_lfs=False)})
        return {"url": url, "name": repo_id}

    def validate_yaml(self) -> dict[str, list[dict[str, str]]]:
        metadata = re.match(r"---\n(.*?)\n---\n", self._json()["content"], re.DOTALL)
        try:
            valid = isinstance(yaml.safe_load(metadata[1]) if metadata else {}, dict)
        except yaml.YAMLError:
            valid = False
        if not valid:
            raise HubError(400, "the card's metadata is no YAML mapping")
        return {"errors": [], "warnings": []}

    def create_branch(self, repo_id: str, branch: str) -> dict[str, str]:
        repository = self._repository(repo_id)
        repository.branches[branch] = repository.sha(self._json().get("startingPoint", "main"))
        return {}

    def preupload(self, repo_id: str, revision: str) -> dict[str, list[dict[str, Any]]]:
        repository = self._repository(repo_id)
        present = repository.commits[repository.sha(revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                    "oid": present[file["path"]].oid if file["path"] in present else None,
                }
                for file in self._json()["files"]
            ]
        }

    def lfs_batch(self, repo_id: str) -> dict[str, Any]:
        self._repository(repo_id)
        objects = []
        for item in self._json()["objects"]:
            href = f"{self.server.endpoint}/lfs/{item['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = item["oid"] in self.server.lfs_objects
            objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, oid: str) -> dict[str, str]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, f"the content's SHA-256 is not {oid}")
        self.server.lfs_objects[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> dict[str, str]:
        if len(self.server.lfs_objects.get(oid, b"")) != self._json()["size"]:
            raise HubError(404, f"{oid} was not uploaded whole")
        self.server.verified.add(oid)
        return {}

    def commit(self, repo_id: str, branch: str) -> dict[str, Any]:
        repository = self._repository(repo_id)
        files = dict(repository.commits[repository.sha(branch)])
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise HubError(400, "a commit begins with its message")
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        sha = repository.commit(branch, files)
        return {"commitOid": sha, "commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{sha}", "success": True}

    def _apply(self, files: dict[str, File], kind: str, value: dict[str, Any]) -> None:
        if kind == "deletedFile":
            del files[value["path"]]
        elif kind == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif kind == "lfsFile" and value["oid"] in self.server.verified:
            files[value["path"]] = File(self.server.lfs_objects[value["oid"]], is_lfs=True)
        else:
            raise HubError(400, f"cannot apply {kind} of {value.get('path')}: unknown, or its LFS object is missing")

    # --- loading ---

    def model_info(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        repository = self._repository(repo_id)
        sha = repository.sha(revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[sha])]
        return {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private, "siblings": siblings}

    def tree(self, repo_id: str, revision: str) -> list[dict[str, Any]]:
        repository = self._repository(repo_id)
        entries: list[dict[str, Any]] = []
        for path, file in sorted(repository.commits[repository.sha(revision)].items()):
            size = len(file.content)
            lfs = {"lfs": {"oid": file.oid, "size": size, "pointerSize": 130}} if file.is_lfs else {}
            entries.append({"type": "file", "path": path, "size": size, "oid": file.oid, **lfs})
        return entries

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        repository = self._repository(repo_id)
        sha = repository.sha(revision)
        if path not in repository.commits[sha]:
            raise HubError(404, f"{repo_id} has no {path} at {revision}", "EntryNotFound")
        file = repository.commits[sha][path]
        return file.content, {
            "X-Repo-Commit": sha,
            "ETag": f'"{file.oid}"',
            "Content-Type": "application/octet-stream",
        }
