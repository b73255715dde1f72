"""A Hub on 127.0.0.1: the part of the REST interface that `huggingface_hub` and `datasets` call for models and data sets.

    hub = LoopbackHub(folder)
    hub.start()
    hub.add_repo("dataset", "owner/birds", {"data/train-0.parquet": path})       # or push it through the client
    subprocess.run([...], env=hub.environment(home, token=OWNER_TOKEN))          # a process of its own, clean caches
    assert hub.asked("GET .*/resolve/")                                         # what the client wanted
    hub.stop()

It really stores and serves what it is given: git object ids as etags of small files, sha256 of large ones (LFS), which
come, as on the real Hub, from another origin: a second port, which refuses requests that carry a token.

Left out: xet (clients get `HF_HUB_DISABLE_XET=1`), pull requests, spaces, repositories without an owner, and the data
set viewer. Repositories live as long as the object, file contents in its folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

OWNER_TOKEN, OTHER_TOKEN = "hf_owner", "hf_other"
USERS = {OWNER_TOKEN: "owner", OTHER_TOKEN: "other"}
LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".zip", ".tar", ".gz", ".tgz", ".jpg", ".png")
"""Endings of the files that go to LFS, whatever their size; others do from 1 MB on."""
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class File:
    """One version of a file. Its content is in the hub's folder under its sha256."""

    sha256: str
    size: int
    oid: str
    large: bool
    commit: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def told(self, path: str) -> dict[str, Any]:
        """Describe it as `tree` and `paths-info` do."""
        info = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.large:
            info["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return info | {"lastCommit": {"id": self.commit, "title": "commit", "date": DATE}}


@dataclass
class Repo:
    """A model or data set: its commits (every one a full listing), and the branches and tags that name them."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def commit(self, branch: str, files: Callable[[str, dict[str, File]], dict[str, File]]) -> str:
        """Add a commit to a branch: `files` makes the new listing from the commit's id and the old listing."""
        sha = uuid.uuid4().hex + uuid.uuid4().hex[:8]
        before = self.commits[self.branches[branch]] if branch in self.branches else {}
        self.commits[sha] = files(sha, dict(before))
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        """Return the commit that a branch, a tag or a commit id names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


@dataclass
class Fault:
    """Something that goes wrong on purpose with the requests that match; `times` None means always."""

    pattern: str
    times: int | None
    status: int | None = None
    cut_at: int | None = None


class HubError(Exception):
    """An answer that the client turns into the exception of this code."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Request:
    """One request as the server saw it; `str()` of it is `GET /api/models/owner/adapter`."""

    method: str
    path: str
    user_agent: str
    token: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class LoopbackHub:
    """See the top of this file.

    Args:
        folder: where contents are kept.
        page_size: entries in one page of a tree; small ones make clients follow the pages.

    Attributes:
        requests: all requests so far, in order, those to the storage included.
    """

    def __init__(self, folder: Path, page_size: int = 1000):
        self.folder = folder
        self.page_size = page_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()

    # ------------------------------------------------------------------------------------------------- for the tests

    def start(self) -> None:
        """Listen on two free ports, for the interface and for large files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._servers = [_serve(_Interface, self), _serve(_Storage, self)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def stop(self) -> None:
        """Close both ports."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment for a subprocess that shall use this Hub, with all its caches below `home`."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        return environment | ({"HF_TOKEN": token} if token else {})

    def add_repo(
        self,
        kind: str,
        name: str,
        files: Mapping[str, bytes | str | Path] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        branch: str = "main",
    ) -> str:
        """Make a repository, if it is not there, and commit files to a branch of it.

        Args:
            kind: "model" or "dataset".
            name: `owner/name`.
            files: path in the repository -> content, or a local file with it.
            private: only its owner sees it.
            gated: everybody sees it, but only its owner, and users in `repos[kind, name].allowed`, get its files.
            branch: made from `main` if it is new.

        Returns:
            The commit's id.
        """
        with self.lock:
            repo = self.repos.setdefault((kind, name), Repo(kind, name, private, gated))
            if not repo.commits:
                repo.commit("main", lambda sha, old: {})
            repo.branches.setdefault(branch, repo.branches["main"])
            return repo.commit(
                branch,
                lambda sha, old: (
                    old | {path: self.keep(path, content, sha) for path, content in (files or {}).items()}
                ),
            )

    def rename(self, kind: str, old: str, new: str) -> None:
        """Give a repository another name; the old one redirects."""
        repo = self.repos.pop((kind, old))
        repo.name = new
        self.repos[kind, new] = repo
        self.moved[kind, old] = new

    def fail(self, pattern: str, status: int = 500, times: int | None = None) -> None:
        """Answer requests whose `METHOD path` contains the regular expression `pattern` with an error."""
        self.faults.append(Fault(pattern, times, status=status))

    def cut(self, pattern: str, at: int, times: int | None = None) -> None:
        """Close the connection after byte `at` of a file, in answers to requests that match `pattern`."""
        self.faults.append(Fault(pattern, times, cut_at=at))

    def asked(self, pattern: str) -> list[Request]:
        """List the requests whose `METHOD path` contains the regular expression `pattern`."""
        return [request for request in self.requests if re.search(pattern, str(request))]

    # ------------------------------------------------------------------------------------------------------ contents

    def keep(self, path: str, content: bytes | str | Path, commit: str) -> File:
        """Store a content and describe it."""
        if not isinstance(content, bytes):
            content = content.read_bytes() if isinstance(content, Path) else content.encode()
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / sha256).write_bytes(content)
        large = is_large(path, len(content))
        return File(
            sha256, len(content), pointer_oid(sha256, len(content)) if large else git_oid(content), large, commit
        )

    def kept(self, path: str, sha256: str, commit: str) -> File:
        """Describe a large file that has been uploaded before."""
        stored = self.folder / sha256
        if not stored.is_file():
            raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
        size = stored.stat().st_size
        return File(sha256, size, pointer_oid(sha256, size), True, commit)

    def fault(self, request: Request) -> Fault | None:
        """Return the fault that strikes this request."""
        for fault in self.faults:
            if fault.times != 0 and re.search(fault.pattern, str(request)):
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None


def is_large(path: str, size: int) -> bool:
    """Say whether a file goes to LFS."""
    return size > 0 and (path.endswith(LARGE) or size >= 1_000_000)


def git_oid(content: bytes) -> str:
    """Return the id that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_oid(sha256: str, size: int) -> str:
    """Return git's id of the text that stands for a large file."""
    return git_oid(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode())


def _serve(handler: type[_Handler], hub: LoopbackHub) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    """What both ports share: bodies, the log, faults, files with ranges, errors."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        self.body = self._read_body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
        request = Request(self.command, self.path, self.headers.get("User-Agent", ""), token)
        with self.hub.lock:
            self.hub.requests.append(request)
            self.struck = self.hub.fault(request)
        self.token = token
        try:
            if self.struck and self.struck.status:
                raise HubError(self.struck.status, None, "It is broken.")
            self.route()
        except HubError as error:
            self.send(error.status, {"error": str(error)}, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def route(self) -> None:
        raise NotImplementedError

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        """Answer; anything but bytes is sent as JSON."""
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json; charset=utf-8"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, sha256: str, headers: Mapping[str, str]) -> None:
        """Answer with a stored content, or the range of it that was asked for, cut off where a fault says so."""
        stored = self.hub.folder / sha256
        size = stored.stat().st_size
        first, last, status = 0, size - 1, 200
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            status = 206
            if wanted[1]:
                first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            else:
                first = max(size - int(wanted[2]), 0)
            if first > last:
                raise HubError(416, None, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
        self.send_response(status)
        told = {"Content-Length": str(last - first + 1), "Accept-Ranges": "bytes", **headers}
        if status == 206:
            told["Content-Range"] = f"bytes {first}-{last}/{size}"
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = last + 1
        if self.struck and self.struck.cut_at is not None and self.struck.cut_at < end:
            end, self.close_connection = self.struck.cut_at, True
        with stored.open("rb") as file:
            file.seek(first)
            self.wfile.write(file.read(max(end - first, 0)))

    def log_message(self, *_: Any) -> None:
        """Requests are in `hub.requests`, not on the terminal."""


class _Storage(_Handler):
    """Where large files go, and come from: `/<sha256>`, without a token."""

    def route(self) -> None:
        if self.token:
            raise HubError(400, None, "A token was sent to the storage.")
        sha256 = urlsplit(self.path).path.strip("/")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != sha256:
                raise HubError(400, None, "The content does not have this sha256.")
            (self.hub.folder / sha256).write_bytes(self.body)
            return self.send(200, headers={"ETag": f'"{sha256}"'})
        if not (self.hub.folder / sha256).is_file():
            raise HubError(404, None, "No such object")
        return self.send_file(sha256, {"ETag": f'"{sha256}"'})


class _Interface(_Handler):
    """The REST interface. Paths are taken apart before they are unquoted: a revision may contain slashes."""

    def route(self) -> None:
        path, self.query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.user = self._user()
        for method, pattern, action in _ROUTES:
            if method in (self.command, "GET" if self.command == "HEAD" else None) and (
                found := re.fullmatch(pattern, path)
            ):
                parts = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                kind, name = parts.pop("kind", None), parts.pop("name", None)
                if name is not None:
                    kind = "dataset" if kind in ("datasets", "datasets/") else "model"
                    if (new := self.hub.moved.get((kind, name))) is not None:
                        return self.send(307, headers={"Location": self.path.replace(f"/{name}", f"/{new}", 1)})
                    parts["repo"] = self._repo(kind, name)
                with self.hub.lock:
                    return action(self, **parts)
        raise HubError(404, None, f"The loopback Hub does not know {self.command} {path}")

    # -------------------------------------------------------------------------------------------------- permissions

    def _user(self) -> str | None:
        if self.token is None:
            return None
        if self.token not in USERS:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return USERS[self.token]

    def _repo(self, kind: str, name: str) -> Repo:
        """Find a repository that this user may see. Others must not learn that it is there."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.user != repo.owner):
            # the code too: over plain HTTP the client does not take a 401 alone for a repository that is not there
            raise HubError(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _may_write(self, owner: str) -> None:
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        if self.user != owner:
            raise HubError(403, None, f"You don't have the rights to write under the namespace {owner!r}")

    def _may_download(self, repo: Repo) -> None:
        if repo.gated and self.user != repo.owner and self.user not in repo.allowed:
            status, doing = (401, "be authenticated") if self.user is None else (403, "ask for access")
            raise HubError(status, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted. You must {doing}.")

    # ------------------------------------------------------------------------------------------------- repositories

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        self.send(
            200, {"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": {"type": "access_token"}}
        )

    def validate_yaml(self) -> None:
        errors = []
        try:
            _front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None:
            raise HubError(401, None, "Invalid username or password.")
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.user
        self._may_write(owner)
        name = f"{owner}/{wanted['name']}"
        told = {"url": f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name}
        if (kind, name) in self.hub.repos:
            return self.send(409, told | {"error": "You already created this repo"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.hub.add_repo(kind, name, private=private)
        return self.send(200, told)

    def delete(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        repo = self._repo(wanted.get("type") or "model", name)
        self._may_write(repo.owner)
        del self.hub.repos[repo.kind, repo.name]
        self.send(200, {})

    def info(self, repo: Repo, revision: str = "main") -> None:
        sha = repo.sha(revision)
        files = repo.commits[sha]
        card = files.get("README.md")
        card_data = _front_matter((self.hub.folder / card.sha256).read_text()) if card else {}
        info = {
            "id": repo.name,
            "author": repo.owner,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "createdAt": DATE,
            "lastModified": DATE,
            "downloads": 0,
            "likes": 0,
            "tags": card_data.get("tags", []),
            "cardData": card_data,
            "siblings": [self._sibling(path, file) for path, file in files.items()],
        }
        for key in ("library_name", "pipeline_tag"):
            if key in card_data:
                info[key] = card_data[key]
        if expand := self.query.get("expand"):
            info = {key: value for key, value in info.items() if key in ("id", *expand)}
        self.send(200, info)

    def _sibling(self, path: str, file: File) -> dict[str, Any]:
        if "blobs" not in self.query:
            return {"rfilename": path}
        lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
        return {"rfilename": path, "size": file.size, "blobId": file.oid} | ({"lfs": lfs} if file.large else {})

    def auth_check(self, repo: Repo) -> None:
        self._may_download(repo)
        self.send(200, {})

    def refs(self, repo: Repo) -> None:
        def told(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        self.send(200, {"branches": told(repo.branches, "heads"), "converts": [], "tags": told(repo.tags, "tags")})

    def create_branch(self, repo: Repo, branch: str) -> None:
        self._may_write(repo.owner)
        if branch in repo.branches:
            raise HubError(409, None, f"Reference already exists: {branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[branch] = repo.sha(start)
        self.send(201)

    def create_tag(self, repo: Repo, revision: str) -> None:
        self._may_write(repo.owner)
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise HubError(409, None, f"Tag already exists: {tag}")
        repo.tags[tag] = repo.sha(revision)
        self.send(201)

    # -------------------------------------------------------------------------------------------------------- files

    def tree(self, repo: Repo, revision: str, path: str = "") -> None:
        files = repo.commits[repo.sha(revision)]
        below = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        if path and not below:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}")
        entries = {name: file.told(name) for name, file in below.items()}
        for name in below:
            for folder in _parents(name):
                if len(folder) > len(path):
                    entries[folder] = _folder(folder)
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = {name: told for name, told in entries.items() if "/" not in name[len(path) :].lstrip("/")}
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(entries):
            further = {key: values[0] for key, values in self.query.items()} | {"cursor": stop}
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{urlencode(further)}>; rel="next"'
        self.send(200, [told for _, told in sorted(entries.items())[start:stop]], headers)

    def paths_info(self, repo: Repo, revision: str) -> None:
        files = repo.commits[repo.sha(revision)]
        if "json" in self.headers.get("Content-Type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        folders = {folder for name in files for folder in _parents(name)}
        told = [
            files[path].told(path) if path in files else _folder(path) for path in paths if path in folders | {*files}
        ]
        self.send(200, told)

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        self._may_download(repo)
        sha = repo.sha(revision)
        file = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if file is None:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision!r}", **headers)
        headers["ETag"] = f'"{file.etag}"'
        if not file.large:
            return self.send_file(file.sha256, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        location = f"{self.hub.storage_url}/{file.sha256}?{urlencode({'repo': repo.name, 'name': path})}"
        return self.send(302, headers=headers | {"Location": location})

    def preupload(self, repo: Repo, revision: str) -> None:
        self._may_write(repo.owner)
        there = repo.commits[repo.sha(revision)]
        self.send(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": there[file["path"]].etag if file["path"] in there else None,
                    }
                    for file in json.loads(self.body)["files"]
                ]
            },
        )

    def lfs_batch(self, repo: Repo) -> None:
        self._may_write(repo.owner)
        told = []
        for wanted in json.loads(self.body)["objects"]:
            there = (self.hub.folder / wanted["oid"]).is_file()
            actions = {"actions": {"upload": {"href": f"{self.hub.storage_url}/{wanted['oid']}"}}}
            told.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if there else actions))
        self.send(200, {"transfer": "basic", "objects": told})

    def commit(self, repo: Repo, revision: str) -> None:
        self._may_write(repo.owner)
        if revision not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and not repo.branches[revision].startswith(parent):
            raise HubError(412, None, "A commit has happened since.")

        def apply(sha: str, files: dict[str, File]) -> dict[str, File]:
            for line in lines[1:]:
                value = line["value"]
                path = value["path"]
                if line["key"] == "file":
                    files[path] = self.hub.keep(path, base64.b64decode(value["content"]), sha)
                elif line["key"] == "lfsFile":
                    files[path] = self.hub.kept(path, value["oid"], sha)
                elif line["key"] == "deletedFile":
                    files.pop(path, None)
                elif line["key"] == "deletedFolder":
                    files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
            return files

        sha = repo.commit(revision, apply)
        prefix = "datasets/" if repo.kind == "dataset" else ""
        self.send(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{prefix}{repo.name}/commit/{sha}"}
        )


def _parents(path: str) -> list[str]:
    return ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 1)]


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}


def _front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    return (yaml.safe_load(found[1]) if found else None) or {}


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Interface.whoami),
    ("POST", "/api/validate-yaml", _Interface.validate_yaml),
    ("POST", "/api/repos/create", _Interface.create),
    ("DELETE", "/api/repos/delete", _Interface.delete),
    ("GET", _API, _Interface.info),
    ("GET", _API + "/revision/(?P<revision>[^/]+)", _Interface.info),
    ("GET", _API + "/auth-check", _Interface.auth_check),
    ("GET", _API + "/refs", _Interface.refs),
    ("POST", _API + "/branch/(?P<branch>[^/]+)", _Interface.create_branch),
    ("POST", _API + "/tag/(?P<revision>[^/]+)", _Interface.create_tag),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", _Interface.tree),
    ("POST", _API + "/paths-info/(?P<revision>[^/]+)", _Interface.paths_info),
    ("POST", _API + "/preupload/(?P<revision>[^/]+)", _Interface.preupload),
    ("POST", _API + "/commit/(?P<revision>[^/]+)", _Interface.commit),
    ("POST", _PAGE + r"\.git/info/lfs/objects/batch", _Interface.lfs_batch),
    ("GET", _PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Interface.resolve),
]
