"""SEMA: adapters beside MLPs; a layer gets another one only if its inputs are new to it."""

# B images, L tokens, D width of the vision tower, K adapters of a layer, N images of a task

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.selection import AutoencoderSelector, load_selector, save_selector

from ..data.batches import eval_batches
from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .base import Method, Settings


@dataclass
class SemaSettings(Settings):
    """Of SEMA."""

    sema_layers: int = setting(3, "sema: last blocks of the vision tower that get adapters, all if there are fewer")
    sema_r: int = setting(16, "sema: width of an adapter")
    sema_bottleneck: int = setting(32, "sema: hidden units of the autoencoder that describes an adapter's inputs")
    sema_threshold: float = setting(1.0, "sema: standard deviations above the usual error from which inputs are new")
    sema_always: int = setting(1, "sema: last blocks that grow with every task, new or not; 0 in the paper")
    sema_lr: float = setting(2.5e-3, "sema: peak learning rate")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "sema_layers", "sema_r", "sema_bottleneck")
        check_at_least(self, 0, "sema_always")
        check_positive(self, "sema_lr")


class Adapters(nn.Module):
    """An MLP and the adapters beside it, weighted by a router that grows with them.

    Attributes:
        mlp: of the block.
        adapters: each down, ReLU, up; an up projection starts at zero.
        columns: of the router, one linear score per adapter.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp
        self.adapters, self.columns = nn.ModuleList(), nn.ModuleList()

    def grow(self, width: int, hidden: int, like: Tensor) -> None:
        """Add an adapter."""
        adapter = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        nn.init.zeros_(adapter[2].weight)
        nn.init.zeros_(adapter[2].bias)
        self.adapters.append(adapter.to(like))
        self.columns.append(nn.Linear(width, 1).to(like))

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD = self.mlp(x_BLD)
        if not len(self.adapters):
            return y_BLD
        # of unit length: scores of long vectors would soon be so far apart that a new adapter gets no gradient
        seen_BD = F.normalize(x_BLD.mean(dim=1), dim=1)
        weights_BK = torch.cat([column(seen_BD) for column in self.columns], dim=1).softmax(dim=1)
        for adapter, weight_B in zip(self.adapters, weights_BK.T, strict=True):
            y_BLD = y_BLD + weight_B[:, None, None] * adapter(x_BLD)
        return y_BLD


class Sema(Method):
    """Before a task each layer asks its autoencoders whether the inputs are new; where all say so it grows by an adapter.

    Wang et al., Self-expansion of pre-trained models with mixture of adapters for continual learning, arXiv 2403.18886. An
    autoencoder describes the inputs of the task that its adapter was trained with. Its error on an image, in standard
    deviations from the mean there, is a z-score; a layer grows where the task's mean z-score is above the threshold for
    every autoencoder, and always for the first task. New adapters and their router columns learn, all else is frozen. At
    test time all adapters are used, whichever task is tested. That paper trains a classifier with every task, so that one
    whose inputs are not new can be learnt; CLIP has its class prompts instead, so here the last block grows with every
    task (`sema_always`; with 0 a task that is new nowhere is not trained).

    Simplified: all layers are scanned before training, where that paper lets a layer see what shallower new adapters have
    learnt; autoencoders are those of the selectors, on the mean token, and are fitted when a task's training is over; the
    decision is one per task, by all its training images; routers read the mean token, of unit length. Texts are encoded by the frozen text tower.

    Attributes:
        descriptors: by layer, its autoencoders.
        usual_2K: by layer, mean and standard deviation of each autoencoder's error on its own task.
        grown: layers that the current task has added an adapter to.
    """

    name = "sema"
    settings_class = SemaSettings
    shardable = False

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: Any):
        super().__init__(clip, processor, settings)
        clip.requires_grad_(False)
        blocks = list(clip.vision_model.encoder.layers)
        first = max(0, len(blocks) - self.settings.sema_layers)
        self.layers = {f"block_{position}": blocks[position] for position in range(first, len(blocks))}
        options = {"bottleneck": self.settings.sema_bottleneck, "reject_rate": 0.0}
        self.descriptors = {layer: AutoencoderSelector(**options) for layer in self.layers}
        self.usual_2K = {layer: torch.zeros(2, 0, dtype=torch.float64) for layer in self.layers}
        self.grown: list[str] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task = task
        self._wrap()
        self.model.requires_grad_(False)
        inputs = self.layer_inputs()
        always = list(self.layers)[max(0, len(self.layers) - self.settings.sema_always) :]
        self.grown = [layer for layer in self.layers if layer in always or self.is_new(layer, inputs[layer])]
        with torch.random.fork_rng(devices=[]):  # all methods see the same crops
            for layer in self.grown:
                self._grow(layer)

    def _wrap(self) -> None:
        for block in self.layers.values():
            if not isinstance(block.mlp, Adapters):
                block.mlp = Adapters(block.mlp)

    def _grow(self, layer: str) -> None:
        config, like = self.model.config.vision_config, self.model.logit_scale
        self.layers[layer].mlp.grow(config.hidden_size, self.settings.sema_r, like)

    @torch.no_grad()
    def layer_inputs(self) -> dict[str, Tensor]:
        """Collect the mean token of each layer's MLP input over the task's training images: by layer, N x D."""
        self.model.eval()
        device, inputs = self.model.logit_scale.device, {layer: [] for layer in self.layers}
        handles = [
            block.mlp.register_forward_pre_hook(lambda _, x, kept=inputs[layer]: kept.append(x[0].mean(dim=1).cpu()))
            for layer, block in self.layers.items()
        ]
        try:
            for batch in eval_batches(self.task.train, self.processor.image_processor, batch_size=64):
                self.model.get_image_features(batch["pixel_values"].to(device))
        finally:
            for handle in handles:
                handle.remove()
        return {layer: torch.cat(parts).float() for layer, parts in inputs.items()}

    def errors(self, layer: str, inputs_ND: Tensor) -> Tensor:
        """Tell how badly each autoencoder of a layer reconstructs inputs: N x K."""
        return -self.descriptors[layer].decision_function(inputs_ND).double()

    def is_new(self, layer: str, inputs_ND: Tensor) -> bool:
        """Tell whether inputs are unlike those of every adapter of the layer."""
        if not self.descriptors[layer].tasks:
            return True
        mean_K, deviation_K = self.usual_2K[layer]
        z_NK = (self.errors(layer, inputs_ND) - mean_K) / deviation_K
        return bool((z_NK.mean(dim=0) > self.settings.sema_threshold).all())

    def learning_rate(self, lr: float) -> float:
        return self.settings.sema_lr

    def end_task(self) -> None:
        """Describe what the new adapters have seen."""
        inputs = self.layer_inputs()
        for layer in self.grown:
            self.descriptors[layer].fit(self.task.name, inputs[layer])
            errors_N = self.errors(layer, inputs[layer])[:, -1]
            usual_2 = torch.stack([errors_N.mean(), errors_N.std().clamp_min(1e-12)])
            self.usual_2K[layer] = torch.cat([self.usual_2K[layer], usual_2[:, None]], dim=1)
        del self.task

    def history(self) -> dict[str, Any]:
        return {"grown": self.grown}

    def save(self, folder: Path) -> None:
        tensors = {f"{layer}.usual": usual_2K for layer, usual_2K in self.usual_2K.items()}
        for layer, block in self.layers.items():
            state = block.mlp.state_dict()
            tensors |= {f"{layer}.{name}": state[name] for name in state if not name.startswith("mlp.")}
            save_selector(self.descriptors[layer], folder / layer)
        save_file(tensors, folder / "adapters.safetensors")

    def load(self, folder: Path) -> None:
        self._wrap()
        tensors = load_file(folder / "adapters.safetensors")
        for layer, block in self.layers.items():
            self.usual_2K[layer] = tensors.pop(f"{layer}.usual")
            self.descriptors[layer] = load_selector(folder / layer)
            for _ in range(self.usual_2K[layer].shape[1]):
                self._grow(layer)
            state = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
            state = {name.removeprefix(f"{layer}."): tensor for name, tensor in state.items()}
            block.mlp.load_state_dict({**block.mlp.state_dict(), **state})
