"""The Hub that the other tests use, itself tested by the real clients."""

import hashlib
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from datasets import Dataset
from hub.loopback import OTHER_TOKEN, OWNER_TOKEN, LoopbackHub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def api(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """A client in this process; those of libraries that read the environment at import need a subprocess."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    close_session()
    yield HfApi(endpoint=hub.url, token=OWNER_TOKEN)
    close_session()


def run(hub: LoopbackHub, home: Path, code: str, token: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(home, token), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_what_is_pushed_comes_back(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("owner/adapter")
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [peft, moe]\nlibrary_name: peft\n---\n# Adapter\n")
    (folder / "sub" / "adapter_model.safetensors").write_bytes(CONTENT)
    pushed = api.upload_folder(repo_id="owner/adapter", folder_path=folder)

    info = api.model_info("owner/adapter", files_metadata=True)
    assert info.sha == pushed.oid
    assert (info.tags, info.library_name) == (["peft", "moe"], "peft")
    weights = {sibling.rfilename: sibling for sibling in info.siblings}["sub/adapter_model.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert {entry.path for entry in api.list_repo_tree("owner/adapter")} == {"README.md", "sub"}
    assert api.list_repo_files("owner/adapter") == ["README.md", "sub/adapter_model.safetensors"]
    assert [entry.path for entry in api.get_paths_info("owner/adapter", ["sub", "README.md", "none"])] == [
        "sub",
        "README.md",
    ]
    got = Path(api.snapshot_download("owner/adapter", cache_dir=tmp_path / "cache"))
    assert (got / "README.md").read_text() == (folder / "README.md").read_text()
    assert (got / "sub" / "adapter_model.safetensors").read_bytes() == CONTENT

    # pushed again, nothing is sent and no commit is made
    puts = len(hub.asked("^PUT"))
    assert api.upload_folder(repo_id="owner/adapter", folder_path=folder).oid == pushed.oid
    assert len(hub.asked("^PUT")) == puts == 1


def test_branches_and_tags_name_versions(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    first = hub.add_repo("model", "owner/adapter", {"a.txt": "1"})
    api.create_tag("owner/adapter", tag="v1")
    api.create_branch("owner/adapter", branch="feature/x")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="owner/adapter", revision="feature/x")
    read = {
        revision: Path(
            api.hf_hub_download("owner/adapter", "a.txt", revision=revision, cache_dir=tmp_path)
        ).read_text()
        for revision in ("main", "v1", first, "feature/x")
    }
    assert read == {"main": "1", "v1": "1", first: "1", "feature/x": "2"}
    refs = api.list_repo_refs("owner/adapter")
    assert ([tag.name for tag in refs.tags], len(refs.branches)) == (["v1"], 2)
    api.delete_file("a.txt", "owner/adapter")
    assert api.list_repo_files("owner/adapter") == []
    with pytest.raises(RevisionNotFoundError):
        api.model_info("owner/adapter", revision="v2")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("owner/adapter", "b.txt", cache_dir=tmp_path)


def test_who_may_do_what(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("model", "owner/secret", {"a.txt": "1"}, private=True)
    hub.add_repo("model", "owner/gated", {"a.txt": "1"}, gated=True)
    other, nobody = HfApi(endpoint=hub.url, token=OTHER_TOKEN), HfApi(endpoint=hub.url, token=False)
    assert (api.whoami()["name"], other.whoami()["name"]) == ("owner", "other")
    assert Path(api.hf_hub_download("owner/secret", "a.txt", cache_dir=tmp_path)).read_text() == "1"
    for stranger in (other, nobody):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info("owner/secret")
        assert stranger.model_info("owner/gated").gated == "manual"
        with pytest.raises(GatedRepoError):
            stranger.hf_hub_download("owner/gated", "a.txt", cache_dir=tmp_path / "other")
        with pytest.raises(HfHubHTTPError, match="401|403"):
            stranger.create_repo("owner/new")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info("owner/gated")
    hub.repos["model", "owner/gated"].allowed.add("other")
    assert Path(other.hf_hub_download("owner/gated", "a.txt", cache_dir=tmp_path / "other")).read_text() == "1"


def test_a_renamed_repository_redirects(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("dataset", "owner/old", {"a.txt": "1", "b.bin": CONTENT})
    hub.rename("dataset", "owner/old", "owner/new")
    assert api.dataset_info("owner/old").id == "owner/new"
    for file, content in (("a.txt", b"1"), ("b.bin", CONTENT)):
        path = api.hf_hub_download("owner/old", file, repo_type="dataset", cache_dir=tmp_path)
        assert Path(path).read_bytes() == content


def test_a_tree_of_many_pages(hub: LoopbackHub, api: HfApi) -> None:
    hub.page_size = 4
    files = {f"data/{n:02}.txt": str(n) for n in range(10)}
    hub.add_repo("dataset", "owner/many", files)
    listed = [entry.path for entry in api.list_repo_tree("owner/many", repo_type="dataset", recursive=True)]
    assert listed == ["data", *files]
    assert len(hub.asked("/tree/")) == 3
    assert len(list(api.list_repo_tree("owner/many", "data", repo_type="dataset"))) == 10


def test_ranges_and_the_second_origin(hub: LoopbackHub) -> None:
    hub.add_repo("model", "owner/adapter", {"a.bin": CONTENT, "a.txt": "0123456789"})
    small = httpx2.get(f"{hub.url}/owner/adapter/resolve/main/a.txt", headers={"Range": "bytes=2-4"})
    assert (small.status_code, small.text, small.headers["Content-Range"]) == (206, "234", "bytes 2-4/10")
    beyond = httpx2.get(f"{hub.url}/owner/adapter/resolve/main/a.txt", headers={"Range": "bytes=10-"})
    assert beyond.status_code == 416
    large = httpx2.get(f"{hub.url}/owner/adapter/resolve/main/a.bin")
    assert large.status_code == 302 and large.headers["Location"].startswith(hub.storage_url)
    ranged = httpx2.get(large.headers["Location"], headers={"Range": "bytes=256-"})
    assert ranged.content == CONTENT[256:]
    assert httpx2.get(large.headers["Location"], headers={"Authorization": "Bearer hf_owner"}).status_code == 400


def test_a_broken_connection_is_resumed_and_an_error_reported(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("model", "owner/adapter", {"a.bin": CONTENT})
    hub.cut("name=a.bin", at=1000, times=1)
    path = api.hf_hub_download("owner/adapter", "a.bin", cache_dir=tmp_path)
    assert Path(path).read_bytes() == CONTENT
    assert len(hub.asked("^GET .*name=a.bin")) == 2
    hub.fail("/api/models", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("owner/adapter")


def test_datasets_reads_parquet_from_it_in_a_process_of_its_own(hub: LoopbackHub, tmp_path: Path) -> None:
    Dataset.from_dict({"label": [0, 1, 2], "text": ["a", "b", "c"]}).to_parquet(tmp_path / "t.parquet")
    hub.add_repo("dataset", "owner/letters", {"data/train-00000.parquet": tmp_path / "t.parquet"}, private=True)
    code = (
        "from datasets import load_dataset\n"
        "whole = load_dataset('owner/letters', split='train')\n"
        "stream = load_dataset('owner/letters', split='train', streaming=True)\n"
        "print(list(whole['text']), [row['label'] for row in stream])"
    )
    assert run(hub, tmp_path / "home", code, OWNER_TOKEN) == "['a', 'b', 'c'] [0, 1, 2]"
    assert (tmp_path / "home" / "datasets").is_dir()
