"""The tuner: puts experts beside the targeted modules and acts on all of them at once."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.clip.modeling_clip import CLIPModel, CLIPOutput, CLIPTextModel

from peft_moe_merge.files import check_tensors
from peft_moe_merge.selection.base import Selector
from peft_moe_merge.selection.features import FeatureSource
from peft_moe_merge.tuners.moe_lora_merge.pool import STRATEGIES, Merge, choose_merge, favourites
from peft_moe_merge.tuners.moe_lora_merge.routing import selection_counts
from peft_moe_merge.tuners.moe_lora_merge.routing_losses import balance_loss, locality_loss

from .clip_forward import mixed_task_output
from .config import MoELoraMergeConfig, check_new_task, check_selector
from .context import CarryTasks, TaskIds, TaskState
from .layer import (
    EXPERT_TENSORS,
    MLP,
    NOT_MERGEABLE,
    Decisions,
    ExpertBank,
    Linear,
    MoELoraMergeLayer,
    RouterBank,
    gathered,
    is_sharded,
    overwrite,
    several_processes,
)

CLIP_MLP_BLOCKS = ["mlp"]


class MoELoraMergeModel(BaseTuner):
    """Mixture of LoRA experts with one router per task, expert merging and freezing (arXiv 2405.11530).

    Created by `get_peft_model(model, MoELoraMergeConfig(...))`; every method here works through the `PeftModel`. They
    act on the active adapter. Blocks are named by the targeted module, e.g. `"vision_model.encoder.layers.0.mlp"`.

    Calling the model accepts one more argument, `task_ids` (LongTensor of shape B): the task of each sample, by its
    index in `config.tasks`, or -1 for the model without experts. Without it, an attached selector chooses for each image
    outside of training (`attach_selector`); without that too, the current task (`set_task`) routes all.
    In a `CLIPModel` whose images have different tasks, each image is scored against the prompts as its own task encodes
    them, and `text_embeds` is B x N x P.
    """

    prefix = "moe_lora_"
    tuner_layer_cls = MoELoraMergeLayer
    target_module_mapping = {  # noqa: RUF012  (PEFT's interface)
        "clip": CLIP_MLP_BLOCKS,
        "clip_text_model": CLIP_MLP_BLOCKS,
        "clip_vision_model": CLIP_MLP_BLOCKS,
    }

    # ---------------------------------------------------------------------------------------------------- injection

    def _pre_injection_hook(self, model: nn.Module, config: MoELoraMergeConfig, adapter_name: str) -> None:
        self.tasks = TaskState()
        self._checkpointed = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]
        for module in model.modules():
            if isinstance(module, CLIPTextModel):
                self._hooks.append(module.register_forward_pre_hook(self._before_prompts, with_kwargs=True))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        adapters = {
            name
            for layer in model.modules()
            if isinstance(layer, BaseTunerLayer)
            for name in layer._get_available_adapters()
        }
        taken = {part for name, _ in model.named_modules() for part in name.split(".")} - adapters
        taken |= {*EXPERT_TENSORS, "weight", "noise_weight", "usage", "stopped", "frozen"}
        if adapter_name.isdigit() or adapter_name in taken:
            raise ValueError(
                f"An adapter can't be called {adapter_name!r}: that is also a part of the weights' names, by which PEFT "
                "tells adapters apart when it saves them. Choose another adapter name."
            )
        # The config grows with `add_task`: one of our own, in case the caller's serves a second model.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if config.selector is not None and config.task_selector is None:
            warnings.warn(
                f"The adapter {adapter_name!r} was saved with a task selector, which a configuration loaded by itself "
                "does not bring: `model.attach_selector(load_selector(folder))`, or load without `config`.",
                stacklevel=2,
            )
        self.tasks.current[adapter_name] = config.task_index(config.current_task)
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
            layer = Linear(target, self.tasks, reads_prompts)
        elif all(isinstance(getattr(target, name, None), nn.Linear) for name in ("fc1", "fc2")):
            layer = MLP(target, self.tasks, reads_prompts, norm=getattr(parent, "layer_norm2", None))
        else:
            raise TypeError(
                f"Target module {current_key!r} is a {type(target).__name__}. Experts can stand beside an `nn.Linear` "
                "or an MLP block (a module with linear layers `fc1` and `fc2`): correct `target_modules`."
            )
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

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.tasks.current.pop(adapter_name, None)

    def unload(self) -> nn.Module:
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers().values():
            if isinstance(layer, MLP):
                layer.unhook()
        for layer in self._checkpointed:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(function, CarryTasks):
                layer._gradient_checkpointing_func = function.checkpoint
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGEABLE)

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

    def _adapted(self) -> dict[str, MoELoraMergeLayer]:
        adapter_name = self._adapter
        return {name: layer for name, layer in self._layers().items() if adapter_name in layer.moe_lora_experts}

    def _experts(self) -> dict[str, ExpertBank]:
        return {name: layer.moe_lora_experts[self._adapter] for name, layer in self._adapted().items()}

    def _routers(self) -> dict[str, RouterBank]:
        return {name: layer.moe_lora_routers[self._adapter] for name, layer in self._adapted().items()}

    def expert_parameters(self, block: str, expert: int) -> dict[str, Tensor]:
        """Return one expert's tensors, as views without gradient; as copies where they are sharded, then all must call.

        Returns:
            `down_weight` D x r, `down_bias` r, `up_weight` r x D, `up_bias` D.

        Raises:
            KeyError: there is no such block.
            IndexError: the block has no such expert.
        """
        experts = self._of_block(self._experts(), block)
        if not 0 <= expert < len(experts.frozen):
            raise IndexError(f"No expert {expert} in {block!r}: it has experts 0 to {len(experts.frozen) - 1}.")
        tensors = experts.expert(expert)
        return {**tensors, "down_weight": tensors["down_weight"].T}

    def router_parameters(self, block: str, task: str) -> dict[str, Tensor]:
        """Return a task's router in one block, as views without gradient: `weight` and `noise_weight`, both D x E.

        Raises:
            KeyError: there is no such block.
            ValueError: there is no such task.
        """
        routers = self._of_block(self._routers(), block)
        index = self.peft_config[self._adapter].task_index(task)
        return {"weight": gathered(routers.weight[index]), "noise_weight": gathered(routers.noise_weight[index])}

    @staticmethod
    def _of_block(banks: dict[str, Any], block: str) -> Any:
        if block not in banks:
            raise KeyError(f"No adapted block {block!r}. Blocks: {list(banks)}.")
        return banks[block]

    # ------------------------------------------------------------------------------------------------------- tasks

    def set_task(self, task: str | None) -> None:
        """Route all samples by this task, and train its routers and no other's. None: the model without experts.

        Raises:
            ValueError: there is no such task.
        """
        adapter_name = self._adapter
        config = self.peft_config[adapter_name]
        self.tasks.current[adapter_name] = None if task is None else config.task_index(task)
        config.current_task = config.current_task if task is None else task
        self._train_what_may_train()

    def _train_what_may_train(self) -> None:
        for layer in self._adapted().values():
            layer._apply_requires_grad()
            layer.forget_gradients(self._adapter)

    def add_task(self, task: str) -> None:
        """Give a further task its routers. It does not become the current task; `set_task` does that.

        An optimizer made before does not know the new parameters: make one per task, as the paper does.

        Raises:
            ValueError: the name is taken or empty.
            RuntimeError: the model is sharded.
        """
        config = self.peft_config[self._adapter]
        check_new_task(task, config.tasks)
        for routers in self._routers().values():
            routers.add_task()
        config.tasks = [*config.tasks, task]
        self._train_what_may_train()

    # ---------------------------------------------------------------------------------------------- choosing the task

    def attach_selector(self, selector: Selector | None) -> None:
        """Let a selector choose each image's task from now on; None takes it away again.

        It chooses outside of training, in calls with images and without `task_ids`. It comes before the current task:
        `set_task` then matters for training and for text alone. The adapter is saved and loaded with its selector.

        Raises:
            ValueError: the selector and the adapter have different tasks.
        """
        config = self.peft_config[self._adapter]
        if selector is not None:
            check_selector(selector, config.tasks)
        config.task_selector = selector

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
        check_selector(selector, self.peft_config[self._adapter].tasks)
        return selector.select(self.frozen_features(selector.source, pixel_values, interpolate_pos_encoding))

    @torch.no_grad()
    def frozen_features(
        self, source: FeatureSource, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Compute a selector's features B x F of images, by the model without experts."""
        with self.tasks.during(ids=None, current=dict.fromkeys(self.tasks.current)):
            return source(self.model, pixel_values, interpolate_pos_encoding)

    def _chosen(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        if self.training or self.task_selector is None or not self._enabled():
            return None
        inputs = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
        pixels = inputs.get("pixel_values")
        further = {**inputs, **inputs.get("kwargs", {})}
        return None if pixels is None else self.select_tasks(pixels, further.get("interpolate_pos_encoding", False))[0]

    # -------------------------------------------------------------------------------- counting, merging, freezing

    @property
    def _task(self) -> int:
        config = self.peft_config[self._adapter]
        return config.task_index(config.current_task)

    def expert_usage(self) -> dict[str, Tensor]:
        """Tell how often the current task selected each expert in training, since it began.

        With several processes the counts are summed over all of them, and all of them must call.

        Returns:
            Per block, int64 of shape E.
        """
        self.share_expert_usage()
        return {name: routers.usage[self._task].clone() for name, routers in self._routers().items()}

    def share_expert_usage(self) -> None:
        """Add what every process has counted since the last time to the usage they agree on. All must call."""
        banks = list(self._routers().values())
        device = banks[0].usage.device
        counts_NTE = torch.stack([routers.take_unshared_usage().to(device) for routers in banks])
        if several_processes():
            dist.all_reduce(counts_NTE)
        for routers, counts_TE in zip(banks, counts_NTE, strict=True):
            routers.usage += counts_TE.to(routers.usage.device)

    def forget_unshared_usage(self) -> None:
        """Drop what this process has counted since counts were last shared: a step that was not taken."""
        for routers in self._routers().values():
            routers.take_unshared_usage()

    def reset_expert_usage(self) -> None:
        """Start counting the current task's selections at zero."""
        for routers in self._routers().values():
            routers.unshared_usage[self._task] = 0
            routers.usage[self._task] = 0

    @torch.no_grad()
    def merge_experts(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Merge]:
        """In every block, overwrite the least used trainable expert by the union of the two most used.

        With several processes all of them must call; they decide alike.

        Args:
            optimizer: forgets its state of the overwritten experts, so that they start without momentum.

        Returns:
            Per block that had something to merge, which expert became the union of which two.
        """
        self.share_expert_usage()
        config = self.peft_config[self._adapter]
        merges = {}
        for name, layer in self._adapted().items():
            experts, routers = layer.moe_lora_experts[self._adapter], layer.moe_lora_routers[self._adapter]
            merge = choose_merge(routers.usage[self._task], experts.frozen, experts.expert, config.merge_pair)
            if merge is None:
                continue
            union = STRATEGIES[config.merge_strategy](experts.expert(merge.first), experts.expert(merge.second))
            for tensor in EXPERT_TENSORS:
                parameter = getattr(experts, tensor)[merge.target]
                overwrite(parameter, union[tensor])
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
            if config.merge_router_columns == "mean":
                for parameter in (routers.weight[self._task], routers.noise_weight[self._task]):
                    weight_DE = gathered(parameter)
                    weight_DE[:, merge.target] = weight_DE[:, [merge.first, merge.second]].mean(dim=1)
                    overwrite(parameter, weight_DE)
            merges[name] = merge
        return merges

    def freeze_experts(self, top_k: int) -> dict[str, list[int]]:
        """In every block, freeze the `top_k` experts that the current task selected most, for good.

        With several processes all of them must call.

        Returns:
            Per block, the experts frozen by this call that were not frozen before.

        Raises:
            ValueError: `top_k` is negative.
        """
        if top_k < 0:
            raise ValueError(f"`top_k` must not be negative, got {top_k}.")
        self.share_expert_usage()
        newly_frozen = {}
        for name, layer in self._adapted().items():
            frozen_E = layer.moe_lora_experts[self._adapter].frozen
            usage_E = layer.moe_lora_routers[self._adapter].usage[self._task]
            newly_frozen[name] = [expert for expert in favourites(usage_E, top_k) if not frozen_E[expert]]
            frozen_E[newly_frozen[name]] = True
        self._train_what_may_train()
        return newly_frozen

    def frozen_experts(self) -> dict[str, list[int]]:
        """List, per block, the frozen experts in ascending order."""
        return {name: experts.frozen.nonzero().flatten().tolist() for name, experts in self._experts().items()}

    # ------------------------------------------------------------------------------------------- losses on the router

    def auxiliary_loss(self) -> Tensor:
        """Return the weighted losses on the routers of the latest training forward pass, a mean over blocks and tasks.

        Add it to the loss when `router_balance_loss` or `router_locality_loss` is set; it is 0 when neither is.

        Raises:
            RuntimeError: no router has decided anything since: there was no forward pass in training mode, or it ran
                without experts.
        """
        config = self.peft_config[self._adapter]
        losses = []
        for layer in self._adapted().values():
            experts, routers = layer.moe_lora_experts[self._adapter], layer.moe_lora_routers[self._adapter]
            for decisions in routers.decisions:
                gates_GE, indices_GK = decisions.probabilities_GE, decisions.indices_GK
                loss = gates_GE.new_zeros(())
                if config.router_balance_loss:
                    # this batch's load, as in Switch: the task's so far lags behind, and the router swings about it
                    counts_E = selection_counts(indices_GK, gates_GE.shape[1])
                    loss = loss + config.router_balance_loss * balance_loss(gates_GE, counts_E)
                if config.router_locality_loss:
                    selected_GE = torch.zeros_like(gates_GE).scatter_(1, indices_GK, 1.0)
                    moved_E = experts.movement(indices_GK.unique().tolist()).to(gates_GE.device)
                    loss = loss + config.router_locality_loss * locality_loss(gates_GE * selected_GE, moved_E)
                losses.append(loss)
        if losses:
            return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
        if config.has_router_losses:
            raise RuntimeError(
                "There are no routing decisions to compute a loss from. Call `auxiliary_loss()` after a forward pass in "
                "training mode, with a task set."
            )
        return torch.zeros(())

    def set_landmark(self) -> None:
        """Measure from now on how far experts move, for `router_locality_loss`. Costs a copy of all experts."""
        if self.peft_config[self._adapter].router_locality_loss:
            for experts in self._experts().values():
                experts.set_landmark()

    def keep_routing_decisions(self, keep: bool) -> None:
        """Keep each block's decisions in training for `routing_decisions`; losses that need them keep them anyway."""
        needed = self.peft_config[self._adapter].has_router_losses
        for routers in self._routers().values():
            routers.keep_decisions = keep or needed

    def routing_decisions(self) -> dict[str, Decisions]:
        """Return, per block, what the current task's router decided in the latest training forward pass, if kept."""
        return {
            name: decisions
            for name, routers in self._routers().items()
            for decisions in routers.decisions
            if decisions.task == self._task
        }

    def stop_routers(self, blocks: list[str] | None = None) -> None:
        """Train the current task's router no more, in the named blocks or in all; experts go on."""
        routers = self._routers()
        for name in routers if blocks is None else blocks:
            self._of_block(routers, name).stopped[self._task] = True
        self._train_what_may_train()

    def agreed(self, answers: list[bool]) -> list[bool]:
        """Tell, question by question, whether all processes say yes. With several processes all of them must call."""
        if not several_processes():
            return answers
        device = next(iter(self._routers().values())).usage.device
        yes = torch.tensor(answers, dtype=torch.int64, device=device)
        dist.all_reduce(yes, op=dist.ReduceOp.MIN)
        return yes.bool().tolist()

    def stopped_routers(self) -> list[str]:
        """List the blocks whose current router trains no more."""
        return [name for name, routers in self._routers().items() if routers.stopped[self._task]]

    # ---------------------------------------------------------------------------------------------------- deployment

    def bake_task(self, task: str) -> PeftModel:
        """Make a slim model for one task: its router, and only the experts that it can still choose.

        An expert whose router column is zero, since training never selected it, always scores zero; between equal scores
        the lower index wins, so only the first `top_k` of these can ever be chosen and the others go. The outputs stay
        the same. All blocks keep the same number of experts, that of the block which needs the most.

        Returns:
            A `PeftModel` of its own, in inference mode, with its own copy of the base model and an adapter "default";
            save it by `save_pretrained`.

        Raises:
            ValueError: there is no such task.
        """
        adapter_name = self._adapter
        config = self.peft_config[adapter_name]
        index = config.task_index(task)
        routers, banks = self._routers(), self._experts()
        kept = {
            name: choosable_experts(router.weight[index].detach(), config.top_k) for name, router in routers.items()
        }
        num_experts = max(len(experts) for experts in kept.values())
        for experts in kept.values():
            others = [expert for expert in range(config.num_experts) if expert not in experts]
            experts[:] = sorted(experts + others[: num_experts - len(experts)])

        baked_config = copy.deepcopy(config)
        baked_config.tasks, baked_config.current_task, baked_config.num_experts = [task], task, num_experts
        baked_config.inference_mode = True
        baked_config.task_selector = baked_config.selector = None  # there is nothing left to choose
        baked = get_peft_model(copy.deepcopy(self).unload(), baked_config, autocast_adapter_dtype=False).eval()
        with torch.no_grad():
            for name, layer in baked.base_model._adapted().items():
                bank = layer.moe_lora_experts["default"].to(banks[name].dtype)
                router = layer.moe_lora_routers["default"].to(routers[name].weight[index].dtype)
                for tensor in EXPERT_TENSORS:
                    for parameter, expert in zip(getattr(bank, tensor), kept[name], strict=True):
                        parameter.copy_(getattr(banks[name], tensor)[expert])
                router.usage.copy_(routers[name].usage[index, kept[name]])
                bank.frozen.copy_(banks[name].frozen[kept[name]])
                router.weight[0].copy_(routers[name].weight[index][:, kept[name]])
                router.noise_weight[0].copy_(routers[name].noise_weight[index][:, kept[name]])
            for name, module in self.model.named_modules():
                if isinstance(module, ModulesToSaveWrapper):
                    saved = baked.base_model.model.get_submodule(name).modules_to_save["default"]
                    saved.load_state_dict(module.modules_to_save[adapter_name].state_dict())
        return baked

    # ------------------------------------------------------------------------------------------------------ forward

    def get_image_features(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the base model's method of this name; `task_ids` as in a call of the model, one per image."""
        if task_ids is None:
            task_ids = self._chosen(self.model.get_image_features, args, kwargs)
        with self._routed(task_ids):
            return self.model.get_image_features(*args, **kwargs)

    def get_text_features(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Call the base model's method of this name; `task_ids` as in a call of the model, one per prompt."""
        with self._routed(task_ids):
            return self.model.get_text_features(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the base model's, or None for a `CLIPModel`, which has two and raises; Accelerate asks when it shards."""
        try:
            return self.model.get_input_embeddings()
        except NotImplementedError:
            return None

    @contextmanager
    def _routed(self, task_ids: Tensor | None) -> Iterator[None]:
        self._checkpoint_with_tasks()
        with self.tasks.during(ids=self._check_task_ids(task_ids)):
            yield

    def _check_task_ids(self, task_ids: Tensor | None) -> TaskIds | None:
        return None if task_ids is None else TaskIds.check(task_ids, self.peft_config[self._adapter].tasks)

    def _checkpoint_with_tasks(self) -> None:
        if not self.training:
            return
        for layer in self._checkpointed:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if layer.gradient_checkpointing and not isinstance(function, CarryTasks):
                layer._gradient_checkpointing_func = CarryTasks(function, self.tasks)

    def _notice_sharding(self) -> None:
        # A block's parameters are whole while the block runs; whether they are sharded shows before.
        if self.training and several_processes():
            for layer in self._layers().values():
                for experts in layer.moe_lora_experts.values():
                    experts.sharded = is_sharded(experts.down_weight[0])

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = dict(kwargs)
        task_ids = kwargs.pop("task_ids", None)
        if task_ids is None:
            task_ids = self._chosen(model.forward, args, kwargs)
        ids = self._check_task_ids(task_ids)
        self._checkpoint_with_tasks()
        self._notice_sharding()
        self.tasks.ids, self.tasks.prompt_ids = ids, None
        if ids is None or not isinstance(model, CLIPModel):
            return args, kwargs
        inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        images, prompts = inputs.get("pixel_values"), inputs.get("input_ids")
        if images is not None and images.shape[0] != ids.size:
            raise ValueError(f"`task_ids` has {ids.size} entries for {images.shape[0]} images: pass one per image.")
        if images is not None and prompts is not None:
            self.tasks.prompt_ids = ids.all_of(slot=0, size=prompts.shape[0])
        return args, kwargs

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        ids, prompt_ids = self.tasks.ids, self.tasks.prompt_ids
        self.tasks.ids = self.tasks.prompt_ids = None
        if output is None or ids is None or prompt_ids is None or len(ids.present) == 1 or not self._enabled():
            return None
        inputs = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments

        def encode(slot: int) -> Tensor:
            with self.tasks.during(ids=ids.all_of(slot, prompt_ids.size)):
                names = ("input_ids", "attention_mask", "position_ids")
                return model.get_text_features(**{name: inputs.get(name) for name in names}).pooler_output

        return_loss = bool(inputs.get("return_loss"))
        as_tuple = isinstance(output, tuple)
        if as_tuple:
            output = CLIPOutput(*output) if return_loss else CLIPOutput(None, *output)
        further = [lambda slot=slot: encode(slot) for slot in range(1, len(ids.present))]
        output = mixed_task_output(model, output, ids.slot_B, further, return_loss)
        return output.to_tuple() if as_tuple else output

    def _enabled(self) -> bool:
        return not any(layer.disable_adapters for layer in self._layers().values())

    def _before_prompts(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        self.tasks.prompts_start_alike = False
        call = inspect.signature(model.forward).bind_partial(*args, **kwargs)
        tokens_NL, mask_NL = call.arguments.get("input_ids"), call.arguments.get("attention_mask")
        if tokens_NL is None or call.arguments.get("position_ids") is not None:
            return None
        width = tokens_NL.shape[-1]
        rows_NL = tokens_NL.reshape(-1, width)
        alike = (rows_NL[:, 0] == rows_NL[0, 0]).all()
        if mask_NL is not None:
            alike &= mask_NL[..., 0].all()
        # one wait for the device per forward pass, for both
        alike, longest = torch.stack([alike, pooled_position(rows_NL, model.eos_token_id).max() + 1]).tolist()
        self.tasks.prompts_start_alike = bool(alike)
        if longest == width or not self._only_pools_prompts(model, len(rows_NL), call.arguments.get("kwargs", {})):
            return None
        call.arguments["input_ids"] = tokens_NL[..., :longest]
        if mask_NL is not None:
            call.arguments["attention_mask"] = mask_NL[..., :longest]
        return call.args, call.kwargs

    def _only_pools_prompts(self, model: nn.Module, prompts: int, options: dict[str, Any]) -> bool:
        """Tell whether nobody can miss the tokens behind the pooled one, which no earlier token sees.

        So it is where experts act on the prompts of a whole CLIP, whose features come from the pooled tokens alone, and
        nobody asked for hidden states. Without experts the prompts stay as they are, and CLIP's features too, bit for bit.
        """
        wanted = ("output_hidden_states", "output_attentions")
        if any(options.get(name) or getattr(model.config, name, False) for name in wanted):
            return False
        routed = (self.tasks.routed(name, prompts, prompts=True) for name in self.active_adapters)
        return isinstance(self.model, CLIPModel) and self._enabled() and any(routed)

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
        containers = (*MoELoraMergeLayer.adapter_layer_names, "modules_to_save")
        own = {
            key: tensor
            for key, tensor in model.state_dict().items()
            if any(f".{container}.{adapter_name}." in key for container in containers)
        }
        check_tensors(
            state_dict,
            own,
            f"the adapter {adapter_name!r} ({config.num_experts} experts of rank {config.r}, tasks {config.tasks})",
        )
        return state_dict


def pooled_position(tokens_NL: Tensor, eos_token_id: int) -> Tensor:
    """Find the token that CLIP's text tower pools: each row's first end token, or, as older files say, its largest."""
    if eos_token_id == 2:
        return tokens_NL.argmax(dim=-1)
    return (tokens_NL == eos_token_id).int().argmax(dim=-1)


def choosable_experts(weight_DE: Tensor, top_k: int) -> list[int]:
    """List the experts that a router can choose for some input: all but the zero columns after the first `top_k`."""
    zero = [expert for expert, learnt in enumerate(weight_DE.any(dim=0).tolist()) if not learnt]
    return [expert for expert in range(weight_DE.shape[1]) if expert not in zero[top_k:]]
