"""A model card for the adapter of a run, written from `results.json` alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from peft_moe_merge.report.tables import markdown

from ..results import METRICS
from .tables import DIFFERENCE_CAPTION, difference_rows, matrix_rows, summary_caption, summary_rows

PUBLISHED = {
    "moe_lora_fused": (
        "Every task has experts of its own, which start from those of the tasks before, merged. The attached selector has a "
        "Gaussian per class on what plain CLIP sees; `fuse=True` lets it have its say in the class."
    ),
    "moe_lora_warm": "Every task has experts of its own, which start from those of the tasks before, merged.",
    "moe_lora_pool": "Every task has experts of its own.",
    "moe_lora_merge": (
        "The experts are shared by all tasks; those that are chosen most merge while a task trains "
        "([arXiv 2405.11530](https://arxiv.org/abs/2405.11530))."
    ),
}
"""The methods whose adapters are published, what we recommend first: those of the others are plain LoRAs, or all weights of a
CLIP."""

TAGS = ["peft", "moe", "continual-learning", "mixture-of-experts", "clip"]
SETTINGS = (
    "few_shot",
    "steps",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup_steps",
    "crop_scale",
    "label_smoothing",
    "mixed_precision",
    "experts_per_task",
    "pool_r",
    "pool_lr",
    "warm_lr",
    "num_experts",
    "top_k",
    "r",
    "merge_every",
    "merge_pair",
    "merge_strategy",
    "merge_routing",
    "freeze_top_k",
    "router_balance_loss",
    "router_locality_loss",
)
"""What a reader needs to weigh the numbers; paths and trackers of the run are left out."""


def published(methods: Iterable[str]) -> str | None:
    """Return whose adapter is to be published where several methods ran; None where none of them has one."""
    return next((method for method in PUBLISHED if method in methods), None)


def model_card(
    results: dict[str, Any], repo_id: str, method: str, seed: int, license: str = "apache-2.0"
) -> ModelCard:
    """Write the card of the adapter that a run ended with.

    Args:
        results: the content of `results.json`.
        repo_id: `user/name` on the Hub.
        method: one of `PUBLISHED`.
        seed: which of its runs.
        license: of the adapter, as the Hub abbreviates it.

    Raises:
        ValueError: there is no such run.
    """
    seeds = {run["seed"]: run for run in results["methods"].get(method, [])}
    if seed not in seeds:
        raise ValueError(
            f"There is no adapter of {method} with seed {seed} in these results, which have its seeds {list(seeds)} and "
            f"the methods {list(results['methods'])}."
        )
    run, settings, tasks = seeds[seed], results.get("settings") or {}, results["tasks"]
    base = base_model(settings)
    data = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        license=license,
        library_name="peft",
        base_model=base,
        tags=TAGS,
        pipeline_tag="zero-shot-image-classification",
        eval_results=eval_results(results, run),
    )
    shown = [["setting", "value"], *([name, str(settings[name])] for name in SETTINGS if name in settings)]
    versions = ", ".join(f"{package} {number}" for package, number in (results.get("versions") or {}).items())
    compared = f"\n{DIFFERENCE_CAPTION}\n\n{markdown(rows)}\n" if (rows := difference_rows(results)) else ""
    text = f"""# {repo_id.rpartition("/")[2]}

A mixture of LoRA experts with one router per task, which has learnt {len(tasks)} image classification tasks one after
another: {", ".join(tasks)}. The experts of old tasks are kept; an image of no known task takes the untouched CLIP.
{PUBLISHED[method]} A PEFT method of `peft_moe_merge`, there called `{method}`.

- Base model: {_base_in_words(settings, base)}
- Adapter: {_sizes(run)}
- Seed: {run["seed"]}

## How to load it

```python
{_loading(settings, base, repo_id, tasks[0], fused=method == "moe_lora_fused")}
```

## Accuracy

Top-1 in percent, on the test images of the task in the column, after training the task in the row. The task of an image was
known, and the label space is the task's own. A task that was not learnt yet was tested on CLIP without experts.

{markdown(matrix_rows(tasks, run))}

All methods of the same run, with the same data, order and budget. {summary_caption()}

{markdown(summary_rows(results))}
{compared}
## Training

Suite `{os.path.basename(results["suite"])}`, {len(tasks)} tasks in the order of the table above.

{markdown(shown)}

{versions}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}", ignore_metadata_errors=False)


def base_model(settings: dict[str, Any]) -> str | None:
    """Return the name on the Hub of the CLIP that the run started from; None if it did not come from there."""
    model = settings.get("model")
    return None if model in (None, "untrained") or os.path.isdir(model) else model


def eval_results(results: dict[str, Any], run: dict[str, Any]) -> list[EvalResult]:
    """List what `model-index` shows: the stream's metrics, and the accuracy on each task at the end."""
    kind = {
        "task_type": "zero-shot-image-classification",
        "task_name": "Stream of tasks, the task of an image known",
    }
    suite = {
        "dataset_type": "stream",
        "dataset_name": f"{os.path.basename(results['suite'])} ({len(results['tasks'])} tasks)",
    }
    listed = [
        EvalResult(
            **kind, **suite, metric_type=metric, metric_name=metric.capitalize(), metric_value=round(run[metric], 2)
        )
        for metric in METRICS
        if run.get(metric) is not None
    ]
    for task, accuracy in zip(results["tasks"], run["matrix"][-1], strict=True):
        dataset = {"dataset_type": task, "dataset_name": task}
        metric = {"metric_type": "accuracy", "metric_name": "Accuracy after the last task"}
        listed.append(EvalResult(**kind, **dataset, **metric, metric_value=round(accuracy, 2)))
    return listed


def _sizes(run: dict[str, Any]) -> str:
    sizes = []
    if "stored_bytes" in run:
        sizes.append(f"{run['stored_bytes'] / 1e6:.1f} MB")
    if "trainable_parameters" in run:
        sizes.append(f"at most {run['trainable_parameters']:,} parameters trained per task")
    return "; ".join(sizes) or "size not recorded"


def _base_in_words(settings: dict[str, Any], base: str | None) -> str:
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    if settings.get("model") is None:
        return "the small CLIP for 32 x 32 images that ships with `peft_moe_merge`"
    return "a CLIP that is not on the Hub"


def _loading(settings: dict[str, Any], base: str | None, repo_id: str, task: str, fused: bool) -> str:
    lines = ["from peft import PeftModel", "from transformers import CLIPModel", ""]
    lines += ["from peft_moe_merge import ContinualClassifier"]
    clip = f'"{base}"' if base is not None else "path_of_the_clip"
    if settings.get("model") is None:
        lines += ["from peft_moe_merge.mtil.data.mini import mini_clip_path"]
        clip = "mini_clip_path()"
    given = ("" if base is not None else ", clip=clip") + (", fuse=True" if fused else "")
    return "\n".join(
        [
            *lines,
            "",
            f"clip = CLIPModel.from_pretrained({clip})",
            f'classifier = ContinualClassifier.from_pretrained("{repo_id}"{given})',
            f'print(classifier("picture.jpg", task="{task}").label)',
            "",
            f'model = PeftModel.from_pretrained(CLIPModel.from_pretrained({clip}), "{repo_id}")  # the adapter alone',
            f'model.set_task("{task}")',
        ]
    )
