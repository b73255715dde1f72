"""Published accuracies beside those of a run, and what keeps the two from comparing. Only for the suite `mtil`."""

from __future__ import annotations

from typing import Any

from ..data.hub.table import HUB_SETS

ROWS = {  # label -> field of `Anchors`, in the table of each metric
    "transfer": {"† CLIP untouched": "zero_shot", "† arXiv 2405.11530": "transfer"},
    "average": {"† CLIP untouched": "zero_shot", "† arXiv 2405.11530": "average"},
    "last": {"† CLIP untouched": "zero_shot", "† each task alone": "finetune", "† arXiv 2405.11530": "last"},
}
PUBLISHED = {  # the settings of the published numbers
    "order": "I",
    "few_shot": None,
    "steps": 1000,
    "batch_size": 64,
    "weight_decay": 0.0,
    "num_experts": 55,
    "top_k": 2,
    "r": 64,
    "merge_every": 100,
    "freeze_top_k": 2,
    "label_smoothing": 0.2,
    "allow_size_mismatch": False,
}
MODEL = "clip-vit-base-patch16"
NOTES = (
    "In the tables above the true task of an image is known at test time; the published method infers it, image by "
    "image. The numbers of a selector, image by image, are the ones to hold against it.",
    "Caltech-101 is divided at random with a fixed seed, but over the rows of another copy: its membership differs.",
    "With the splits of CoOp, CLIP untouched reaches 92.9 on Caltech-101 instead of 88.4: other publications' numbers "
    "may be of those.",
    "One label space for all tasks, or one task for a whole batch of images, are other settings: easier or harder.",
    "Absolute numbers differ between harnesses. What decides is a method against another one in the same run.",
)


def anchor_values(results: dict[str, Any], metric: str) -> dict[str, list[float | None]]:
    """Return the published accuracies on a run's tasks, by label; none for other suites than `mtil`."""
    if results["suite"] != "mtil":
        return {}
    anchors = [HUB_SETS[task].anchors for task in results["tasks"]]
    # the first task of a stream has no transfer
    return {
        label: [
            None if metric == "transfer" and not position else getattr(anchor, field)
            for position, anchor in enumerate(anchors)
        ]
        for label, field in ROWS[metric].items()
    }


def anchor_notes(results: dict[str, Any]) -> list[str]:
    """Say in what a run differs from the published ones, and what to beware of in any case."""
    if results["suite"] != "mtil":
        return []
    settings = results.get("settings") or {}
    differing = [
        f"{name} {settings.get(name)!r} instead of {value!r}"
        for name, value in PUBLISHED.items()
        if settings.get(name) != value
    ]
    if MODEL not in str(settings.get("model")):
        differing.append(f"model {settings.get('model')!r} instead of {MODEL!r}")
    if list(results["tasks"]) != list(HUB_SETS):
        differing.append(f"{len(results['tasks'])} tasks in another order or choice than order I")
    rates = [HUB_SETS[task].lr for task in results["tasks"]]
    if settings.get("lr") != rates:
        differing.append(f"lr {settings.get('lr')!r} instead of {rates!r}")
    verdict = (
        f"NOT comparable as it is: {'; '.join(differing)}." if differing else "The settings are the published ones."
    )
    return [f"† published: order I, all images, ViT-B/16, 1000 steps of 64 images. {verdict}", *NOTES]
