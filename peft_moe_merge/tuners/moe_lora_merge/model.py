"""The tuner: puts experts beside the targeted modules and acts on all of them at once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPModel, CLIPTextModel

from peft_moe_merge.selection.base import Selector

from . import bake
from .clip_forward import RoutedCLIP, RoutedPrompts, make_clips_routable
from .config import NO_TASK, MoELoraMergeConfig, check_new_task, check_selector
from .context import Adapters, recorded_gates
from .distributed import gathered
from .expert_pool import ExpertPool
from .experts import EXPERT_TENSORS, ExpertBank
from .layer import MLP, NOT_MERGEABLE, Linear, MoELoraMergeLayer
from .optimizer import watch_optimizers
from .routed import RoutedBlock, RoutedModel, clear_leftovers, make_routable, restore_classes
from .router_training import RouterTraining
from .routers import RouterBank
from .weights import check_weights, counted_by_column

CLIP_MLP_BLOCKS = ["mlp"]


class MoELoraMergeModel(ExpertPool, RouterTraining, BaseTuner):
    """Mixture of LoRA experts with one router per task, expert merging and freezing (arXiv 2405.11530).

    Created by `get_peft_model(model, MoELoraMergeConfig(...))`; every method here works through the `PeftModel`. They
    act on the active adapter. Blocks are named by the targeted module, e.g. `"vision_model.encoder.layers.0.mlp"`.

    Calling the model accepts one more argument, `task_ids` (LongTensor of shape B): the task of each sample, by its
    index in `config.tasks`, or -1 for the model without experts. Without it, an attached selector chooses for each image
    outside of training (`attach_selector`); without that too, the current task (`set_task`) routes all.
    In a `CLIPModel` ids are the images'; each image is scored against the prompts as its own task encodes them, and
    `text_embeds` is B x N x P. In other models every adapted module must see one row per id.
    """

    prefix = "moe_lora_"
    tuner_layer_cls = MoELoraMergeLayer
    target_module_mapping = {  # noqa: RUF012  (PEFT's interface)
        "clip": CLIP_MLP_BLOCKS,
        "clip_text_model": CLIP_MLP_BLOCKS,
        "clip_vision_model": CLIP_MLP_BLOCKS,
    }

    # ---------------------------------------------------------------------------------------------------- injection

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        # before PEFT enters the new configuration in the dictionary that an earlier tuner on this model goes by
        if not clear_leftovers(model):
            raise ValueError(
                "This model has experts already, of an earlier `get_peft_model` or `from_pretrained` that is still in use. "
                "Add to those by `add_adapter(name, config)` or `load_adapter(folder, name)`, take them away by `unload()`, "
                "or load the base model anew."
            )
        super().__init__(model, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: MoELoraMergeConfig, adapter_name: str) -> None:
        self.adapters = Adapters(self.peft_config, self)
        parts = {CLIPModel: (RoutedModel, RoutedCLIP), CLIPTextModel: (RoutedModel, RoutedPrompts)}
        kind = next((kind for kind in parts if isinstance(model, kind)), None)
        make_clips_routable(model, self.adapters)
        for module in list(model.modules()):
            if isinstance(module, GradientCheckpointingLayer):
                make_routable(module, self.adapters, RoutedBlock)
        make_routable(model, self.adapters, *parts.get(kind, (RoutedModel,)))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        adapters = {
            name
            for layer in model.modules()
            if isinstance(layer, BaseTunerLayer)
            for name in layer._get_available_adapters()
        }
        taken = {part for name, _ in model.named_modules() for part in name.split(".")} - adapters
        taken |= {*EXPERT_TENSORS, "weight", "noise_weight", "columns", "usage", "stopped", "frozen"}
        if adapter_name.isdigit() or adapter_name in taken:
            raise ValueError(
                f"An adapter can't be called {adapter_name!r}: that is also a part of the weights' names, by which PEFT "
                "tells adapters apart when it saves them. Choose another adapter name."
            )
        config = self.peft_config[adapter_name]
        if config.selector is not None and config.task_selector is None:
            warnings.warn(
                f"The adapter {adapter_name!r} was saved with a task selector, which a configuration loaded by itself "
                "does not bring: `model.attach_selector(load_selector(folder))`, or load without `config`.",
                stacklevel=2,
            )
        trainable = {
            name: layer.moe_lora_trainable.copy()
            for name, layer in model.named_modules()
            if isinstance(layer, MoELoraMergeLayer)
        }
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT gives the parameters that were there before their `requires_grad` back; what it stems from comes too.
        for name, layer in model.named_modules():
            if name in trainable:
                layer.moe_lora_trainable.update(trainable[name])

    def _create_and_replace(
        self,
        peft_config: MoELoraMergeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, MoELoraMergeLayer):
            target.update_layer(adapter_name, peft_config)
            return
        reads_prompts = self._in_text_tower(current_key)
        if isinstance(target, nn.Linear):
            layer = Linear(target, self.adapters, current_key, reads_prompts)
        elif all(isinstance(getattr(target, name, None), nn.Linear) for name in ("fc1", "fc2")):
            norm = getattr(parent, "layer_norm2", None)
            layer = MLP(target, self.adapters, current_key, reads_prompts, norm)
        else:
            raise TypeError(
                f"Target module {current_key!r} is a {type(target).__name__}. Experts can stand beside an `nn.Linear` "
                "or an MLP block (a module with linear layers `fc1` and `fc2`): correct `target_modules`."
            )
        layer.train(target.training)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MLP):  # being unloaded; PEFT would look for a weight, which an MLP block has none of
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _in_text_tower(self, module_name: str) -> bool:
        parts = module_name.split(".")
        ancestors = (self.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
        return any(isinstance(ancestor, CLIPTextModel) for ancestor in ancestors)

    def unload(self) -> nn.Module:
        for layer in self._layers().values():
            if isinstance(layer, MLP):
                layer.unhook()
        restore_classes(self.model)
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the base model's, or None for a `CLIPModel`, which has two and raises; Accelerate asks when it shards."""
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError:
            return None

    # ------------------------------------------------------------------------------------------------------ blocks

    def _layers(self) -> dict[str, MoELoraMergeLayer]:
        return {name: module for name, module in self.model.named_modules() if isinstance(module, MoELoraMergeLayer)}

    @property
    def _adapter(self) -> str:
        if len(self.active_adapters) != 1:
            raise ValueError(
                f"Tasks and experts belong to one adapter, but {self.active_adapters or 'none'} are active: choose one "
                "by `model.set_adapter(name)`."
            )
        return self.active_adapters[0]

    @property
    def _config(self) -> MoELoraMergeConfig:
        return self.peft_config[self._adapter]

    def _change_config(self, **values: Any) -> None:
        """Replace the active adapter's configuration by one that differs: the old one may serve another model."""
        config = copy.copy(self._config)
        for name, value in values.items():
            setattr(config, name, value)
        self.peft_config[self._adapter] = config

    def adapted_layers(self) -> dict[str, MoELoraMergeLayer]:
        """Return the modules with experts of the active adapter."""
        adapter_name = self._adapter
        return {name: layer for name, layer in self._layers().items() if adapter_name in layer.moe_lora_experts}

    def expert_banks(self) -> dict[str, ExpertBank]:
        """Return each block's experts."""
        return {name: layer.moe_lora_experts[self._adapter] for name, layer in self.adapted_layers().items()}

    def router_banks(self) -> dict[str, RouterBank]:
        """Return each block's routers."""
        return {name: layer.moe_lora_routers[self._adapter] for name, layer in self.adapted_layers().items()}

    def expert_parameters(self, block: str, expert: int) -> dict[str, Tensor]:
        """Return one expert's tensors, as views without gradient; as copies where they are sharded, then all must call.

        Returns:
            `down_weight` D x r, `down_bias` r, `up_weight` r x D, `up_bias` D; a linear expert has no biases.

        Raises:
            KeyError: there is no such block.
            IndexError: the block has no such expert.
        """
        experts = self._of_block(self.expert_banks(), block)
        if not 0 <= expert < len(experts):
            raise IndexError(f"No expert {expert} in {block!r}: it has experts 0 to {len(experts) - 1}.")
        tensors = experts.expert(expert)
        return {**tensors, "down_weight": tensors["down_weight"].T}

    def router_parameters(self, block: str, task: str) -> dict[str, Tensor]:
        """Return a task's router in one block, as views without gradient.

        Returns:
            `weight` and, where routing has noise, `noise_weight`, both D x the number of experts that the task knows.

        Raises:
            KeyError: there is no such block.
            ValueError: there is no such task.
        """
        routers, index = self._of_block(self.router_banks(), block), self._config.task_index(task)
        names = ("weight", "noise_weight")
        return dict(zip(names, map(gathered, routers.parameters_of(index)), strict=False))

    def experts_of_task(self, task: str) -> dict[str, list[int]]:
        """List, per block, the experts that a task's routers know, column by column.

        Raises:
            ValueError: there is no such task.
        """
        index = self._config.task_index(task)
        return {name: list(routers.experts_of(index)) for name, routers in self.router_banks().items()}

    @staticmethod
    def _of_block(banks: dict[str, Any], block: str) -> Any:
        if block not in banks:
            raise KeyError(f"No adapted block {block!r}. Blocks: {list(banks)}.")
        return banks[block]

    # ------------------------------------------------------------------------------------------------------- tasks

    @property
    def current_task(self) -> str | None:
        """The task that routes and trains; None for none."""
        return self._config.current_task if self._config.current_task != NO_TASK else None

    def _task_index(self, task: str | None) -> int:
        """Return the position of a task, by default the current one."""
        task = self.current_task if task is None else task
        if task is None:
            raise ValueError("No task is set: choose one by `model.set_task(name)`, or name it here.")
        return self._config.task_index(task)

    def set_task(self, task: str | None) -> None:
        """Route all samples by this task, and train its routers and no other's. None: the model without experts.

        Raises:
            ValueError: there is no such task.
        """
        changed = {self._config.current_index, None if task is None else self._config.task_index(task)}
        self._change_config(current_task=NO_TASK if task is None else task)
        self._train_what_may_train(changed - {None})

    def _train_what_may_train(self, tasks: Collection[int] | None = None) -> None:
        """Switch gradients on and off for some tasks, by default all, as `MoELoraMergeLayer.train_what_may_train` does."""
        for layer in self.adapted_layers().values():
            layer.train_what_may_train(self._adapter, tasks)
        if self.training:
            watch_optimizers(self)

    def add_task(self, task: str) -> None:
        """Give a further task its routers and, where they are reserved, its experts.

        It does not become the current task; `set_task` does that. An optimizer made before does not know the new
        parameters: make one per task, as the paper does.

        Raises:
            ValueError: the name is taken or empty; the pool is full.
            RuntimeError: the model is sharded.
        """
        check_new_task(task, self._config.tasks)
        widths = self._config.router_widths
        allotted, made_room = self._allot_experts(task)
        for name, routers in self.router_banks().items():
            routers.add_task(allotted[name])
        changed: dict[str, Any] = {"tasks": [*self._config.tasks, task]}
        if self._config.stores_columns:
            routers = next(iter(self.router_banks().values()))
            if widths is None:
                widths = [len(routers.experts_of(index)) for index in range(len(self._config.tasks))]
            changed["router_widths"] = [*widths, len(next(iter(allotted.values())))]
            changed["pool_size"] = routers.num_experts if self._config.num_experts == "grow" else None
        self._change_config(**changed)
        index = self._config.task_index(task)
        if self._config.expert_start == "merged":
            self._start_from(index)
        self._train_what_may_train(None if made_room else [index])

    # ---------------------------------------------------------------------------------------------- choosing the task

    def attach_selector(self, selector: Selector | None) -> None:
        """Let a selector choose each image's task from now on; None takes it away again.

        It chooses outside of training, in calls with images and without `task_ids`. It comes before the current task:
        `set_task` then matters for training and for text alone. The adapter is saved and loaded with its selector.

        Raises:
            ValueError: the selector and the adapter have different tasks.
        """
        if selector is not None:
            check_selector(selector, self._config.tasks)
        self._change_config(task_selector=selector)

    @property
    def task_selector(self) -> Selector | None:
        """The selector attached to the active adapter."""
        selectors = [self.peft_config[name].task_selector for name in self.active_adapters]
        return selectors[0] if len(selectors) == 1 else None

    def select_tasks(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> tuple[Tensor, Tensor]:
        """Choose a task for each image as a call of the model would.

        Returns:
            task_ids LongTensor[B], -1 for the model without experts, and scores FloatTensor[B, T].

        Raises:
            RuntimeError: no selector is attached.
            ValueError: a task was added that the selector does not know yet.
        """
        selector = self.task_selector
        if selector is None:
            raise RuntimeError("No selector is attached to the active adapter: `model.attach_selector(selector)`.")
        check_selector(selector, self._config.tasks)
        return selector.select(self.frozen_features(selector.source, pixel_values, interpolate_pos_encoding))

    def route(self, task_ids: Tensor | None) -> AbstractContextManager[None]:
        """Route calls of the model's parts inside a `with` block, each row by its entry of `task_ids`.

        For who calls blocks or towers by themselves; a call of the model takes `task_ids` as an argument.
        """
        return self.model.route(task_ids)

    def recorded_gates(self) -> AbstractContextManager[dict[str, list[Tensor]]]:
        """Show which experts took part in calls inside a `with` block, and with what weights.

            with model.recorded_gates() as gates:
                model.get_image_features(pixels, task_ids=ids)
            gates["vision_model.encoder.layers.0.mlp"][0]  # FloatTensor[B, E]

        Returns:
            A context manager of a dictionary: per block, one `FloatTensor[B, E]` for each of its passes, E the experts of
            the block; 0 where an expert took no part, and in rows that are routed by no task. Where tokens decide for
            themselves, each token is a row. A pass without any routed row leaves nothing. Only calls of this thread are
            recorded, and nothing is kept on the model.
        """
        return recorded_gates(self.adapters)

    # ---------------------------------------------------------------------------------------------------- deployment

    def bake_task(self, task: str) -> PeftModel:
        """Make a slim model for one task, see `bake.bake_task`."""
        return bake.bake_task(self, task)

    def export_lora(self, task: str) -> PeftModel:
        """Make an ordinary LoRA of one task, see `bake.export_lora`."""
        return bake.export_lora(self, task)

    # ------------------------------------------------------------------------------------------------ saving, loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in MoELoraMergeLayer.adapter_layer_names:
            before, found, after = key.rpartition(f".{container}.{adapter_name}.")
            if found:
                return f"{before}.{container}.{after}"
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: MoELoraMergeConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if config.task_experts == "reserved":
            state_dict = counted_by_column(state_dict)
        check_weights(model, config, adapter_name, state_dict)
        return state_dict
