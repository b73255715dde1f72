"""What a Hub on 127.0.0.1 keeps: repositories, their files and commits, requests and faults."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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


def is_large(path: str, size: int) -> bool:
    """Say whether a file goes to LFS."""
    return size > 0 and (path.endswith(LARGE) or size >= 1_000_000)


def git_oid(content: bytes) -> str:
    """Return the id that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_oid(sha256: str, size: int) -> str:
    """Return git's id of the text that stands for a large file."""
    return git_oid(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode())
