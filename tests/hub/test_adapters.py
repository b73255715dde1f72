"""Adapters to the Hub and back, each side in a process of its own, over HTTP."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from hub.loopback import OTHER_TOKEN, OWNER_TOKEN, LoopbackHub
from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.utils import close_session
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from peft_moe_merge import MoELoraMergeConfig, WEMoEConfig
from peft_moe_merge.selection import GaussianSelector

PUSH = """
import sys
from itertools import combinations
from pathlib import Path
from peft import AutoPeftModel, PeftModel
from transformers import CLIPModel
import peft_moe_merge

clip = CLIPModel.from_pretrained("owner/clip")
model = PeftModel.from_pretrained(clip, sys.argv[1], adapter_name="default")
model.push_to_hub("owner/adapter", tags=["peft", "moe", "continual-learning"])
model.push_to_hub("owner/secret", private=True)
model.push_to_hub("owner/adapter", revision="older")
model.set_task("a")
model.push_to_hub("owner/adapter", commit_message="The task is a")
birds = PeftModel.from_pretrained(CLIPModel.from_pretrained("owner/clip"), sys.argv[1], adapter_name="birds")
birds.push_to_hub("owner/birds")
selecting = PeftModel.from_pretrained(CLIPModel.from_pretrained("owner/clip"), sys.argv[2])
selecting.push_to_hub("owner/selecting")
"""

LOAD = """
import contextlib, io, json, sys, traceback
import torch
from peft import AutoPeftModel, AutoPeftModelForFeatureExtraction, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel
import peft_moe_merge

folder, own, others = sys.argv[1:]
batch = load_file(folder + "/batch.safetensors")
clip = CLIPModel.from_pretrained("owner/clip")
wide = CLIPModel.from_pretrained("owner/wide")
told, logits = {}, {}

def case(name, load):
    try:
        model = load().eval()
        with torch.no_grad():
            logits[name] = model(**batch).logits_per_image.contiguous()
        told[name] = f"{type(model).__name__}, {model.peft_config['default'].current_task}"
        model.unload()
    except Exception as error:
        told[name] = "".join(traceback.format_exception(error))

def load(name, base=clip, **kwargs):
    return lambda: PeftModel.from_pretrained(base, name, **kwargs)

case("main", load("owner/adapter"))
case("revision", load("owner/adapter", revision="older"))
case("subfolder", load("owner/birds", subfolder="birds"))
case("auto", lambda: AutoPeftModel.from_pretrained("owner/adapter"))
case("no token", load("owner/secret"))
case("other's token", load("owner/secret", token=others))
case("own token", load("owner/secret", token=own))
features = AutoPeftModelForFeatureExtraction.from_pretrained("owner/adapter")
logits["auto features"] = features.get_image_features(batch["pixel_values"]).pooler_output.detach()
case("no such revision", load("owner/adapter", revision="none"))
case("gated", load("owner/gated", token=others))
case("renamed", load("owner/old"))
case("selecting", load("owner/selecting"))
case("wide", load("owner/adapter", base=wide))
case("pickled", load("owner/pickled"))
case("tampered", load("owner/tampered"))
case("integers", load("owner/integers"))
case("newer", load("owner/newer"))
case("unknown field", load("owner/unknown"))
case("cut off", load("owner/cut"))
case("cut off no more", load("owner/cut"))
case("afterwards", load("owner/adapter"))
try:
    PeftModel.from_pretrained(clip, "owner/adapter").push_to_hub("owner/mine")
except Exception as error:
    told["push without token"] = "".join(traceback.format_exception(error))
try:
    PeftModel.from_pretrained(clip, "owner/adapter").push_to_hub("owner/mine", token=others)
except Exception as error:
    told["push for somebody else"] = "".join(traceback.format_exception(error))
save_file(logits, folder + "/logits.safetensors")
print(json.dumps(told))
"""

BIN = b"a pickle that must not be read"


def run(hub: LoopbackHub, home: Path, code: str, *arguments: str, token: str | None = None) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=hub.environment(home, token), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def trained() -> torch.nn.Module:
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=6, r=4, tasks=["a", "b"]))
    randomize(model)
    model.set_task("b")
    return model.eval()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoopbackHub, dict[str, str], dict[str, torch.Tensor]]:
    """Push from one process, then try all kinds of loading in another that has neither caches nor a token.

    Returns:
        The Hub, what became of each case (the class and task of the model, or the traceback), and logits.
    """
    folder = tmp_path_factory.mktemp("world")
    hub = LoopbackHub(folder / "hub")
    hub.start()
    model = trained()
    model.save_pretrained(folder / "adapter")
    save_file(tiny_batch(), folder / "batch.safetensors")
    with torch.no_grad():
        expected = {"b": model(**tiny_batch()).logits_per_image}
        model.set_task("a")
        expected["a"] = model(**tiny_batch()).logits_per_image
    model.set_task("b")
    selector = GaussianSelector(reject_rate=0)
    for seed, task in enumerate(("a", "b")):
        selector.fit(task, model.frozen_features(selector.source, tiny_batch(60, seed=1 + seed)["pixel_values"]))
    model.attach_selector(selector)
    model.save_pretrained(folder / "selecting")
    with torch.no_grad():
        expected["selected"] = model(**tiny_batch()).logits_per_image

    tiny_clip().save_pretrained(folder / "clip")
    hub.add_repo("model", "owner/clip", contents(folder / "clip"))
    wider = tiny_clip().config.to_dict()
    wider["vision_config"]["hidden_size"] = 64
    CLIPModel(CLIPConfig.from_dict(wider)).save_pretrained(folder / "wide")
    hub.add_repo("model", "owner/wide", contents(folder / "wide"))

    adapter = contents(folder / "adapter")
    weights = adapter["adapter_model.safetensors"]
    config = json.loads(adapter["adapter_config.json"])
    del config["checksums"]
    unsealed = adapter | {"adapter_config.json": json.dumps(config)}
    hub.add_repo("model", "owner/gated", adapter, gated=True)
    hub.add_repo("model", "owner/old", adapter)
    hub.rename("model", "owner/old", "owner/new")
    hub.add_repo(
        "model", "owner/pickled", {"adapter_config.json": adapter["adapter_config.json"], "adapter_model.bin": BIN}
    )
    tampered = (2**62).to_bytes(8, "little") + weights[8:]
    hub.add_repo("model", "owner/tampered", adapter | {"adapter_model.safetensors": tampered})
    integers = weights.replace(b'"F32"', b'"I32"')
    hub.add_repo("model", "owner/integers", unsealed | {"adapter_model.safetensors": integers})
    newer = json.dumps(config | {"format_version": 99})
    hub.add_repo("model", "owner/newer", adapter | {"adapter_config.json": newer})
    unknown = json.dumps(config | {"hash_routing": True})
    hub.add_repo("model", "owner/unknown", adapter | {"adapter_config.json": unknown})
    hub.add_repo("model", "owner/cut", adapter)
    hub.cut("GET .*repo=owner%2Fcut", at=500, times=6)  # the client tries that often

    run(hub, folder / "pusher", PUSH, str(folder / "adapter"), str(folder / "selecting"), token=OWNER_TOKEN)
    told = run(hub, folder / "loader", LOAD, str(folder), OWNER_TOKEN, OTHER_TOKEN)
    yield hub, json.loads(told.splitlines()[-1]), load_file(folder / "logits.safetensors") | expected
    hub.stop()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("case", "task"),
    [
        ("main", "a"),
        ("revision", "b"),
        ("subfolder", "b"),
        ("auto", "a"),
        ("own token", "b"),
        ("renamed", "b"),
        ("selecting", "selected"),
        ("cut off no more", "b"),
        ("afterwards", "a"),
    ],
)
def test_equal_logits_in_a_fresh_process(world, case, task):
    _, told, logits = world
    assert told[case] == f"PeftModel, {'b' if task == 'selected' else task}"
    torch.testing.assert_close(logits[case], logits[task], rtol=1e-6, atol=1e-6)
    for one, other in combinations(("a", "b", "selected"), 2):
        assert not torch.allclose(logits[one], logits[other], atol=1e-3)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", r"RepositoryNotFoundError: 401(.|\n)*make sure you are authenticated"),
        ("other's token", r"RepositoryNotFoundError: 404(.|\n)*make sure you are authenticated"),
        ("gated", r"GatedRepoError(.|\n)*You must ask for access"),
        ("no such revision", r"RevisionNotFoundError(.|\n)*Invalid rev id: none"),
        ("wide", r"ValueError: These weights do not fit.*is \(4, 32\), expected \(4, 64\).*another base model"),
        ("pickled", r"ValueError: The adapter 'owner/pickled' has its weights in 'adapter_model.bin', a pickle file"),
        (
            "tampered",
            r"ValueError: '.*adapter_model.safetensors' is damaged, or does not belong to '.*adapter_config.json'",
        ),
        ("integers", r"ValueError: These weights do not fit.*of a wrong type.*torch.int32, expected torch.float32"),
        ("newer", r"ValueError: This adapter has format_version=99; .*reads up to 2: `pip install -U"),
        ("unknown field", r"TypeError: MoELoraMergeConfig has no field 'hash_routing'.*newer release"),
        ("cut off", r"peer closed connection without sending complete message body"),
        ("push without token", r"401 Unauthorized(.|\n)*Invalid username or password"),
        ("push for somebody else", r"403 Forbidden: You don't have the rights to write under the namespace 'owner'"),
    ],
)
def test_what_cannot_be_loaded_or_pushed_says_why(world, case, message):
    _, told, logits = world
    assert case not in logits
    assert re.search(message, told[case]), told[case]


def test_features_by_the_auto_class(world):
    _, _, logits = world
    model = trained()
    model.set_task("a")
    with torch.no_grad():
        expected = model.get_image_features(tiny_batch()["pixel_values"]).pooler_output
    torch.testing.assert_close(logits["auto features"], expected, rtol=1e-6, atol=1e-6)


def test_no_pickle_is_ever_asked_for(world):
    hub, _, _ = world
    asked = [str(request) for request in hub.asked(r"\.(bin|pt|pkl)")]
    assert not asked


def test_what_was_pushed(world):
    hub, _, _ = world
    repo = hub.repos["model", "owner/adapter"]
    files = repo.commits[repo.branches["main"]]
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    card = ModelCard((hub.folder / files["README.md"].sha256).read_text())
    assert card.data.tags == ["peft", "moe", "continual-learning"], "a later push without tags keeps the card"
    assert hub.repos["model", "owner/secret"].private
    assert ("model", "owner/mine") not in hub.repos


def test_a_pickled_adapter_in_a_folder_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(BIN)
    PeftConfig.from_pretrained(tmp_path)  # safetensors come first
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="a pickle file"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)
    model = trained()
    with pytest.raises(ValueError, match="a pickle file"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]


def test_a_pickled_adapter_in_the_cache_is_refused(world, tmp_path, monkeypatch):
    hub, _, _ = world
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    for file in ("adapter_config.json", "adapter_model.bin"):
        hf_hub_download("owner/pickled", file, cache_dir=tmp_path, endpoint=hub.url)
    asked = len(hub.requests)
    with pytest.raises(ValueError, match="a pickle file"):
        MoELoraMergeConfig.from_pretrained("owner/pickled", cache_dir=tmp_path, local_files_only=True)
    assert len(hub.requests) == asked
    close_session()


def test_neither_is_a_pickled_wemoe(tmp_path):
    WEMoEConfig(tasks=["a"]).save_pretrained(tmp_path)
    assert WEMoEConfig.from_pretrained(tmp_path).tasks == ["a"]
    (tmp_path / "adapter_model.bin").write_bytes(BIN)
    with pytest.raises(ValueError, match="a pickle file"):
        WEMoEConfig.from_pretrained(tmp_path)
