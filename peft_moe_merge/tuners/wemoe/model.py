"""WEMoE as a PEFT tuner."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from peft_moe_merge.files import check_tensors

from .config import WEMoEConfig
from .layer import WEMoEBlock, WEMoELayer, WEMoELinear, WEMoEStatic

CLIP_LAYER = r"(?!.*text_model)(.*\.)?encoder\.layers\.\d+"
CLIP_MLP = CLIP_LAYER + r"\.mlp"
CLIP_LINEAR = CLIP_LAYER + r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
VIT_LAYER = r"(.*\.)?layers?\.\d+"  # `layers` in a ViT, `encoder.layer` in a DINOv2
VIT_MLP = VIT_LAYER + r"\.mlp"
VIT_LINEAR = VIT_LAYER + r"\.(attention\.(q|k|v|o)_proj|mlp\.(fc[12]|(gate|up|down)_proj))"
ROUTER = ".wemoe_router."
NAMED_HIDDEN = re.compile(r"(\.wemoe_router)\.[^.]+(\.hidden\.(?:weight|bias))$")
CLIP_LIKE = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
VIT_LIKE = ("vit", "dinov2", "dinov2_with_registers")


def default_targets(gates: str, model_config: Any) -> str:
    """Return a regular expression for what `gates` work on in a known model.

    Args:
        gates: see `WEMoEConfig`.
        model_config: the model's configuration or its dictionary.

    Raises:
        ValueError: the model is of another type.
    """
    if hasattr(model_config, "to_dict"):
        model_config = model_config.to_dict()
    model_type = (model_config or {}).get("model_type")
    if model_type in VIT_LIKE:
        return VIT_LINEAR if gates == "projection" else VIT_MLP
    if model_type not in CLIP_LIKE:
        raise ValueError(
            f"WEMoE does not know the MLP blocks of a model of type {model_type!r}: name them in `target_modules` of "
            "WEMoEConfig (for gates='projection', name nn.Linear layers)."
        )
    return CLIP_LINEAR if gates == "projection" else CLIP_MLP


def check_target(config: WEMoEConfig, name: str, module: nn.Module) -> None:
    """Check that a targeted module is of the kind that the gates work on.

    Raises:
        TypeError: it is not.
    """
    if config.gates == "projection":
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"gates='projection' work on nn.Linear layers, the target {name!r} is {type(module).__name__}: name "
                "linear layers in `target_modules`."
            )
        return
    linears = {path for path, child in module.named_modules() if isinstance(child, nn.Linear)}
    others = [path for path, _ in module.named_parameters() if path.rpartition(".")[0] not in linears]
    if not linears or "" in linears or others:
        raise TypeError(
            f"gates='learned' work on MLP blocks built of nn.Linear layers, the target {name!r} is "
            f"{type(module).__name__}"
            + (f" with the other parameters {others}" if others else "")
            + ": name such blocks in `target_modules`."
        )


def check_plain(model: nn.Module) -> None:
    """Check that no tuner has been at work on a base model: two would act on each other's layers.

    Raises:
        ValueError: one has.
    """
    layers = sorted({type(module).__name__ for module in model.modules() if isinstance(module, BaseTunerLayer)})
    if layers:
        raise ValueError(
            f"the base model has adapters in it ({', '.join(layers)}); pass the plain pretrained model "
            "(`peft_model.unload()` gives it back), or give each its own: `copy.deepcopy(base)`. Several WEMoE adapters "
            "for one base model go into one `PeftModel`, by `load_adapter`."
        )


class WEMoEModel(BaseTuner):
    """Weight-ensembling mixture of experts (arXiv 2402.00433) over fine-tuned copies of one model.

    The MLP blocks keep the pretrained weights, and add to them, for every image, task vectors weighed by a learned
    router; everything else is merged by task arithmetic. `merge_finetuned` builds one; only routers are trainable.
    Disabling the adapter gives the pretrained model back exactly: no weight of it is changed.

    With `shared_router` the first block owns the router, and the adapter's file has it once, under that block's name.
    """

    prefix = "wemoe_"
    tuner_layer_cls = WEMoELayer
    target_module_mapping = dict.fromkeys(CLIP_LIKE, CLIP_MLP) | dict.fromkeys(VIT_LIKE, VIT_MLP)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not self.__dict__.get("injected"):
            check_plain(model)
        adapters = {name for layer in model.modules() if isinstance(layer, WEMoELayer) for name in layer.adapters}
        names = [*(name for name, _ in model.named_modules()), *(name for name, _ in model.named_parameters())]
        taken = {part for name in names for part in name.split(".")} - adapters
        if adapter_name in taken | {"hidden", "weight", "bias"} or adapter_name.isdigit():
            raise ValueError(
                f"An adapter can't be called {adapter_name!r}: that is also a part of the weights' names, by which PEFT "
                "tells adapters apart when it saves them. Choose another adapter name."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.injected = True

    def _prepare_adapter_config(self, peft_config: WEMoEConfig, model_config: dict) -> WEMoEConfig:
        if not peft_config.tasks:
            raise ValueError(
                "WEMoEConfig.tasks is empty: `merge_finetuned(base, {task: model, ...}, config)` builds a WEMoE model "
                "and names its tasks."
            )
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(peft_config.gates, model_config)
        return peft_config

    def _prepare_model(self, peft_config: WEMoEConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced."""
        for name, module in model.named_modules():
            if check_target_module_exists(peft_config, name) and not isinstance(module, WEMoELayer):
                check_target(peft_config, name, module)

    @staticmethod
    def _check_target_module_exists(peft_config: WEMoEConfig, key: str) -> Any:
        return key in (peft_config.static_modules or ()) or check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: WEMoEConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        layer_cls = self._layer_class(peft_config, current_key)
        if isinstance(target, WEMoELayer):
            layer = target
            if not isinstance(layer, layer_cls):
                raise ValueError(
                    f"adapter {adapter_name!r} treats {current_key!r} as {layer_cls.__name__}, an earlier adapter as "
                    f"{type(layer).__name__}: load adapters with other targets or routers on a base model of their own."
                )
        else:
            layer = layer_cls(target)

        if peft_config.shared_router and layer_cls is WEMoEBlock:
            layer.update_layer(adapter_name, peft_config, self._shared_router(adapter_name))
        else:
            layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @staticmethod
    def _layer_class(peft_config: WEMoEConfig, key: str) -> type[WEMoELayer]:
        if key in (peft_config.static_modules or ()):
            return WEMoEStatic
        return WEMoELinear if peft_config.gates == "projection" else WEMoEBlock

    def _shared_router(self, adapter_name: str) -> nn.Module | None:
        """Return the router of the first block that has one for this adapter, `None` at the first block."""
        blocks = (module for module in self.model.modules() if isinstance(module, WEMoEBlock))
        return next((b.wemoe_router[adapter_name] for b in blocks if adapter_name in b.wemoe_router), None)

    # ------------------------------------------------------------------------------------------------ saving, loading

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: WEMoEConfig, adapter_name: str, state_dict: dict, unwanted_adapter_names: list
    ) -> dict[str, torch.Tensor]:
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not config.shared_router:
            return state
        first = next(key.partition(ROUTER)[0] for key in state if ROUTER in key)
        return {
            key: tensor for key, tensor in state.items() if key.partition(ROUTER)[:2] in ((first, ROUTER), (key, ""))
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        for container in ("wemoe_router", "wemoe_static"):
            before, found, after = key.rpartition(f".{container}.{adapter_name}.")
            if found:
                return f"{before}.{container}.{after}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: WEMoEConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # Release 0.1 left the adapter's name in the keys of the hidden layer.
        state_dict = {NAMED_HIDDEN.sub(r"\1\2", key): tensor for key, tensor in state_dict.items()}
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = {key: tensor for key, tensor in model.state_dict().items() if _belongs_to(key, adapter_name)}
        if config.shared_router:
            routers = {key: tensor for key, tensor in state_dict.items() if ROUTER in key}
            if len({key.partition(ROUTER)[0] for key in routers}) == 1:
                ends = {key.partition(ROUTER)[2]: tensor for key, tensor in routers.items()}
                blocks = {key.partition(ROUTER)[0] for key in own if ROUTER in key}
                state_dict |= {f"{block}{ROUTER}{end}": tensor for block in blocks for end, tensor in ends.items()}
        what = f"the WEMoE adapter {adapter_name!r} (tasks {config.tasks})"
        check_tensors(state_dict, own, what)
        for key, index_TK in state_dict.items():
            if ".wemoe_index." in key:
                weights = model.get_submodule(key.partition(".wemoe_index.")[0]).get_base_layer().weight.numel()
                if index_TK.numel() and not (int(index_TK.min()) >= 0 and int(index_TK.max()) < weights):
                    raise ValueError(
                        f"These weights do not fit {what}: {key} points outside of a weight of {weights} entries. The "
                        "file is damaged, or made for another base model or configuration."
                    )
        return state_dict

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own expects a layer with a `weight`, which a block has not. Devices are right from the start.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to do: routers are made in float32 or more, task vectors have the precision of their models."""

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "a WEMoE adapter has other weights for every image and cannot be merged into one set of them. "
            "`unload()` gives the pretrained model back; for one merged model see `merge_static`."
        )


def _belongs_to(key: str, adapter_name: str) -> bool:
    """Tell whether a tensor of the model is one of the adapter's."""
    return re.search(rf"\.wemoe_[a-z]+\.{re.escape(adapter_name)}(\.|$)", key) is not None
