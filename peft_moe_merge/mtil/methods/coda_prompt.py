"""CODA-Prompt: prompts of the vision tower are sums of components, weighted by what an image looks like."""

# B images, L tokens of a prompt, D width of the vision tower, E blocks with prompts, M components, P projection width,
# H heads, S tokens, X entries of a component

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPAttention

from ..data.batches import Batch
from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .base import Method, Settings


@dataclass
class CodaSettings(Settings):
    """Of CODA-Prompt."""

    coda_components: int = setting(10, "coda_prompt: components that a task adds per block")
    coda_length: int = setting(8, "coda_prompt: tokens of a prompt, half of them keys and half of them values")
    coda_layers: int = setting(
        5, "coda_prompt: first blocks of the vision tower that get prompts, all if there are fewer"
    )
    coda_weight: float = setting(0.0, "coda_prompt: of the loss that keeps components orthogonal; 0.1 in the paper")
    coda_lr: float = setting(1.6e-1, "coda_prompt: peak learning rate")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "coda_components", "coda_layers")
        check_at_least(self, 0, "coda_weight")
        check_positive(self, "coda_lr")
        if self.coda_length < 2 or self.coda_length % 2:
            raise ValueError(f"`coda_length` must be even, half keys and half values, got {self.coda_length}.")


class Components(nn.Module):
    """What one task adds: prompts, and by which images they are wanted."""

    def __init__(self, prompts_EMLD: Tensor, keys_EMD: Tensor, attention_EMD: Tensor):
        super().__init__()
        self.prompts, self.keys, self.attention = map(nn.Parameter, (prompts_EMLD, keys_EMD, attention_EMD))


class PromptedCLIP(nn.Module):
    """A frozen CLIP whose first vision blocks read prompts beside their own keys and values.

    Attributes:
        clip: the frozen model.
        tasks: the components of each task.
    """

    def __init__(self, clip: CLIPModel):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.tasks = nn.ModuleList()

    @property
    def get_text_features(self):
        """CLIP's own: texts have no prompts."""
        return self.clip.get_text_features

    def joined(self, kind: str) -> Tensor:
        """Return the components of all tasks, E x M x ...; `kind` is "prompts", "keys" or "attention"."""
        return torch.cat([getattr(task, kind) for task in self.tasks], dim=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode images: B x P, of any length."""
        vision = self.clip.vision_model
        with torch.no_grad():
            query_BD = vision(pixel_values).pooler_output
        prompts_EBLD = self.prompts(query_BD)
        x_BSD = vision.pre_layrnorm(vision.embeddings(pixel_values))
        for block, layer in enumerate(vision.encoder.layers):
            if block < len(prompts_EBLD):
                x_BSD = x_BSD + with_prefix(layer.self_attn, layer.layer_norm1(x_BSD), prompts_EBLD[block])
                x_BSD = x_BSD + layer.mlp(layer.layer_norm2(x_BSD))
            else:
                x_BSD = layer(x_BSD, None)
        return self.clip.visual_projection(vision.post_layernorm(x_BSD[:, 0]))

    def prompts(self, query_BD: Tensor) -> Tensor:
        """Sum the components, each weighted by the cosine of its key to the query as its attention sees it: E x B x L x D."""
        seen_EBMD = query_BD[:, None] * self.joined("attention")[:, None]
        weights_EBM = F.cosine_similarity(seen_EBMD, self.joined("keys")[:, None], dim=-1)
        return torch.einsum("ebm,emld->ebld", weights_EBM, self.joined("prompts"))

    def overlap(self) -> Tensor:
        """Tell how far components are from orthonormal: mean squared entry of `C C^T - 1`, over blocks and kinds summed."""
        total = 0.0
        for kind in ("prompts", "keys", "attention"):
            rows_EMX = self.joined(kind).flatten(2)
            unit_MM = torch.eye(rows_EMX.shape[1], device=rows_EMX.device)
            total = total + (rows_EMX @ rows_EMX.mT - unit_MM).square().mean(dim=(1, 2)).sum()
        return total


def with_prefix(attention: CLIPAttention, x_BSD: Tensor, prompt_BLD: Tensor) -> Tensor:
    """Attend as a block does, with the first half of a prompt before its keys and the second half before its values."""

    def heads(y_BSD: Tensor) -> Tensor:
        return y_BSD.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    before_keys, before_values = prompt_BLD.chunk(2, dim=1)
    queries_BHSD = heads(attention.q_proj(x_BSD))
    keys_BHSD = heads(torch.cat([before_keys.to(x_BSD), attention.k_proj(x_BSD)], dim=1))
    values_BHSD = heads(torch.cat([before_values.to(x_BSD), attention.v_proj(x_BSD)], dim=1))
    y_BHSD = F.scaled_dot_product_attention(queries_BHSD, keys_BHSD, values_BHSD)
    return attention.out_proj(y_BHSD.transpose(1, 2).flatten(2))


class CodaPrompt(Method):
    """Prompts for keys and values of the vision tower's first blocks; each task adds components and freezes the older ones.

    Smith et al., CODA-Prompt: continual decomposed attention-based prompting for rehearsal-free continual learning, arXiv
    2211.13218. An image is encoded twice: by the frozen tower, whose class token asks for components, and with the
    prompts. At test time the components of all tasks so far are used, whichever task is tested. New components start
    orthonormal to the older ones and to each other where the width has room for it; the loss that keeps them so has no
    weight by default, as in the scripts that its authors published later: at few steps it holds prompts back. Prompts go in after the projections to
    keys and values. In the place of that paper's classifier stand CLIP's class prompts, encoded by the frozen text tower.
    """

    name = "coda_prompt"
    settings_class = CodaSettings
    shardable = False

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._wrap()
        self.model.requires_grad_(False)
        self.model.tasks.append(self._new_components())
        self.classes_CP = self.encode_classes([[prompt] for prompt in task.prompts(task.templates[0])], self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.clip.logit_scale.device

    def _wrap(self) -> None:
        if not isinstance(self.model, PromptedCLIP):
            self.model = PromptedCLIP(self.model)

    def _new_components(self) -> Components:
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        generator = torch.Generator().manual_seed(torch.initial_seed())
        config, settings = self.model.clip.config.vision_config, self.settings
        blocks, width = min(settings.coda_layers, config.num_hidden_layers), config.hidden_size
        shapes = {"prompts": (settings.coda_length, width), "keys": (width,), "attention": (width,)}
        new = []
        for kind, shape in shapes.items():
            size = torch.Size(shape).numel()
            older = self.model.joined(kind).flatten(2).cpu() if len(self.model.tasks) else torch.zeros(blocks, 0, size)
            rows = torch.stack([orthonormal_rows(settings.coda_components, of_block, generator) for of_block in older])
            new.append(rows.unflatten(2, shape).to(self._device))
        return Components(*new)

    def learning_rate(self, lr: float) -> float:
        return self.settings.coda_lr

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy over the task's class prompts, and what keeps components orthogonal."""
        features_BP = F.normalize(model(batch["pixel_values"]).float(), dim=-1)
        logits_BC = self.model.clip.logit_scale.exp() * features_BP @ self.classes_CP.to(features_BP).T
        loss = F.cross_entropy(logits_BC, batch["labels"], label_smoothing=self.settings.label_smoothing)
        weight = self.settings.coda_weight
        return loss + weight * self.model.overlap() if weight else loss

    def image_features(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.model(pixel_values).float(), dim=-1)

    def save(self, folder: Path) -> None:
        components = {name: tensor.contiguous() for name, tensor in self.model.tasks.state_dict().items()}
        save_file(components, folder / "components.safetensors")

    def load(self, folder: Path) -> None:
        self._wrap()
        components = load_file(folder / "components.safetensors")
        for task in range(len({name.partition(".")[0] for name in components})):
            own = (components[f"{task}.{kind}"] for kind in ("prompts", "keys", "attention"))
            self.model.tasks.append(Components(*own))


def orthonormal_rows(count: int, older_MX: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows orthonormal to each other and orthogonal to older ones; where there is no room, of unit length only."""
    rows = torch.randn(count, older_MX.shape[1], generator=generator)
    if len(older_MX) + count > older_MX.shape[1]:
        return F.normalize(rows, dim=1)
    return torch.linalg.qr(torch.cat([older_MX, rows]).double().T)[0].T[len(older_MX) :].float()
