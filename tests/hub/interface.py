"""The two ports of the Hub on 127.0.0.1: the REST interface, and the storage of large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml
from hub.repos import (
    DATE,
    USERS,
    File,
    HubError,
    Repo,
    Request,
    git_oid,
    is_large,
)

if TYPE_CHECKING:
    from hub.loopback import LoopbackHub


def serve(handler: type[Handler], hub: LoopbackHub) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
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


class Storage(Handler):
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


class Interface(Handler):
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
    ("GET", "/api/whoami-v2", Interface.whoami),
    ("POST", "/api/validate-yaml", Interface.validate_yaml),
    ("POST", "/api/repos/create", Interface.create),
    ("DELETE", "/api/repos/delete", Interface.delete),
    ("GET", _API, Interface.info),
    ("GET", _API + "/revision/(?P<revision>[^/]+)", Interface.info),
    ("GET", _API + "/auth-check", Interface.auth_check),
    ("GET", _API + "/refs", Interface.refs),
    ("POST", _API + "/branch/(?P<branch>[^/]+)", Interface.create_branch),
    ("POST", _API + "/tag/(?P<revision>[^/]+)", Interface.create_tag),
    ("GET", _API + "/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Interface.tree),
    ("POST", _API + "/paths-info/(?P<revision>[^/]+)", Interface.paths_info),
    ("POST", _API + "/preupload/(?P<revision>[^/]+)", Interface.preupload),
    ("POST", _API + "/commit/(?P<revision>[^/]+)", Interface.commit),
    ("POST", _PAGE + r"\.git/info/lfs/objects/batch", Interface.lfs_batch),
    ("GET", _PAGE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Interface.resolve),
]
