"""Continual learning methods, one a file. To add one: write the file, and name its class here."""

from .base import Method, MethodSettings
from .finetune import Finetune
from .icarl import ICaRL
from .lora import Lora
from .lora_per_task import LoraPerTask
from .lwf import LwF
from .lwf_vr import LwFVR
from .moe_adapters import MoEAdapters
from .moe_lora_merge import MoELoraMerge
from .wise_ft import WiseFT
from .zero_shot import ZeroShot
from .zscl import ZSCL

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ZeroShot,
        Finetune,
        Lora,
        LoraPerTask,
        WiseFT,
        LwF,
        LwFVR,
        ZSCL,
        ICaRL,
        MoEAdapters,
        MoELoraMerge,
    )
}

__all__ = ["METHODS", "Method", "MethodSettings"]
