"""The adapted modules: experts and routers beside a linear layer or an MLP block.

Shapes: B samples, L tokens, D input width, O output width, E experts, K top_k, G decisions, T tasks, N routed rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .config import MoELoraMergeConfig
from .context import (
    Adapters,
    Routed,
    RoutingContext,
    context_of,
    forget_residual,
    gates_asked_for,
    remember_residual,
    residual_of,
)
from .distributed import in_backward
from .experts import ExpertBank
from .mixture import How, KnownSelection, OwnExperts, Selection, add_fixed_mixture
from .routers import Decisions, RouterBank
from .routing import selection_counts
from .routing_losses import router_loss


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
    selection: Selection | KnownSelection | OwnExperts


class FixedChoice(NamedTuple):
    """The same where all samples take all of one task's experts.

    Attributes:
        x: what the experts read, ... x D.
        gates: the weights, of a shape that fits ... x K; None for the weight 1 of a single expert.
        experts: the K experts.
    """

    x: Tensor
    gates: Tensor | None
    experts: list[int]


class MoELoraMergeLayer(nn.Module, BaseTunerLayer):
    """Adds a mixture of experts to the output of the module it wraps.

    Whether noise, dropout and counting are on is decided by the `training` flag of this module alone.

    Args:
        base_layer: the module to adapt.
        adapters: the settings and the current tasks of the tuner's adapters; all its layers share them.
        block: name of the module.
        reads_prompts: the module lies in the text tower of a CLIP, whose token 0 attends to itself alone.
    """

    adapter_layer_names = ("moe_lora_experts", "moe_lora_routers")
    other_param_names = ("moe_lora_trainable",)

    def __init__(self, base_layer: nn.Module, adapters: Adapters, block: str, reads_prompts: bool = False):
        super().__init__()
        self.base_layer = base_layer
        self.adapters = adapters
        self.block = block
        self.reads_prompts = reads_prompts
        self.in_features, self.out_features = self.features(self.get_base_layer())
        self.moe_lora_experts = nn.ModuleDict()
        self.moe_lora_routers = nn.ModuleDict()
        self.moe_lora_trainable: dict[str, bool] = {}
        self.register_load_state_dict_post_hook(_freeze_as_loaded)

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """Return the width of what the experts read and of what they add to."""
        raise NotImplementedError

    def expert_input(self, config: MoELoraMergeConfig, x_BLD: Tensor) -> Tensor:
        """Return what the experts read, given what the base layer reads."""
        return x_BLD

    def update_layer(self, adapter_name: str, config: MoELoraMergeConfig) -> None:
        """Create an adapter's experts and routers."""
        experts = ExpertBank(config, self.in_features, self.out_features)
        routers = RouterBank(config, self.in_features)
        for task, known in enumerate(experts_at_start(config)):
            assert task == len(routers.weight)
            routers.add_task(known)
        self.moe_lora_experts[adapter_name] = experts.train(self.training)
        self.moe_lora_routers[adapter_name] = routers.train(self.training)
        self.moe_lora_trainable[adapter_name] = False
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.apply_requires_grad()

    # ------------------------------------------------------------------------------------------------ trainability

    def apply_requires_grad(self) -> None:
        """Let gradients flow to what the current task may train: its router, and the experts that are not frozen."""
        for adapter_name in self.moe_lora_experts:
            for parameter, learns in self.learners(adapter_name):
                parameter.requires_grad_(learns)

    def train_what_may_train(self, adapter_name: str, tasks: Collection[int] | None = None) -> None:
        """The same for one adapter. Gradients that parameters collected before they stopped training are dropped; an optimizer
        would still use them.

        Args:
            adapter_name: whose.
            tasks: the tasks that began or ended: where tasks have experts of their own, those of others are not looked at.
        """
        for parameter, learns in self.learners(adapter_name, tasks):
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None

    def learners(self, adapter_name: str, tasks: Collection[int] | None = None) -> Iterator[tuple[nn.Parameter, bool]]:
        """Go through the parameters of some tasks, by default of all, and say whether each may train."""
        experts, routers = self.moe_lora_experts[adapter_name], self.moe_lora_routers[adapter_name]
        config = self.adapters.configs[adapter_name]
        trainable = self.moe_lora_trainable[adapter_name] and not self.disable_adapters
        current, reserved = config.current_index, config.task_experts == "reserved"
        tasks = range(len(routers.weight)) if tasks is None else tasks
        looked_at = list(range(len(experts)))
        if reserved and len(tasks) < len(routers.weight):
            looked_at = sorted({expert for task in tasks for expert in routers.experts_of(task)})
        own = set(looked_at)
        if reserved:
            own = set() if current is None else set(routers.experts_of(current))
        # a bank without data, as large models are first laid out, has nothing frozen
        meta = experts.frozen.is_meta
        frozen = [False] * len(looked_at) if meta else experts.frozen[looked_at].tolist()
        for expert, is_frozen in zip(looked_at, frozen, strict=True):
            for parameter in experts.parameters_of(expert):
                yield parameter, trainable and not is_frozen and expert in own
        for task in tasks:
            # the gate of a single expert is 1 whatever its score: such a router gets no gradient, which DDP resents
            learns = trainable and task == current and len(routers.experts_of(task)) > 1
            learns = learns and (routers.stopped.is_meta or not routers.stopped[task])
            for parameter in routers.parameters_of(task):
                yield parameter, learns

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter_name in self.moe_lora_experts:
            self.moe_lora_trainable[adapter_name] = adapter_name in adapter_names and not inference_mode
        self._active_adapter = adapter_names
        self.apply_requires_grad()

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for adapter_name in self.moe_lora_experts:
            if adapter_name in adapter_names:
                self.moe_lora_trainable[adapter_name] = requires_grad
        self.apply_requires_grad()

    def enable_adapters(self, enabled: bool) -> None:
        # Unlike PEFT's own layers this comes back exactly as it was: an adapter loaded for inference does not start
        # to train because somebody looked at the base model's output in between.
        self._disable_adapters = not enabled
        self.apply_requires_grad()

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        self.apply_requires_grad()

    # ------------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        context = context_of(self.adapters)
        # The routers decide first: while the device works on the base layer, the decision reaches the host.
        choices = [
            (adapter_name, self._decide(adapter_name, context, x))
            for adapter_name in self.active_adapters
            if adapter_name in self.moe_lora_experts
        ]
        result = self.base_layer(x, *args, **kwargs)
        for adapter_name, choice in choices:
            if choice is not None:
                result = self._add_experts(adapter_name, choice, result)
        return result

    def _decide(self, adapter_name: str, context: RoutingContext, x: Tensor) -> Choice | FixedChoice | None:
        """Ask the routers which experts the samples take, and count them in training. None: no sample takes any."""
        config, routers = context.adapters.configs[adapter_name], self.moe_lora_routers[adapter_name]
        x = self.expert_input(config, x)
        routed = context.routed(adapter_name, x.shape[0], prompts=self.reads_prompts)
        if routed is None or x.shape[0] == 0:
            return None
        takes_all = config.task_experts == "reserved" and config.top_k == config.experts_per_task
        recorded = self.training and routers.keep_decisions and context.record is not None
        noise = config.router_noise if self.training else 0.0
        all_rows = takes_all and routed.rows_N is None and not recorded
        if all_rows and routed.position_N is None:
            return self._take_all(config, routers, routed.tasks[0], noise, x)

        x_BLD = x.reshape(x.shape[0], -1, x.shape[-1])
        alike = self.reads_prompts and context.prompts_start_alike
        by_token = config.routing == "token"
        if all_rows and not self.training and not by_token and gates_asked_for(self.adapters) is None:
            # samples of several tasks are served: only to be weighed, too
            own = OwnExperts([routers.experts_of(task) for task in routed.tasks], routed.position_N)
            logits_BK = routers.logits(x_BLD[:, 0], routed.tasks, routed.position_N)
            return Choice(x_BLD, None, logits_BK.softmax(dim=-1), own)
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
        decided: list[Decisions] | None = [] if recorded else None
        indices_GK, gates_GK = routers(start_GD, routed.tasks, config.top_k, position_G, noise, decided)
        if recorded:
            self._record(context, config, adapter_name, decided)
        if alike and position_G is not None:
            indices_GK, gates_GK = indices_GK[routed.position_N], gates_GK[routed.position_N]
        if self.training:
            self._count(routers, routed, indices_GK, samples // indices_GK.shape[0])
        if gates_asked_for(self.adapters) is not None:
            rows_NK = (tensor.expand(samples, -1) for tensor in (indices_GK, gates_GK))
            self._tell_gates(routers, len(x_BLD), routed.rows_N, *rows_NK)
        if takes_all:
            selection = KnownSelection([routers.experts_of(task) for task in routed.tasks], indices_GK)
        else:
            selection = Selection(indices_GK, routers.num_experts, by_token)
        return Choice(x_BLD, routed.rows_N, gates_GK, selection)

    def _take_all(
        self, config: MoELoraMergeConfig, routers: RouterBank, task: int, noise: float, x: Tensor
    ) -> FixedChoice:
        """Decide where there is nothing to choose, only to weigh: all samples take all experts of one task."""
        experts = routers.experts_of(task)
        by_token = config.routing == "token"
        if self.training:
            _count_samples(routers, task, x[..., 0].numel() if by_token else x.shape[0])
        if len(experts) == 1:
            if gates_asked_for(self.adapters) is not None:
                ones_B1 = x.new_ones(x[..., 0].numel() if by_token else len(x), 1)
                self._tell_gates(routers, len(ones_B1), None, torch.tensor([experts], device=x.device), ones_B1)
            return FixedChoice(x, None, experts)
        start = x if by_token or x.ndim == 2 else x.flatten(1, -2)[:, 0]
        gates = routers.logits(start, (task,), noise=noise).softmax(dim=-1)
        if gates_asked_for(self.adapters) is not None:
            gates_BK = gates.reshape(-1, len(experts))
            self._tell_gates(routers, len(gates_BK), None, torch.tensor([experts], device=x.device), gates_BK)
        if not by_token:
            gates = gates.reshape(len(x), *(1,) * (x.ndim - 2), len(experts))
        return FixedChoice(x, gates, experts)

    @torch.compiler.disable  # a list that grows is no part of a graph
    @torch.no_grad()  # and the backward pass of checkpointing recomputes without it
    def _tell_gates(
        self, routers: RouterBank, rows: int, rows_N: Tensor | None, indices_NK: Tensor, gates_NK: Tensor
    ) -> None:
        """Spread the gates over all rows and all experts of the block, for who records them in this thread."""
        if in_backward():
            return
        gates_NE = gates_NK.new_zeros(len(gates_NK), routers.num_experts)
        gates_NE = gates_NE.scatter_add(1, indices_NK.expand_as(gates_NK), gates_NK)
        gates_BE = (
            gates_NE if rows_N is None else gates_NE.new_zeros(rows, gates_NE.shape[1]).index_copy(0, rows_N, gates_NE)
        )
        gates_asked_for(self.adapters).setdefault(self.block, []).append(gates_BE)

    @torch.compiler.disable  # which can't know of the backward pass
    def _count(self, routers: RouterBank, routed: Routed, indices_GK: Tensor, times: int) -> None:
        if in_backward():
            return
        T, E = len(routed.tasks), routers.num_experts
        # the experts of the second task are counted behind those of the first, and so on
        offset_G1 = 0 if routed.position_N is None else routed.position_N.unsqueeze(1) * E
        counts_TE = selection_counts(indices_GK + offset_G1, T * E).reshape(T, E)
        for task, counts_E in zip(routed.tasks, counts_TE * times, strict=True):
            routers.count(task, counts_E)

    @torch.compiler.disable
    def _record(
        self, context: RoutingContext, config: MoELoraMergeConfig, adapter_name: str, decided: list[Decisions]
    ) -> None:
        if in_backward():
            return
        context.record.decisions[self.block] = decided
        if config.has_router_losses:
            experts = self.moe_lora_experts[adapter_name]
            for decisions in decided:
                gates_GE, indices_GK = decisions.probabilities_GE, decisions.indices_GK
                moved_E = experts.movement(indices_GK.unique().tolist()) if config.router_locality_loss else None
                loss = router_loss(
                    gates_GE, indices_GK, config.router_balance_loss, config.router_locality_loss, moved_E
                )
                context.record.losses.append(loss)

    def _owns_output(self) -> bool:
        """Say whether nobody but the call has the base layer's output: it is fresh, no hook saw it, and no gradient needs it."""
        base = self.base_layer
        if torch.is_grad_enabled() or type(base) is not nn.Linear:
            return False
        return not (base._forward_hooks or nn_module._global_forward_hooks or "forward" in vars(base))

    def _add_experts(self, adapter_name: str, choice: Choice | FixedChoice, result: Tensor) -> Tensor:
        experts, config = self.moe_lora_experts[adapter_name], self.adapters.configs[adapter_name]
        how: How = experts.how(config.scaling, config.lora_dropout if self.training else 0.0, self._owns_output())
        if isinstance(choice, FixedChoice):
            x = self._cast_input_dtype(choice.x, experts.dtype)
            return add_fixed_mixture(result, x, choice.gates, experts.joined(choice.experts), how)
        rows_N = choice.rows_N
        x_NLD = self._cast_input_dtype(choice.x_BLD if rows_N is None else choice.x_BLD[rows_N], experts.dtype)
        result_BLO = result.reshape(*choice.x_BLD.shape[:2], -1)
        onto_BLO = result_BLO if rows_N is None else None
        y_NLO = experts(x_NLD, choice.selection, choice.gates_GK, how, self.training, onto_BLO)
        if rows_N is None:
            return y_NLO.reshape(result.shape)
        # rows of plain samples are not even added zero to, so they stay what they were bit for bit
        add = result_BLO.index_add_ if how.in_place else result_BLO.index_add
        return add(0, rows_N, y_NLO.to(result.dtype)).reshape(result.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Do nothing: experts are never merged into the base weights."""

    def __repr__(self) -> str:
        return "moe_lora_merge." + super().__repr__()


NOT_MERGEABLE = (
    "Which experts apply depends on the input, so they can't be merged into the base weights. To deploy one task, "
    "`model.bake_task(name)` gives a slim model with that task's router and the experts it can choose, and where the task "
    "has one linear expert per layer `model.export_lora(name)` gives a LoRA, which can be merged; `model.unload()` gives "
    "the base model back."
)


def experts_at_start(config: MoELoraMergeConfig) -> list[list[int]]:
    """List, for each task of a configuration, the experts that its routers know when they are made."""
    if config.router_widths is not None:  # a saved adapter, whose file says which
        return [list(range(width)) for width in config.router_widths]
    if config.task_experts == "shared":
        return [list(range(config.experts_at_start)) for _ in config.tasks]
    per_task = config.experts_per_task
    return [list(range(task * per_task, (task + 1) * per_task)) for task in range(len(config.tasks))]


@torch.compiler.disable
def _count_samples(routers: RouterBank, task: int, samples: int) -> None:
    if not in_backward():
        routers.count(task, samples)


def _freeze_as_loaded(layer: MoELoraMergeLayer, incompatible_keys: Any) -> None:
    layer.apply_requires_grad()


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

    def __init__(
        self, base_layer: nn.Module, adapters: Adapters, block: str, reads_prompts: bool, norm: nn.Module | None
    ):
        super().__init__(base_layer, adapters, block, reads_prompts)
        self._norm_hook = None if norm is None else norm.register_forward_pre_hook(remember_residual)

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
        super().update_layer(adapter_name, config)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return super()._get_base_layer_device_and_dtype(base_layer.fc1)

    def expert_input(self, config: MoELoraMergeConfig, x_BLD: Tensor) -> Tensor:
        return x_BLD if config.expert_input == "normalized" else residual_of(x_BLD)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            forget_residual()

    def unhook(self) -> None:
        """Stop listening to the layer norm, when the base model is given back."""
        if self._norm_hook is not None:
            self._norm_hook.remove()
