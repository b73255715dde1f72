"""What is CLIP's own about routing: two towers with ids for one of them, and prompts that all begin alike.

Shapes: B images, N prompts, L tokens of a prompt, P projection width, U distinct tasks in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import (
    CLIPModel,
    CLIPOutput,
    CLIPTextModel,
    image_text_contrastive_loss,
)

from .context import Adapters, TaskIds, context_of, context_under_way, routing
from .routed import TwoTowered, first_layer, inputs_of, make_routable


class RoutedCLIP(TwoTowered):
    """A `CLIPModel`, whose `task_ids` are its images'. Where it is the adapted model itself, its encoders take ids too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = context_of(self.moe_lora_adapters)
        inputs = inputs_of(self, "forward", args, kwargs)
        ids, images, prompts = context.ids, inputs.get("pixel_values"), inputs.get("input_ids")
        if ids is not None and images is not None and images.shape[0] != ids.size:
            raise ValueError(f"`task_ids` has {ids.size} entries for {images.shape[0]} images: pass one per image.")
        if ids is None or images is None or prompts is None or first_layer(self).disable_adapters:
            return super().forward(*args, **kwargs)
        with routing(replace(context, prompt_ids=ids.all_of(slot=0, size=prompts.shape[0]))):
            output = super().forward(*args, **kwargs)

        def encode(slot: int) -> Tensor:
            names = ("input_ids", "attention_mask", "position_ids")
            with routing(replace(context, ids=ids.all_of(slot, prompts.shape[0]))):
                return super(RoutedCLIP, self).get_text_features(**{n: inputs.get(n) for n in names}).pooler_output

        return_loss = bool(inputs.get("return_loss"))
        as_tuple = isinstance(output, tuple)
        if as_tuple:
            output = CLIPOutput(*output) if return_loss else CLIPOutput(None, *output)
        further = [lambda slot=slot: encode(slot) for slot in range(1, len(ids.present))]
        output = mixed_task_output(self, output, ids, further, return_loss)
        return output.to_tuple() if as_tuple else output

    def get_image_features(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Call CLIP's method of this name; `task_ids` as in a call of the model, one per image."""
        return self._encode("get_image_features", args, kwargs, task_ids)

    def get_text_features(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Call CLIP's method of this name; `task_ids` as in a call of the model, one per prompt."""
        return self._encode("get_text_features", args, kwargs, task_ids)

    def _encode(self, method: str, args: tuple, kwargs: dict[str, Any], task_ids: Tensor | None) -> Any:
        encode, under_way = getattr(super(), method), context_under_way()
        within = under_way is not None and under_way.adapters is self.moe_lora_adapters
        if not hasattr(self, "call_context") or (within and task_ids is None):  # part of another call, which decides
            return encode(*args, **kwargs)
        with routing(self.call_context(inputs_of(self, method, args, kwargs), task_ids)):
            return encode(*args, **kwargs)


class RoutedPrompts:
    """A CLIP's text tower: looks at its prompts once, so that no block has to.

    Attributes:
        moe_lora_pools: only the pooled tokens are of use to who called, since the tower is part of a whole CLIP.
    """

    moe_lora_pools = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = inputs_of(self, "forward", args, kwargs)
        tokens_NL, mask_NL = inputs.get("input_ids"), inputs.get("attention_mask")
        layer = first_layer(self)
        if tokens_NL is None or "position_ids" in inputs or layer is None or layer.disable_adapters:
            return super().forward(*args, **kwargs)
        context = context_of(self.moe_lora_adapters)
        rows_NL = tokens_NL.reshape(-1, tokens_NL.shape[-1])
        routed = [context.routed(name, len(rows_NL), prompts=True) for name in layer.active_adapters]
        if not any(routed):
            return super().forward(*args, **kwargs)
        alike = (rows_NL[:, 0] == rows_NL[0, 0]).all()
        if mask_NL is not None:
            alike &= mask_NL[..., 0].all()
        # one wait for the device per forward pass, for both
        alike, longest = torch.stack([alike, pooled_position(rows_NL, self.eos_token_id).max() + 1]).tolist()
        width = tokens_NL.shape[-1]
        cut = longest < width and self.moe_lora_pools and not self._shows_hidden_states(inputs)
        if cut:
            # No token sees those behind it, and only pooled ones matter. Without experts prompts stay as they are, and
            # CLIP's features too, bit for bit.
            args, kwargs = (), {**inputs, "input_ids": tokens_NL[..., :longest]}
            if mask_NL is not None:
                kwargs["attention_mask"] = mask_NL[..., :longest]
        with routing(replace(context, prompts_start_alike=bool(alike))):
            output = super().forward(*args, **kwargs)
        if cut and not isinstance(output, tuple):  # the shape that was asked for
            output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, 0, width - longest))
        return output

    def _shows_hidden_states(self, options: dict[str, Any]) -> bool:
        wanted = ("output_hidden_states", "output_attentions")
        return any(options.get(name) or getattr(self.config, name, False) for name in wanted)


def make_clips_routable(model: nn.Module, adapters: Adapters) -> None:
    """Let every CLIP inside a model, and every text tower, know of routing."""
    for module in list(model.modules()):
        if isinstance(module, CLIPModel):
            module.text_model.moe_lora_pools = True
            if module is not model:
                make_routable(module, adapters, RoutedCLIP)
        if isinstance(module, CLIPTextModel) and module is not model:
            make_routable(module, adapters, RoutedPrompts)


def pooled_position(tokens_NL: Tensor, eos_token_id: int) -> Tensor:
    """Find the token that CLIP's text tower pools: each row's first end token, or, as older files say, its largest."""
    if eos_token_id == 2:
        return tokens_NL.argmax(dim=-1)
    return (tokens_NL == eos_token_id).int().argmax(dim=-1)


def mixed_task_output(
    clip: CLIPModel,
    output: CLIPOutput,
    ids: TaskIds,
    text_features: list[Callable[[], Tensor]],
    return_loss: bool,
) -> CLIPOutput:
    """Score each image against the prompts as its own task's routers encode them.

    So a row of `logits_per_image` is what a batch of that image's task alone would give, and that of a plain image
    (id -1) is what the model without experts gives.

    Args:
        clip: the model that ran.
        output: what it returned, its images routed each by its own task, its prompts by the first of the U tasks.
        ids: the images' tasks.
        text_features: for each further task, a function that encodes the prompts by it (N x P, not normalized).
        return_loss: compute the contrastive loss; needs N = B.

    Returns:
        The output with `logits_per_image` B x N and `text_embeds` B x N x P, the prompts as each image's task sees them,
        whether the images' tasks are one or several.
    """
    if not text_features:
        output.text_embeds = output.text_embeds.expand(ids.size, -1, -1)
        return output
    texts_UNP = [output.text_embeds]
    logits_UNB = [output.logits_per_text]
    scale = clip.logit_scale.exp().to(output.text_embeds.device)
    for encode in text_features:
        features_NP = encode()
        texts_UNP.append(features_NP / features_NP.pow(2).sum(dim=-1, keepdim=True).pow(0.5))
        logits_UNB.append(torch.matmul(texts_UNP[-1], output.image_embeds.t().to(features_NP.device)) * scale)

    columns_B = torch.arange(ids.size, device=ids.slot_B.device)
    output.logits_per_image = torch.stack(logits_UNB)[ids.slot_B, :, columns_B]
    output.logits_per_text = output.logits_per_image.t()
    output.text_embeds = torch.stack(texts_UNP)[ids.slot_B]
    if return_loss:
        output.loss = image_text_contrastive_loss(output.logits_per_text)
    return output
