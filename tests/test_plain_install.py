"""The package without what only the benchmark needs: processes in which the rest is as if it were not installed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig
from peft_moe_merge.mtil.data.mini import mini_clip_path

tomllib = pytest.importorskip("tomllib")  # of Python 3.11
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# modules by the names of their distributions, where these differ
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}

ABSENT = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def modules(requirements: list[str]) -> set[str]:
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


EXTRA = modules(PROJECT["optional-dependencies"]["mtil"])


def run(code: str, absent: set[str], folder: Path) -> subprocess.CompletedProcess:
    code = f"absent = {absent!r}\n{ABSENT}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=folder)


def test_what_is_in_the_extra():
    assert {"datasets", "evaluate", "sklearn", "matplotlib"} <= EXTRA
    assert not EXTRA & modules(PROJECT["dependencies"])


def test_tuners_merging_callbacks_selection_and_inference(tmp_path):
    done = run(
        """
import copy
import importlib
import pkgutil

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Trainer, TrainingArguments

import peft_moe_merge
from peft_moe_merge import *

for module in pkgutil.walk_packages(peft_moe_merge.__path__, "peft_moe_merge."):
    if not module.name.startswith(("peft_moe_merge.mtil", "peft_moe_merge.report", "peft_moe_merge.theory")):
        importlib.import_module(module.name)

tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {**tower, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
vision = {**tower, "image_size": 16, "patch_size": 8}
clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
config = MoELoraMergeConfig(num_experts=6, top_k=2, r=2, tasks=["a", "b"])
model = get_peft_model(copy.deepcopy(clip), config)
model.set_task("a")
rows = [{"pixel_values": torch.rand(3, 16, 16), "input_ids": torch.tensor([0, 5, 1])} for _ in range(4)]
arguments = TrainingArguments("out", max_steps=2, use_cpu=True, report_to=[], per_device_train_batch_size=2)


class Contrastive(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs, return_loss=True)
        return (output.loss, output) if return_outputs else output.loss


Contrastive(
    model, arguments, train_dataset=rows, callbacks=[ExpertMergeCallback(merge_every=1, freeze_top_k=1)]
).train()
model.save_pretrained("adapter")
loaded = PeftModel.from_pretrained(copy.deepcopy(clip), "adapter").eval()
loaded(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}, task_ids=torch.tensor([0, 1, -1, 0]))

finetuned = {name: copy.deepcopy(clip) for name in "xy"}
with torch.no_grad():
    for tuned in finetuned.values():
        for parameter in tuned.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
merge_finetuned(copy.deepcopy(clip), finetuned)
merge_static(copy.deepcopy(clip), finetuned, "ties")
loaded_modules = {name.partition(".")[0] for name in sys.modules}
assert not loaded_modules & absent, loaded_modules & absent
print("done")
""",
        EXTRA,
        tmp_path,
    )
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr


@pytest.mark.parametrize("absent", [EXTRA, {"evaluate"}])
def test_the_benchmark_names_what_it_needs(absent, tmp_path):
    done = run(
        """
import importlib

for module in ("mtil", "mtil.data.mini", "mtil.report.card"):
    try:
        importlib.import_module(f"peft_moe_merge.{module}")
    except ImportError as error:
        print(error)
""",
        absent,
        tmp_path,
    )
    needed = ", ".join(sorted(absent - {"tensorboard"}))
    assert done.stdout.count(f"needs {needed}, ") == 3, done.stdout + done.stderr
    assert done.stdout.count('pip install "peft-moe-merge[mtil]"') == 3


def test_the_classifier_without_torchvision(tmp_path):
    """It reads images, too, and answers as transformers' slower preprocessing lets it."""
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=["a"])
    model = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config)
    processor = CLIPProcessor.from_pretrained(mini_clip_path())
    classifier = ContinualClassifier(model, processor, {"a": ["cat", "dog"]})
    classifier.save_pretrained(tmp_path / "adapter")
    Image.fromarray((np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)).save(tmp_path / "scan.png")
    done = run(
        """
from peft_moe_merge import ContinualClassifier

print(ContinualClassifier.from_pretrained("adapter")("scan.png", task="a").probabilities["cat"])
""",
        EXTRA,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = classifier(tmp_path / "scan.png", task="a").probabilities["cat"]
    assert float(done.stdout) == pytest.approx(expected, abs=0.02)
