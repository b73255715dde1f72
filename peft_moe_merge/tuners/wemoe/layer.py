"""The three kinds of layers of a WEMoE model: an MLP block with its router, a linear layer, and everything else.

Shapes: B images, S tokens, T tasks, I inputs, O outputs, R rank, K kept entries.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import WEMoEConfig
from .context import CALL
from .ensembling import ensembled_linear, low_rank_linear, output_space_linear
from .router import Router, projection_gates
from .task_vectors import kept_entries, sparsify, truncate, truncate_factors


class WEMoELayer(BaseTunerLayer):
    """What the layers share. Gates depend on the input, hence an adapter cannot be merged, and only one is active."""

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"WEMoE runs one adapter at a time, got {adapter_names}. To combine their tasks, pass all fine-tuned "
                "models to one `merge_finetuned`."
            )
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    @property
    def adapters(self) -> set[str]:
        """The names of the layer's adapters."""
        return set(self._get_available_adapters())

    def active(self, adapters: nn.Module | dict) -> str | None:
        """Return the active adapter's name if it is among `adapters` and not disabled."""
        if self.disable_adapters:
            return None
        return next((name for name in self.active_adapters if name in adapters), None)


class WEMoEBlock(nn.Module, WEMoELayer):
    """An MLP block: its router turns the block's input into gates, which every linear layer in the block uses.

    Any module will do whose parameters all belong to `nn.Linear` layers and which maps `[B, S, H]` to `[B, S, ...]`.
    """

    adapter_layer_names = ("wemoe_router",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        WEMoELayer.__init__(self, base_layer)
        self.wemoe_router = nn.ModuleDict()  # a router that is shared stands in every block
        linears = [(path, module) for path, module in base_layer.named_modules() if isinstance(module, nn.Linear)]
        for path, linear in linears:
            base_layer.set_submodule(path, WEMoELinear(linear))

    @property
    def linears(self) -> dict[str, WEMoELinear]:
        """The block's linear layers by their path in it."""
        return {path: m for path, m in self.base_layer.named_modules() if isinstance(m, WEMoELinear)}

    def update_layer(self, adapter_name: str, config: WEMoEConfig, shared_router: Router | None = None) -> None:
        """Add an adapter: zero task vectors, and a new router unless there is a shared one."""
        linears = self.linears.values()
        first = next(iter(linears)).base_layer
        self.wemoe_router[adapter_name] = shared_router or Router(
            first.in_features,
            len(config.tasks),
            config.router_depth,
            config.scaling,
            device=first.weight.device,
            dtype=torch.promote_types(first.weight.dtype, torch.float32),
        )
        for linear in linears:
            linear.update_layer(adapter_name, config)
        self.set_adapter(self.active_adapters)

    def forward(self, x_BSH: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = self.active(self.wemoe_router)
        if adapter is None:
            return self.base_layer(x_BSH, *args, **kwargs)
        if x_BSH.ndim != 3:
            raise ValueError(
                f"a WEMoE block takes [images, tokens, width], got a tensor of shape {tuple(x_BSH.shape)}"
            )
        gates_BT = self.wemoe_router[adapter](x_BSH)
        if CALL.recorded is not None:
            CALL.recorded.append(gates_BT)
        # The block's own forward calls the linear layers, whatever it does in between, so gates reach them this way.
        before, CALL.gates_BT = CALL.gates_BT, gates_BT
        try:
            return self.base_layer(x_BSH, *args, **kwargs)
        finally:
            CALL.gates_BT = before

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """Return the block as it was before (merging has been refused by the model already)."""
        for path, linear in self.linears.items():
            self.base_layer.set_submodule(path, linear.base_layer)
        return self.base_layer

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return next(base_layer.parameters()).device, None  # routers keep their precision


class WEMoELinear(nn.Module, WEMoELayer):
    """A linear layer and its task vectors, with gates from its block or, in projection routing, from its own input."""

    other_param_names = (
        "wemoe_delta",
        "wemoe_index",
        "wemoe_down",
        "wemoe_up",
        "wemoe_bias",
        "wemoe_gate",
        "top_k",
        "gate_rank",
    )

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        WEMoELayer.__init__(self, base_layer)
        self.wemoe_delta = BufferDict(persistent=True)  # [T, O, I] whole, or the kept values [T, K]
        self.wemoe_index = BufferDict(persistent=True)  # [T, K] their places
        self.wemoe_down = BufferDict(persistent=True)  # [T, R, I]
        self.wemoe_up = BufferDict(persistent=True)  # [T, R, O]
        self.wemoe_bias = BufferDict(persistent=True)  # [T, O]
        self.wemoe_gate = BufferDict(persistent=True)  # [T, R, I] what projection gates look at beside whole deltas
        self.top_k: dict[str, int] = {}  # adapters with projection gates
        self.gate_rank: dict[str, int] = {}

    def update_layer(self, adapter_name: str, config: WEMoEConfig) -> None:
        """Add an adapter whose task vectors are zero."""
        base = self.get_base_layer()
        outputs, inputs = base.weight.shape
        num_tasks = len(config.tasks)

        def zeros(*shape: int, dtype: torch.dtype = base.weight.dtype) -> torch.Tensor:
            return torch.zeros(num_tasks, *shape, dtype=dtype, device=base.weight.device)

        if config.rank is not None:
            self.wemoe_down[adapter_name] = zeros(config.rank, inputs)
            self.wemoe_up[adapter_name] = zeros(config.rank, outputs)
        elif config.sparsity:
            kept = kept_entries(base.weight.numel(), config.sparsity)
            self.wemoe_delta[adapter_name] = zeros(kept)
            self.wemoe_index[adapter_name] = zeros(kept, dtype=torch.int32)
        else:
            self.wemoe_delta[adapter_name] = zeros(outputs, inputs)
        self.wemoe_bias[adapter_name] = zeros(outputs)  # stays zero for a layer without bias
        if config.gates == "projection":
            self.top_k[adapter_name] = min(config.top_k, num_tasks)
            self.gate_rank[adapter_name] = config.gate_rank
            if config.rank is None:
                self.wemoe_gate[adapter_name] = zeros(config.gate_rank, inputs)
        self.set_adapter(self.active_adapters)

    def set_task_vectors(
        self, adapter_name: str, config: WEMoEConfig, deltas_TOI: torch.Tensor, bias_TO: torch.Tensor | None
    ) -> None:
        """Store the task vectors in the form that `config` asks for."""
        stored: dict[str, torch.Tensor | None] = {"wemoe_bias": bias_TO}
        if config.rank is not None:
            stored["wemoe_down"], stored["wemoe_up"] = truncate(deltas_TOI, config.rank)
        elif config.sparsity:
            stored["wemoe_delta"], stored["wemoe_index"] = sparsify(deltas_TOI, config.sparsity)
        else:
            stored["wemoe_delta"] = deltas_TOI
            if config.gates == "projection":
                stored["wemoe_gate"], _ = truncate(deltas_TOI, config.gate_rank)
        self._store(adapter_name, stored)

    def set_factors(
        self, adapter_name: str, config: WEMoEConfig, factors: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Store task vectors of low rank, each given as `up_OK · down_KI`, without ever building one."""
        down_TRI, up_TRO = truncate_factors(factors, config.rank)
        self._store(adapter_name, {"wemoe_down": down_TRI, "wemoe_up": up_TRO})

    def _store(self, adapter_name: str, tensors: Mapping[str, torch.Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                getattr(self, name)[adapter_name].copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.get_base_layer()
        adapter = self.active((*self.wemoe_delta, *self.wemoe_down))
        gates_BT = CALL.gates_BT
        if adapter is None or (adapter not in self.top_k and gates_BT is None):
            return base(x)

        if adapter in self.top_k:
            directions = self.wemoe_gate if adapter in self.wemoe_gate else self.wemoe_down
            directions_TRI = directions[adapter][:, : self.gate_rank[adapter]]
            gates = projection_gates(x, directions_TRI, self.top_k[adapter])  # [..., T]
        else:
            gates = gates_BT[:, None]  # [B, 1, T], or [1, 1, T]

        bias_TO = self.wemoe_bias[adapter]
        if adapter in self.wemoe_down:
            return low_rank_linear(x, gates, base(x), self.wemoe_down[adapter], self.wemoe_up[adapter], bias_TO)
        bias = gates.to(bias_TO.dtype) @ bias_TO  # [B, 1, O], or [..., O] with projection gates
        if base.bias is not None:
            bias = bias + base.bias
        if adapter in self.top_k:
            y = output_space_linear(x, gates, base.weight, self.wemoe_delta[adapter])
            return y + bias.to(y.dtype)
        index_TK = dict(self.wemoe_index.items()).get(adapter)
        return ensembled_linear(x, gates_BT, base.weight, bias[:, 0], self.wemoe_delta[adapter], index_TK)


class WEMoEStatic(nn.Module, WEMoELayer):
    """A module outside of the MLP blocks, with `λ Σ_t τ_t` added to its parameters: task arithmetic."""

    other_param_names = ("wemoe_static",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        WEMoELayer.__init__(self, base_layer)
        self.wemoe_static = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or not any more
                raise
            return getattr(self.base_layer, name)  # models look into their parts, a ViT for the dtype of its patches

    def update_layer(self, adapter_name: str, config: WEMoEConfig) -> None:
        """Add an adapter that changes nothing yet."""
        shifts = BufferDict(persistent=True)
        for path, parameter in self.base_layer.named_parameters():
            shifts[path.replace(".", "/")] = torch.zeros_like(parameter, requires_grad=False)
        self.wemoe_static[adapter_name] = shifts
        self.set_adapter(self.active_adapters)

    def set_shift(self, adapter_name: str, path: str, shift: torch.Tensor) -> None:
        """Store what is added to the parameter at `path` of the module."""
        self.wemoe_static[adapter_name][path.replace(".", "/")].copy_(shift)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self.active(self.wemoe_static)
        if adapter is None:
            return self.base_layer(*args, **kwargs)
        # The names are those of the shifts: a replica of a module (DataParallel) lists no parameters.
        shifted = {
            name.replace("/", "."): attrgetter(name.replace("/", "."))(self.base_layer) + shift
            for name, shift in self.wemoe_static[adapter].items()
        }
        if torch.compiler.is_compiling() or any("forward" in module.__dict__ for module in self.base_layer.modules()):
            return torch.func.functional_call(self.base_layer, shifted, args, kwargs)
        # In place of `functional_call`, which exchanges the parameters of a module that other threads run as well.
        return with_parameters(self.base_layer, shifted)(*args, **kwargs)


def with_parameters(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a copy of a module that has the given parameters, by name, and shares everything else with it."""
    new = copy.copy(module)
    new._parameters, new._modules = dict(module._parameters), dict(module._modules)
    inside: dict[str, dict[str, torch.Tensor]] = {}
    for path, value in parameters.items():
        name, _, rest = path.partition(".")
        if rest:
            inside.setdefault(name, {})[rest] = value
        else:
            (new._parameters if name in new._parameters else new.__dict__)[name] = value
    for name, own in inside.items():
        new._modules[name] = with_parameters(module._modules[name], own)
    return new
