"""The adapted modules and the two banks that hold their state.

Shapes: B samples, L tokens, D input width, O output width, R bottleneck rank, E experts, K top_k, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_moe_merge.tuners.moe_lora_merge.mixture import Selection, mixture, token_mixture
from peft_moe_merge.tuners.moe_lora_merge.pool import Expert
from peft_moe_merge.tuners.moe_lora_merge.routing import router_logits, selection_counts, top_k_gates
from peft_moe_merge.tuners.moe_lora_merge.routing_losses import displacement

from .config import MoELoraMergeConfig
from .context import Routed, TaskState

EXPERT_TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")


class ExpertBank(nn.Module):
    """One block's experts, shared by all tasks, and which of them are frozen.

    Every expert has parameters of its own. So an expert that nobody selected has no gradient, and any optimizer leaves
    it alone and keeps no state for it; a frozen one is simply a parameter that requires none.

    Attributes:
        down_weight, down_bias, up_weight, up_bias: per expert R x D, R, R x O, O (unit by unit, see `experts`).
        frozen: bool E.
        landmark: copies of all experts from which their movement is measured, where a loss asks for it.
        sharded: every process holds a part of each expert (FSDP).
    """

    def __init__(self, config: MoELoraMergeConfig, in_features: int, out_features: int):
        super().__init__()
        shapes = ((config.r, in_features), (config.r,), (config.r, out_features), (out_features,))
        for name, shape in zip(EXPERT_TENSORS, shapes, strict=True):
            experts = nn.ParameterList(nn.Parameter(torch.empty(shape)) for _ in range(config.num_experts))
            self.add_module(name, experts)
        self.register_buffer("frozen", torch.zeros(config.num_experts, dtype=torch.bool))
        self.landmark: list[Expert] | None = None
        self.sharded = False
        self.mixture = token_mixture if config.routing == "token" else mixture

    def reset_parameters(self, init_weights: bool) -> None:
        for down, down_bias, up, up_bias in zip(*(getattr(self, name) for name in EXPERT_TENSORS), strict=True):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            nn.init.zeros_(down_bias)
            if init_weights:
                nn.init.zeros_(up)
            else:
                nn.init.kaiming_uniform_(up.T, a=math.sqrt(5))
            nn.init.zeros_(up_bias)

    def expert(self, index: int) -> Expert:
        """Return one expert's tensors, without gradient, sharing their memory unless they are sharded."""
        return {name: gathered(getattr(self, name)[index]) for name in EXPERT_TENSORS}

    def set_landmark(self) -> None:
        """Measure movement from here.

        Raises:
            ValueError: the experts are sharded.
        """
        if is_sharded(self.down_weight[0]):
            raise ValueError(
                "`router_locality_loss` needs whole experts in every process, but these are sharded (FSDP). Set it to 0, "
                "or train data parallel (DDP)."
            )
        self.landmark = [
            {name: tensor.clone() for name, tensor in self.expert(index).items()} for index in range(len(self.frozen))
        ]

    def movement(self, experts: list[int]) -> Tensor:
        """Return how far the listed experts have moved since the landmark, and 0 for all others: shape E, no gradient."""
        if self.landmark is None:
            self.set_landmark()
        moved_E = torch.zeros(len(self.frozen), device=self.frozen.device)
        for expert in experts:
            moved_E[expert] = displacement(self.expert(expert), self.landmark[expert])
        return moved_E

    def forward(self, x_BLD: Tensor, selection: Selection, gates_GK: Tensor, scaling: float, dropout: float) -> Tensor:
        stacked = selection.stack(*(getattr(self, name) for name in EXPERT_TENSORS))
        y_BLO = self.mixture(x_BLD, gates_GK, selection.positions_GK, *stacked, scaling=scaling, dropout=dropout)
        if self.sharded and self.training and torch.is_grad_enabled():
            y_BLO = ZeroGradients.apply(y_BLO, *self.taken_elsewhere(selection.indices_GK))
        return y_BLO

    @torch.compiler.disable
    def taken_elsewhere(self, indices_GK: Tensor) -> list[nn.Parameter]:
        """List the trainable tensors of experts that other processes take and this one does not. All must call.

        FSDP sums up the gradients that there are, so all processes must have the same ones.
        """
        chosen = indices_GK.flatten()
        taken_E = torch.zeros(len(self.frozen), dtype=torch.int32, device=chosen.device).index_fill_(0, chosen, 1)
        dist.all_reduce(taken_E)
        experts = taken_E.index_fill_(0, chosen, 0).nonzero().flatten().tolist()
        tensors = (getattr(self, name)[expert] for expert in experts for name in EXPERT_TENSORS)
        return [tensor for tensor in tensors if tensor.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        return self.down_weight[0].dtype


class ZeroGradients(torch.autograd.Function):
    """Hands on its first argument; the others get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether this process holds only a part of the parameter (a `DTensor`, as FSDP makes them)."""
    return hasattr(parameter, "full_tensor")


def gathered(parameter: Tensor) -> Tensor:
    """Return a parameter without gradient; one that is sharded is put together, for which all processes must call."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a whole tensor that is the same in all processes."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def in_backward() -> bool:
    """Tell whether a backward pass is under way, so that this forward pass recomputes an earlier one."""
    return torch._C._current_graph_task_id() != -1


@dataclass
class Decisions:
    """What a router decided in its latest training forward pass, kept for losses and for the stop rule.

    Attributes:
        task: whose router it was.
        probabilities_GE: softmax over all experts of the noisy scores, with gradient.
        scores_GE: the scores without noise.
        indices_GK: the experts selected.
    """

    task: int
    probabilities_GE: Tensor
    scores_GE: Tensor
    indices_GK: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Decisions:
        # a copy of the model has no part in the graph of the forward pass that this comes from
        return Decisions(
            self.task, self.probabilities_GE.detach().clone(), self.scores_GE.clone(), self.indices_GK.clone()
        )


class RouterBank(nn.Module):
    """One block's routers, one per task in the order of `config.tasks`, and how often each selected which expert.

    Stored by index, not name: a task may be called anything, also what an adapter or a module is called.

    Attributes:
        weight, noise_weight: per task D x E.
        usage: int64 T x E, selections in training, of all processes, as far as they have been shared.
        stopped: bool T, whose router has learnt enough and trains no more.
        keep_decisions: keep what is decided in training, see `decisions`.
        decisions: those of the latest training forward pass, one entry per task in it.
        unshared_usage: int64 T x E, what this process has counted since and not yet shared with the others. Not a
            buffer: data parallel training overwrites those with the first process's.
    """

    def __init__(self, config: MoELoraMergeConfig, in_features: int):
        super().__init__()
        self.shape = (in_features, config.num_experts)
        self.weight = nn.ParameterList()
        self.noise_weight = nn.ParameterList()
        self.register_buffer("usage", torch.zeros(0, config.num_experts, dtype=torch.int64))
        self.register_buffer("stopped", torch.zeros(0, dtype=torch.bool))
        self.keep_decisions = config.has_router_losses
        self.decisions: list[Decisions] = []
        self.unshared_usage = torch.zeros(0, config.num_experts, dtype=torch.int64, device="cpu")
        self.register_state_dict_pre_hook(_count_everything)
        for _ in config.tasks:
            self.add_task()

    def add_task(self) -> None:
        """Add a router.

        Raises:
            RuntimeError: the others are sharded.
        """
        if len(self.weight) and is_sharded(self.weight[0]):
            raise RuntimeError(
                "A task can't be added to a model that is sharded (FSDP). Name all tasks in the config beforehand, or save "
                "the adapter, load it into a new model, add the task there and shard that."
            )
        like = self.weight[0] if len(self.weight) else torch.empty(())
        for routers in (self.weight, self.noise_weight):
            routers.append(nn.Parameter(torch.zeros(self.shape, dtype=like.dtype, device=like.device)))
        self.usage = F.pad(self.usage, (0, 0, 0, 1))
        self.stopped = F.pad(self.stopped, (0, 1))
        self.unshared_usage = F.pad(self.unshared_usage, (0, 0, 0, 1))

    def count(self, tasks: Sequence[int], counts_TE: Tensor) -> None:
        """Add selections of this process."""
        self.unshared_usage = self.unshared_usage.to(counts_TE.device)
        for task, counts_E in zip(tasks, counts_TE, strict=True):
            self.unshared_usage[task] += counts_E

    def take_unshared_usage(self) -> Tensor:
        """Return what this process has counted and not shared, and forget it."""
        counts_TE = self.unshared_usage
        self.unshared_usage = torch.zeros_like(counts_TE)
        return counts_TE.to(self.usage.device)

    def forward(
        self, x_BD: Tensor, tasks: Sequence[int], top_k: int, position_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let each sample's router decide.

        Args:
            x_BD: what the routers look at.
            tasks: whose routers they are.
            top_k: K.
            position_B: for each sample, the position of its task in `tasks`; None when there is one.

        Returns:
            indices_BK and gates_BK, see `top_k_gates`.
        """
        # A choice between experts is a comparison of close numbers: half precision would decide it by rounding.
        dtype = torch.promote_types(self.weight[0].dtype, torch.float32)
        with torch.autocast(x_BD.device.type, enabled=False):
            x_BD = x_BD.to(dtype)
            weight, noise = (self._of_tasks(weights, tasks, dtype) for weights in (self.weight, self.noise_weight))
            logits_BE = router_logits(x_BD, weight, noise if self.training else None, position_B)
            indices_BK, gates_BK = top_k_gates(logits_BE, top_k)
            if self.training and self.keep_decisions and not in_backward():
                scores_BE = router_logits(x_BD.detach(), weight.detach(), position_B=position_B)
                probabilities_BE = logits_BE.softmax(dim=-1)
                for position, task in enumerate(tasks):
                    rows = slice(None) if position_B is None else position_B == position
                    self.decisions.append(Decisions(task, probabilities_BE[rows], scores_BE[rows], indices_BK[rows]))
            return indices_BK, gates_BK

    @staticmethod
    def _of_tasks(weights: nn.ParameterList, tasks: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return one task's weights, D x E, or those of several, T x D x E."""
        if len(tasks) == 1:
            return weights[tasks[0]].to(dtype)
        return torch.stack([weights[task].to(dtype) for task in tasks])


class Choice(NamedTuple):
    """What was decided for one batch in one block: which rows take which experts, with what weights.

    Attributes:
        x_BLD: what the experts read; where tokens decide for themselves, each token is a row, L = 1.
        rows_N: the rows that take experts; None for all.
        gates_GK: the weights.
        selection: the experts.
    """

    x_BLD: Tensor
    rows_N: Tensor | None
    gates_GK: Tensor
    selection: Selection


def several_processes() -> bool:
    """Tell whether others train the same model beside this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _count_everything(routers: RouterBank, prefix: str, keep_vars: bool) -> None:
    # Alone, the process may save at any moment and no count is lost. With others it would have to wait for them here;
    # there, the counts in a state dict are those of the last time they were shared, which is every optimizer step.
    if not several_processes():
        routers.usage += routers.take_unshared_usage()


class MoELoraMergeLayer(nn.Module, BaseTunerLayer):
    """Adds a mixture of experts to the output of the module it wraps.

    Args:
        base_layer: the module to adapt.
        tasks: the state that says which task routes which sample; all layers of a model share one.
        reads_prompts: the module lies in the text tower of a CLIP, whose token 0 attends to itself alone.
    """

    adapter_layer_names = ("moe_lora_experts", "moe_lora_routers")
    other_param_names = (
        "moe_lora_scaling",
        "moe_lora_dropout",
        "moe_lora_top_k",
        "moe_lora_trainable",
        "moe_lora_routing",
    )

    def __init__(self, base_layer: nn.Module, tasks: TaskState, reads_prompts: bool = False):
        super().__init__()
        self.base_layer = base_layer
        self.tasks = tasks
        self.reads_prompts = reads_prompts
        self.in_features, self.out_features = self.features(self.get_base_layer())
        self.moe_lora_experts = nn.ModuleDict()
        self.moe_lora_routers = nn.ModuleDict()
        self.moe_lora_scaling: dict[str, float] = {}
        self.moe_lora_dropout: dict[str, float] = {}
        self.moe_lora_top_k: dict[str, int] = {}
        self.moe_lora_trainable: dict[str, bool] = {}
        self.moe_lora_routing: dict[str, str] = {}
        self.register_load_state_dict_post_hook(_freeze_as_loaded)

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """Return the width of what the experts read and of what they add to."""
        raise NotImplementedError

    def expert_input(self, adapter_name: str, x_BLD: Tensor) -> Tensor:
        """Return what the experts read, given what the base layer reads."""
        return x_BLD

    def update_layer(self, adapter_name: str, config: MoELoraMergeConfig) -> None:
        """Create an adapter's experts and routers."""
        self.moe_lora_experts[adapter_name] = ExpertBank(config, self.in_features, self.out_features)
        self.moe_lora_routers[adapter_name] = RouterBank(config, self.in_features)
        self.moe_lora_scaling[adapter_name] = config.lora_alpha / config.r
        self.moe_lora_dropout[adapter_name] = config.lora_dropout
        self.moe_lora_top_k[adapter_name] = config.top_k
        self.moe_lora_trainable[adapter_name] = False
        self.moe_lora_routing[adapter_name] = config.routing
        if not any(parameter.is_meta for parameter in self.moe_lora_experts[adapter_name].parameters()):
            self.moe_lora_experts[adapter_name].reset_parameters(config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self._apply_requires_grad()

    # ------------------------------------------------------------------------------------------------ trainability

    def _apply_requires_grad(self) -> None:
        """Let gradients flow to the experts that are not frozen and to the current task's router, if at all."""
        for adapter_name, experts in self.moe_lora_experts.items():
            trainable = self.moe_lora_trainable[adapter_name] and not self.disable_adapters
            # a bank without data, as large models are first laid out, has nothing frozen
            frozen_E = [False] * len(experts.frozen) if experts.frozen.is_meta else experts.frozen.tolist()
            for name in EXPERT_TENSORS:
                for parameter, frozen in zip(getattr(experts, name), frozen_E, strict=True):
                    parameter.requires_grad_(trainable and not frozen)
            routers = self.moe_lora_routers[adapter_name]
            stopped = () if routers.stopped.is_meta else routers.stopped.nonzero().flatten().tolist()
            for parameters in (routers.weight, routers.noise_weight):
                for task, parameter in enumerate(parameters):
                    learns = task == self.tasks.current.get(adapter_name) and task not in stopped
                    parameter.requires_grad_(trainable and learns)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter_name in self.moe_lora_experts:
            self.moe_lora_trainable[adapter_name] = adapter_name in adapter_names and not inference_mode
        self._active_adapter = adapter_names
        self._apply_requires_grad()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter_name in self.moe_lora_experts:
            if adapter_name in adapter_names:
                self.moe_lora_trainable[adapter_name] = requires_grad
        self._apply_requires_grad()

    def enable_adapters(self, enabled: bool) -> None:
        # Unlike PEFT's own layers this comes back exactly as it was: an adapter loaded for inference does not start
        # to train because somebody looked at the base model's output in between.
        self._disable_adapters = not enabled
        self._apply_requires_grad()

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        self._apply_requires_grad()

    def forget_gradients(self, adapter_name: str) -> None:
        """Drop gradients that parameters collected before they stopped training; an optimizer would still use them."""
        for bank in (self.moe_lora_experts[adapter_name], self.moe_lora_routers[adapter_name]):
            for parameter in bank.parameters():
                if not parameter.requires_grad:
                    parameter.grad = None

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        # The routers decide first: while the device works on the base layer, the decision reaches the host.
        choices = [
            (adapter_name, self._decide(adapter_name, self.expert_input(adapter_name, x)))
            for adapter_name in self.active_adapters
            if adapter_name in self.moe_lora_experts
        ]
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name, choice in choices:
            if choice is not None:
                result = self._add_experts(adapter_name, choice, result)
        return result

    def _decide(self, adapter_name: str, x: Tensor) -> Choice | None:
        """Ask the routers which experts the samples take, and count them in training. None: no sample takes any."""
        routed = self.tasks.routed(adapter_name, x.shape[0], prompts=self.reads_prompts)
        if routed is None or x.shape[0] == 0:
            return None
        experts, routers = self.moe_lora_experts[adapter_name], self.moe_lora_routers[adapter_name]
        if routers.decisions and not in_backward():
            routers.decisions = []
        x_BLD = x.reshape(x.shape[0], -1, x.shape[-1])
        alike = self.reads_prompts and self.tasks.prompts_start_alike
        by_token = self.moe_lora_routing[adapter_name] == "token"
        if by_token:
            # every token is a sample of its own
            routed, x_BLD, alike = routed.tokens(x_BLD.shape[1]), x_BLD.reshape(-1, 1, x.shape[-1]), False
        start_GD = x_BLD[:, 0] if routed.rows_N is None else x_BLD[routed.rows_N, 0]
        samples, position_G = start_GD.shape[0], routed.position_N
        if alike:
            # Token 0 of a prompt sees itself alone, so it is the same vector in all of them: one decision, and in
            # training one draw of noise, is every prompt's with the same task.
            one_of_each = slice(1) if position_G is None else routed.one_of_each()
            start_GD = start_GD[one_of_each]
            position_G = None if position_G is None else position_G[one_of_each]
        indices_GK, gates_GK = routers(start_GD, routed.tasks, self.moe_lora_top_k[adapter_name], position_G)
        if alike and position_G is not None:
            indices_GK, gates_GK = indices_GK[routed.position_N], gates_GK[routed.position_N]
        if self.training:
            self._count(routers, routed, indices_GK, samples // indices_GK.shape[0])
        return Choice(x_BLD, routed.rows_N, gates_GK, Selection(indices_GK, experts.frozen.numel(), by_token))

    @torch.compiler.disable  # which can't know of the backward pass
    def _count(self, routers: RouterBank, routed: Routed, indices_GK: Tensor, times: int) -> None:
        if in_backward():
            return
        T, E = len(routed.tasks), routers.shape[1]
        # the experts of the second task are counted behind those of the first, and so on
        offset_G1 = 0 if routed.position_N is None else routed.position_N.unsqueeze(1) * E
        counts_TE = selection_counts(indices_GK + offset_G1, T * E).reshape(T, E)
        routers.count(routed.tasks, counts_TE * times)

    def _add_experts(self, adapter_name: str, choice: Choice, result: Tensor) -> Tensor:
        experts, rows_N = self.moe_lora_experts[adapter_name], choice.rows_N
        y_NLO = experts(
            self._cast_input_dtype(choice.x_BLD if rows_N is None else choice.x_BLD[rows_N], experts.dtype),
            choice.selection,
            choice.gates_GK,
            self.moe_lora_scaling[adapter_name],
            self.moe_lora_dropout[adapter_name] if self.training else 0.0,
        ).to(result.dtype)
        if rows_N is None:
            return result + y_NLO.reshape(result.shape)
        # rows of plain samples are not even added zero to, so they stay what they were bit for bit
        result_BLO = result.reshape(*choice.x_BLD.shape[:2], -1)
        return result_BLO.index_add(0, rows_N, y_NLO).reshape(result.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Do nothing: experts are never merged into the base weights."""

    def __repr__(self) -> str:
        return "moe_lora_merge." + super().__repr__()


NOT_MERGEABLE = (
    "Which experts apply depends on the input, so they can't be merged into the base weights. To deploy one task, "
    "`model.bake_task(name)` gives a slim model with that task's router and the experts it can choose; `model.unload()` "
    "gives the base model back."
)


def _freeze_as_loaded(layer: MoELoraMergeLayer, incompatible_keys: Any) -> None:
    layer._apply_requires_grad()


class Linear(MoELoraMergeLayer):
    """Experts beside an `nn.Linear`; they read what it reads. Inputs B x D, B x L x D or with more dimensions."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.in_features, base_layer.out_features


class MLP(MoELoraMergeLayer):
    """Experts beside a transformer block's MLP: `y = x + MLP(LN2(x)) + MoE(x)`.

    Args:
        norm: the layer norm before the MLP, whose input is the residual stream that the experts read; None when all
            adapters here read the normalized one.
    """

    other_param_names = (*MoELoraMergeLayer.other_param_names, "moe_lora_input")

    def __init__(self, base_layer: nn.Module, tasks: TaskState, reads_prompts: bool, norm: nn.Module | None):
        super().__init__(base_layer, tasks, reads_prompts)
        self.moe_lora_input: dict[str, str] = {}
        self._residual: Tensor | None = None
        self._norm_hook = None if norm is None else norm.register_forward_pre_hook(self._remember_residual)

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        return base_layer.fc1.in_features, base_layer.fc2.out_features

    def update_layer(self, adapter_name: str, config: MoELoraMergeConfig) -> None:
        if config.routing == "token":
            raise ValueError(
                "routing='token' is for `nn.Linear` targets; this is an MLP block, whose samples decide by their token 0. "
                "Name linear layers in `target_modules`, such as ['fc1', 'fc2'], or use routing='sample'."
            )
        if config.expert_input == "residual" and self._norm_hook is None:
            raise ValueError(
                "expert_input='residual' needs the residual stream, but the block around this MLP has no "
                "`layer_norm2` to read it from. Use expert_input='normalized'."
            )
        self.moe_lora_input[adapter_name] = config.expert_input
        super().update_layer(adapter_name, config)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return super()._get_base_layer_device_and_dtype(base_layer.fc1)

    def _remember_residual(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._residual = args[0]

    def expert_input(self, adapter_name: str, x_BLD: Tensor) -> Tensor:
        return self._residual if self.moe_lora_input[adapter_name] == "residual" else x_BLD

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self._residual = None

    def unhook(self) -> None:
        """Stop listening to the layer norm, when the base model is given back."""
        if self._norm_hook is not None:
            self._norm_hook.remove()
