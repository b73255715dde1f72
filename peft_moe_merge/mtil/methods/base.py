"""What a continual learning method is to the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.inference.zero_shot import class_features, cosines, tokenize
from peft_moe_merge.selection import FeatureSource

from ..data.batches import Batch
from ..data.label_space import LabelSpace
from ..data.task import Task
from ..settings import setting


@dataclass
class Settings:
    """What every method can be told. A method that can be told more has a subclass of its own.

    A setting that several methods have is one option of the command line, so it must be declared alike. The defaults are
    those of arXiv 2405.11530.

    Raises:
        ValueError: a value out of range.
    """

    label_smoothing: float = setting(0.2, "of the cross-entropy")

    def __post_init__(self):
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1], got {self.label_smoothing}.")

    @classmethod
    def of(cls, values: Any) -> Settings:
        """Take them from an object that has at least these, such as `MethodSettings`."""
        return cls(**{own.name: getattr(values, own.name) for own in fields(cls)})


@runtime_checkable
class Routed(Protocol):
    """A method that keeps something of its own per task, routers or a LoRA, and so a route of its own through the model:
    it can be tried with selectors that choose the task of an image.

    Attributes:
        learnt: the tasks that have routes, in order; a task's position is its id, and -1 is the model without any.
        routes_stay: whether a route never changes once its task has been learnt, so that class texts stay encoded.
    """

    learnt: list[str]
    routes_stay: bool

    def set_task(self, task: str | None) -> None:
        """Let a task's route encode from now on, or the model without any."""

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        """Compute what selectors look at: B x F."""

    def routed_image_features(self, pixel_values: Tensor, task_ids: Tensor) -> Tensor:
        """Encode each image by the route of its task, an id per image: B x P, of unit length."""


def is_routed(method: type[Method]) -> bool:
    """Tell whether the instances of a class will be [`Routed`]."""
    return callable(getattr(method, "routed_image_features", None))


class Method(ABC):
    """Learns one task after another. One instance runs one stream.

    The stream calls `begin_task`, then per step `loss` and `after_step`, then `end_task`; and between tasks, for the
    accuracies, `prepare_evaluation` and `scorer`. Of a method that needs no optimizer, and says so by `trains`,
    it calls `learn` instead.

    A class in a file of this folder is found by its `name`. One that also is a [`Routed`] is tried with selectors.

    Args:
        clip: the pretrained model.
        processor: of the CLIP.
        settings: of `settings_class`, or an object that has at least those.

    Attributes:
        model: what is trained, and saved.
        trains: whether it takes optimizer steps.
        shardable: whether a copy of its model can be trained in parts (FSDP2), all else that the method holds being whole.
        routes_stay: see `Routed`.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Settings]] = Settings
    trains: ClassVar[bool] = True
    shardable: ClassVar[bool] = True
    routes_stay: bool = False

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: Any):
        self.model: nn.Module = clip
        self.processor = processor
        own = self.settings_class
        self.settings = settings if isinstance(settings, own) else own.of(settings)
        clip.logit_scale.requires_grad_(False)

    @classmethod
    def check(cls, settings: Any, tasks: Sequence[Task]) -> None:
        """Raise an error if these tasks can't be learnt with these settings. Asked before anything trains."""

    @classmethod
    def content(cls, settings: Any) -> dict[str, str]:
        """Hash by name what else a run is shaped by, beside settings, data and model, such as files that they name."""
        return {}

    def begin_task(self, task: Task) -> None:
        """Get ready to train a task."""
        self.prompts = self.tokenize(task.prompts(task.templates[0]))

    def learn(self, task: Task) -> None:
        """Learn a task without the stream's optimizer steps; called, and nothing else of training, where `trains` is off."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer of the current task gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def learning_rate(self, lr: float) -> float:
        """Return the peak learning rate for a task where the stream suggests `lr`, which suits experts."""
        return lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups for the current task, of which some may learn at rates of their own."""
        return [{"params": self.trainable_parameters(), "lr": lr}]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the images' similarities to all class prompts of the task, encoded anew each step.

        Args:
            model: `self.model`, perhaps wrapped for parallel training; gradients must go through it.
            batch: on the model's device.
        """
        device = batch["pixel_values"].device
        prompts = {name: tensor.to(device) for name, tensor in self.prompts.items()}
        logits_BC = model(pixel_values=batch["pixel_values"], **prompts).logits_per_image
        return F.cross_entropy(logits_BC.float(), batch["labels"], label_smoothing=self.settings.label_smoothing)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after an optimizer step."""

    def end_task(self) -> None:
        """Act when a task's training is over."""

    def prepare_evaluation(self, task: Task) -> None:
        """Get ready to be tested on a task, learnt or not."""

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: B x P, of unit length."""
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def scorer(self, classes: LabelSpace, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return what scores `pixel_values` for classes, B x C, the likeliest highest; by default by cosines.

        The stream asks for it once per evaluation of a task.
        """
        classes_CP = self.encode_classes(classes.prompts, device)
        return lambda pixel_values: cosines(self.image_features(pixel_values), classes_CP)

    def encode_classes(self, prompts: Sequence[Sequence[str]], device: torch.device) -> Tensor:
        """Encode classes of any tasks by what encodes at the moment, each the mean over its prompts: C x P, unit length."""
        return class_features(self.model, self.processor.tokenizer, prompts, device=device)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize prompts, padded to the longest."""
        return tokenize(self.processor.tokenizer, prompts)

    def history(self) -> dict[str, Any]:
        """Tell what happened inside during the task just ended: values that JSON can hold, by name.

        They are kept per task in `Progress.history`, and a list of them, one per task, in `results.json`.
        """
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all that was learnt, as safetensors and JSON."""

    def save_so_far(self, folder: Path) -> None:
        """Write all that was learnt while there are tasks to come; `load` reads that too. By default, `save`.

        A method that knows what it will not change any more puts that into files of `folder / checkpoint.FINISHED`, and
        writes only those that are not there: the others have come from the checkpoint before.
        """
        self.save(folder)

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` or `save_so_far` wrote."""

    def change_processes(self, before: int, now: int) -> None:
        """Convert what was loaded, where it depends on how many processes trained until now, and will from now on."""
