"""RegMean: linear layers merged so that their outputs stay as they were (arXiv 2212.09849)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors, finetuned_model
from peft_moe_merge.model_merging.logits import task_logits

from .average import average
from .registry import static_merge


@static_merge("regmean", "arXiv 2212.09849")
def regmean(
    base: nn.Module,
    vectors: TaskVectors,
    batches: Mapping[str, Iterable],
    heads: Mapping[str, torch.Tensor],
    num_batches: int = 8,
    off_diagonal: float = 0.9,
) -> dict[str, torch.Tensor]:
    """Merge every changed linear weight in closed form, and average everything else.

    `W = (Σ W_t G_t) (Σ G_t)⁻¹` minimises `Σ ‖W X_t − W_t X_t‖²`, where the Gram matrix `G_t = X_tᵀ X_t` is that of the
    layer's inputs in the fine-tuned model t on its own images.

    Args:
        base: the pretrained model.
        vectors: what changed.
        batches: images of each task, in the forms that `adapt_routers` takes; labels are not looked at.
        heads: the normalised text features of each task's classes.
        num_batches: batches per task that Gram matrices are made from.
        off_diagonal: what entries off the diagonal are multiplied by, against ill-conditioned sums.
    """
    merged = average(base, vectors)
    names = [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear) and f"{name}.weight" in merged
    ]
    weighted = dict.fromkeys(names, 0.0)
    total = dict.fromkeys(names, 0.0)
    for task in vectors.tasks:
        for name, gram in _grams(
            finetuned_model(base, vectors, task), names, task, batches[task], heads[task], num_batches
        ).items():
            gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
            tuned = vectors.base[f"{name}.weight"].double() + vectors.delta(task, f"{name}.weight").double()
            weighted[name] = weighted[name] + tuned @ gram
            total[name] = total[name] + gram
    for name in names:
        if isinstance(total[name], float) or not total[name].diagonal().sum() > 0:
            continue  # a layer that no image passes through keeps the average
        ridge = (
            1e-8
            * total[name].diagonal().mean()
            * torch.eye(len(total[name]), dtype=torch.float64, device=total[name].device)
        )
        # The ridge pulls directions that no input has towards the average, not towards zero.
        pulled = weighted[name] + merged[f"{name}.weight"].double() @ ridge
        merged[f"{name}.weight"] = torch.linalg.solve(total[name] + ridge, pulled, left=False)
    return merged


@torch.no_grad()
def _grams(
    model: nn.Module, names: list[str], task: str, batches: Iterable, head_CD: torch.Tensor, num_batches: int
) -> dict[str, torch.Tensor]:
    """Return the Gram matrix `[I, I]` of the inputs of each named layer, a mean over tokens, in float64."""
    grams: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}

    def accumulate(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x_NI = inputs[0].detach().flatten(0, -2).double()
            grams[name] = grams.get(name, 0.0) + x_NI.T @ x_NI
            tokens[name] = tokens.get(name, 0) + len(x_NI)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(accumulate(name)) for name in names]
    used = 0
    for batch in batches:
        if used == num_batches:
            break
        task_logits(model, batch, head_CD)
        used += 1
    for handle in handles:
        handle.remove()
    if not used:
        raise ValueError(f"`batches` has no images of task {task!r}.")
    return {name: gram / tokens[name] for name, gram in grams.items()}
