"""Zero-shot classification: class names as features, and how often the nearest class is the right one.

Shapes: B images, N texts, C classes, P projection width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

TEXT_BATCH = 512
"""Prompts that are encoded at once."""


def prompts_of(class_names: Iterable[str], templates: Sequence[str]) -> list[list[str]]:
    """Fill every template, which has one `{}`, with every class name: the prompts of each class."""
    return [[template.format(name) for template in templates] for name in class_names]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenize texts, padded to the longest: under CLIP's causal mask that is exact, and cheaper than 77 tokens.

    Returns:
        `input_ids` and `attention_mask`, both N x length.
    """
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@torch.no_grad()
def class_features(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[str]],
    *,
    device: torch.device | None = None,
    task_id: int | None = None,
    batch_size: int = TEXT_BATCH,
) -> Tensor:
    """Encode classes as CLIP's zero-shot classifier does: each is the mean of its prompts (arXiv 2103.00020, 3.1.4).

    Prompts are encoded in batches, normalised, averaged per class, and normalised again. Memory grows with the number of
    prompts only by their features.

    Args:
        model: has CLIP's `get_text_features`.
        tokenizer: of the model.
        prompts: of each class, at least one; classes may have different numbers of them. See `prompts_of`.
        device: of the tokens; default: that of the model's first parameter.
        task_id: of a model with routers: whose routers encode. Default: the model's current task.
        batch_size: prompts that are encoded at once.

    Returns:
        C x P, float32, of unit length.

    Raises:
        ValueError: no class, or one without a prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"Every class needs at least one prompt, and there must be a class; got {prompts!r}.")
    device = device or next(model.parameters()).device
    longest = max(map(len, prompts))
    # all first prompts, then all second ones: neighbours have about the same length, and padding stays short
    flat = [(row, of_class[i]) for i in range(longest) for row, of_class in enumerate(prompts) if i < len(of_class)]
    parts = []
    for start in range(0, len(flat), batch_size):
        texts = [text for _, text in flat[start : start + batch_size]]
        arguments = {name: tensor.to(device) for name, tensor in tokenize(tokenizer, texts).items()}
        if task_id is not None:
            arguments["task_ids"] = torch.full((len(texts),), task_id, device=device)
        parts.append(F.normalize(model.get_text_features(**arguments).pooler_output.float(), dim=-1))
    features_NP = torch.cat(parts)
    rows_N = torch.tensor([row for row, _ in flat], device=features_NP.device)
    means_CP = torch.stack([features_NP[rows_N == row].mean(dim=0) for row in range(len(prompts))])
    return F.normalize(means_CP, dim=-1)


def cosines(features_BP: Tensor, classes_CP: Tensor) -> Tensor:
    """Compare images' and classes' features, all of unit length, in float32 also under autocast: B x C.

    In bfloat16, cosines of 0.25 and more are steps of 0.002 and more apart, and the first of classes that look alike would win.
    """
    with torch.autocast(features_BP.device.type, enabled=False):
        return features_BP.float() @ classes_CP.float().T


@torch.no_grad()
def accuracy(
    scores: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Tensor] | Sequence[Tensor]],
    gather: Callable[[Tensor], Any] = lambda hits_B: hits_B,
) -> float:
    """Count the images whose likeliest class is their own. Top-1, in percent.

    Args:
        scores: takes `pixel_values`, B x 3 x H x W, and returns B x C, such as cosines with `class_features`.
        batches: of `pixel_values` and `labels`, by these names or as a pair.
        gather: brings the hits of all processes together, as `accelerator.gather_for_metrics` does.

    Raises:
        ValueError: there are no images.
    """
    correct = total = 0
    for batch in batches:
        pixels, labels_B = (batch["pixel_values"], batch["labels"]) if isinstance(batch, Mapping) else batch
        predicted_B = scores(pixels).argmax(dim=1)
        hits_B = gather(predicted_B == labels_B.to(predicted_B.device))
        correct += int(hits_B.sum())
        total += len(hits_B)
    if not total:
        raise ValueError("There are no images to test on.")
    return 100.0 * correct / total
