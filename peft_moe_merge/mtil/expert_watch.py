"""What is noted of a mixture's experts while a stream trains them, for the pictures of a report.

Watching changes nothing: no random number is drawn, and the model is left as it was.

Shapes: P images, E experts, D what experts read, O what they add to, F directions that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import BaseImageProcessor

from .data.rgb import to_rgb

BLOCKS = 8  # that selections are noted of, evenly over the network
SNAPSHOTS = 20  # of a task, at most
IMAGES = 24  # whose activations are noted
EXPERTS = 12  # whose activations are noted, at most: those that a merge changed first
DIRECTIONS = 16  # of activations: their first principal components, from which t-SNE starts anyhow
DIGITS = 5


class ExpertWatch:
    """Notes, for one task at a time, which experts are selected as training goes on, what a merge does to their outputs,
    and how large the adapter is.

    Call `begin_task`, put what may merge into `merging`, call `step` after every optimizer step, then `history`. With several
    processes all of them must call.
    """

    def __init__(self) -> None:
        self.block = ""
        self._forget()

    def _forget(self) -> None:
        self.steps, self.every, self.snapshots = 0, 1, []
        self.activations: dict[str, Any] | None = None
        self.inputs_PD = torch.zeros(0)

    def begin_task(self, model: PeftModel, images: Dataset, processor: BaseImageProcessor) -> None:
        """Start a task: keep what the last block's experts of the untouched CLIP read of some of its images, at token 0.

        Args:
            model: with the adapter.
            images: of the task's training.
            processor: of the CLIP.
        """
        self._forget()
        self.block = list(model.adapted_layers())[-1]
        rows = np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int)
        # not by a loader: these draw a random number, even to go through all images in order
        pixels = processor([to_rgb(image) for image in images.select(rows.tolist())["image"]], return_tensors="pt")
        layer, read = model.adapted_layers()[self.block], []
        config = model.peft_config[model.active_adapters[0]]

        def remember(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_PLD = layer.expert_input(config, inputs[0])
            read.append((x_PLD[:, 0] if x_PLD.ndim > 2 else x_PLD).float().cpu())

        training, hook = model.training, layer.register_forward_pre_hook(remember)
        try:
            model.eval()
            with torch.no_grad():
                nobody = torch.full((len(rows),), -1, device=model.device)
                model.get_image_features(pixels["pixel_values"].to(model.device), task_ids=nobody)
        finally:
            hook.remove()
            model.train(training)
        self.inputs_PD = read[0]

    @contextmanager
    def merging(self, model: PeftModel) -> Iterator[None]:
        """Note the experts' outputs before and after what happens here, if it changes an expert that a task knows.

        Of several merges in a task the first is kept: those after it often set the same expert to nearly the same union.
        """
        if self.activations is not None:
            yield
            return
        before, known = self._outputs(model), self._known(model)
        yield
        after, still_known = self._outputs(model), self._known(model)
        changed = [e for e in known if not torch.equal(before[e], after[e])]
        if not changed:
            return
        usage_E = sum(model.expert_usage(task)[self.block] for task in self._tasks(model))
        others = sorted(set(known) - set(changed), key=lambda expert: (-int(usage_E[expert]), expert))
        shown = sorted([*changed, *others][:EXPERTS])
        stages = {
            "before": (before, [expert for expert in shown if before[expert].any()]),
            "after": (after, [expert for expert in shown if after[expert].any() and expert in still_known]),
        }
        values = [outputs[experts].flatten(0, 1) for outputs, experts in stages.values()]
        if not all(map(len, values)):
            return
        reduced = torch.split(principal_components(torch.cat(values)), list(map(len, values)))
        self.activations = {"block": self.block, "changed": changed}
        for (stage, (_, experts)), of_stage in zip(stages.items(), reduced, strict=True):
            self.activations[stage] = [[round(value, DIGITS) for value in row] for row in of_stage.tolist()]
            self.activations[f"{stage}_experts"] = np.repeat(experts, len(self.inputs_PD)).tolist()

    @staticmethod
    def _tasks(model: PeftModel) -> list[str]:
        return model.peft_config[model.active_adapters[0]].tasks

    def _known(self, model: PeftModel) -> list[int]:
        """List the experts of the watched block that some task can choose."""
        return sorted({e for task in self._tasks(model) for e in model.experts_of_task(task)[self.block]})

    @torch.no_grad()
    def _outputs(self, model: PeftModel) -> Tensor:
        """Compute what each expert of the watched block adds, up to the scale that all share: E x P x O."""
        bank = model.expert_banks()[self.block]
        outputs = []
        for index in range(len(bank)):
            expert = {name: tensor.float().cpu() for name, tensor in bank.expert(index).items()}
            hidden_PR = self.inputs_PD @ expert["down_weight"].T + expert.get("down_bias", 0)
            hidden_PR = hidden_PR if bank.activation is None else bank.activation(hidden_PR)
            outputs.append(hidden_PR @ expert["up_weight"] + expert.get("up_bias", 0))
        return torch.stack(outputs)

    def step(self, model: PeftModel) -> None:
        """Count an optimizer step; now and then note the selections so far."""
        self.steps += 1
        if self.steps % self.every == 0:
            self._note(model)
        if len(self.snapshots) > SNAPSHOTS:  # twice as rarely from now on
            self.snapshots, self.every = self.snapshots[1::2], 2 * self.every

    def _note(self, model: PeftModel) -> None:
        usage = model.expert_usage()
        blocks = list(usage)
        evenly = np.unique(np.linspace(0, len(blocks) - 1, min(BLOCKS, len(blocks))).round().astype(int))
        self.snapshots.append([self.steps, {blocks[at]: usage[blocks[at]].tolist() for at in evenly}])

    def history(self, model: PeftModel) -> dict[str, Any]:
        """Tell of the task just ended: values that JSON can hold, by name.

        Returns:
            `snapshots` for `selection_over_training`; `activations` of the first merge, None without one; and the size of the
            adapter, `adapter_parameters` and `adapter_bytes`.
        """
        if self.snapshots and self.snapshots[-1][0] != self.steps:
            self._note(model)
        banks = [*model.expert_banks().values(), *model.router_banks().values()]
        parameters = [parameter for bank in banks for parameter in bank.parameters()]
        return {
            "snapshots": self.snapshots,
            "activations": self.activations,
            "adapter_parameters": sum(parameter.numel() for parameter in parameters),
            "adapter_bytes": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        }


def principal_components(values_PO: Tensor) -> Tensor:
    """Project on the directions in which the values differ most: P x F. Distances stay, but for what the others held."""
    centred_PO = (values_PO - values_PO.mean(dim=0)).double()
    u_PF, s_F, _ = torch.linalg.svd(centred_PO, full_matrices=False)
    return (u_PF * s_F)[:, :DIRECTIONS]
