"""From fine-tuned models to a WEMoE model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from tqdm import tqdm

from peft_moe_merge.model_merging.finetuned import Finetuned, TaskVectors, load_task_vectors
from peft_moe_merge.model_merging.orthogonal import orthogonal, rank_of_each

from .config import WEMoEConfig
from .layer import WEMoELinear, WEMoEStatic
from .model import default_targets

__all__ = ["merge_finetuned"]


def merge_finetuned(
    base: nn.Module,
    finetuned: Mapping[str, Finetuned] | Iterable[tuple[str, Finetuned]],
    config: WEMoEConfig | None = None,
    adapter_name: str = "default",
    progress: bool = False,
) -> PeftModel:
    """Merge fine-tuned copies of `base` into one weight-ensembling mixture of experts (arXiv 2402.00433).

    Before adaptation (`adapt_routers`) the result is close to task arithmetic with `config.scaling`, with
    `config.without_interference` and a scaling of 1 to TSV-merge.

    Args:
        base: the pretrained model. As with `get_peft_model`, the returned model wraps it; its weights do not change.
        finetuned: a fine-tuned model for each task: a model in memory, a folder or Hub id of a model or of a PEFT
            adapter of `base`, a `PeftModel`, or a state dict. A mapping, or pairs of name and model. Whole parts of
            the model may be missing, such as the text tower in a `CLIPVisionModel`.
            Folders are read one tensor at a time, and with `rank` LoRAs are taken by their factors: there are never two
            whole models in memory beside `base`. (Whole models are where files hold other tensors than the model, as those
            of DINOv2 with SwiGLU blocks do.)
        config: what to build; it is copied. `tasks` and `static_modules` are filled in.
        adapter_name: the name of the adapter in the returned model.
        progress: show a progress bar.

    Returns:
        A `PeftModel` of which the routers are trainable (with `gates="projection"`, nothing is).

    Raises:
        ValueError: no fine-tuned model, a name twice, tensors that do not match `base` (each is named), float16 mixed
            with bfloat16, NaN or infinite weights, a model equal to `base`, targets that match nothing.
        TypeError: something that is not a model, a path or a state dict; a target that is not an MLP block.
    """
    vectors = load_task_vectors(base, finetuned)
    config = copy.deepcopy(config) if config is not None else WEMoEConfig()
    if config.tasks and config.tasks != list(vectors.tasks):
        raise ValueError(
            f"WEMoEConfig.tasks is {config.tasks}, but the fine-tuned models are {list(vectors.tasks)}; leave `tasks` "
            "empty, it is filled in from the models."
        )
    config.tasks = list(vectors.tasks)
    config.inference_mode = False
    if config.target_modules is None:
        config.target_modules = default_targets(config.gates, getattr(base, "config", None))
    targets = {name for name, _ in base.named_modules() if check_target_module_exists(config, name)}
    if not targets:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of {type(base).__name__}; its modules have names "
            f"such as {[name for name, _ in base.named_modules()][-3:]}."
        )
    # SMILE leaves everything outside of its linear layers as pretrained.
    config.static_modules = [] if config.gates == "projection" else _static_modules(vectors.changed(), targets)
    if config.without_interference:
        vectors = orthogonal(vectors)
        config.rank = config.rank or _rank(base, targets, len(vectors.tasks))
    model = get_peft_model(base, config, adapter_name=adapter_name)
    _fill(model, vectors, config, adapter_name, progress)
    return model


def _rank(base: nn.Module, targets: set[str], tasks: int) -> int:
    """The rank that holds every task's part of the largest weight whole."""
    weights = [p for target in targets for p in base.get_submodule(target).parameters() if p.ndim == 2]
    return max(rank_of_each(weight.shape, tasks) for weight in weights)


def _static_modules(changed: set[str], targets: set[str]) -> list[str]:
    """Names of the outermost modules that own changed parameters and neither are, lie in, nor contain a target."""
    inside = tuple(target + "." for target in targets)
    containers = {"", *(prefix for target in targets for prefix in _prefixes(target))}
    changed = {name for name in changed if not name.startswith(inside)}
    if left := sorted(name for name in changed if name.rpartition(".")[0] in containers):
        warnings.warn(
            f"{left} changed in fine-tuning but belong to modules that contain MLP blocks, where WEMoE cannot merge "
            "them; they stay as pretrained.",
            stacklevel=3,
        )
    owners = {name.rpartition(".")[0] for name in changed} - containers
    return sorted(owner for owner in owners if not owners.intersection(_prefixes(owner)))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _fill(model: PeftModel, vectors: TaskVectors, config: WEMoEConfig, adapter_name: str, progress: bool) -> None:
    """Store the task vectors in the layers, parameter by parameter."""
    layers = [
        (name.replace(".base_layer", ""), module)
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, (WEMoELinear, WEMoEStatic))
    ]
    for path, module in tqdm(layers, desc="merging", disable=not progress):
        if isinstance(module, WEMoEStatic):
            for parameter, _ in module.base_layer.named_parameters():
                module.set_shift(adapter_name, parameter, config.scaling * vectors.summed(f"{path}.{parameter}"))
        elif config.rank is not None and (factors := vectors.factors(f"{path}.weight")) is not None:
            module.set_factors(adapter_name, config, factors)  # a LoRA leaves biases alone
        else:
            bias = vectors.stacked(f"{path}.bias") if module.base_layer.bias is not None else None
            module.set_task_vectors(adapter_name, config, vectors.stacked(f"{path}.weight"), bias)
