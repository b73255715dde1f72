"""Mixtures of experts for CLIP models that learn many image domains, as PEFT methods.

`MoELoraMergeConfig`: LoRA experts with one router per task, which merge and freeze while tasks come one after another.
`WEMoEConfig`: one model from several fine-tuned ones. Importing this package registers both with PEFT.
"""

from .callbacks import ExpertMergeCallback, RouterFreezeCallback, RouterNoiseCallback
from .inference import ContinualClassifier, TaskClasses
from .model_merging.adaptation import Adaptation
from .model_merging.static import merge_static
from .moved import serve_moved_modules
from .tuners.moe_lora_merge import MoELoraMergeConfig, MoELoraMergeModel
from .tuners.wemoe import WEMoEConfig, WEMoEModel, adapt_routers, merge_finetuned

__all__ = [
    "Adaptation",
    "ContinualClassifier",
    "ExpertMergeCallback",
    "MoELoraMergeConfig",
    "MoELoraMergeModel",
    "RouterFreezeCallback",
    "RouterNoiseCallback",
    "TaskClasses",
    "WEMoEConfig",
    "WEMoEModel",
    "adapt_routers",
    "merge_finetuned",
    "merge_static",
]
__version__ = "0.1.0"

serve_moved_modules()
