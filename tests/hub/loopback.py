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

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

from hub.interface import Interface, Storage, serve
from hub.repos import (
    OTHER_TOKEN,
    OWNER_TOKEN,
    Fault,
    File,
    HubError,
    Repo,
    Request,
    git_oid,
    is_large,
    pointer_oid,
)

__all__ = ["OTHER_TOKEN", "OWNER_TOKEN", "LoopbackHub"]


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
        self._servers = [serve(Interface, self), serve(Storage, self)]
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
