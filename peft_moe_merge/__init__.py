"""Mixture-of-LoRA experts that merge and freeze while a CLIP model learns one domain after another.

Importing this package registers its methods with PEFT.
"""

from .callback import ExpertMergeCallback
from .router_freeze import RouterFreezeCallback
from .tuners.moe_lora_merge import MoELoraMergeConfig, MoELoraMergeModel

__all__ = ["ExpertMergeCallback", "MoELoraMergeConfig", "MoELoraMergeModel", "RouterFreezeCallback"]
__version__ = "0.1.0"
