"""WEMoE: several fine-tuned copies of one model merged into a weight-ensembling mixture of experts."""

from peft_moe_merge.model_merging.logits import zero_shot_logits
from peft_moe_merge.tuners.registration import register

from .adapt import adapt_routers
from .config import WEMoEConfig
from .merge import merge_finetuned
from .model import WEMoEModel

__all__ = ["WEMoEConfig", "WEMoEModel", "adapt_routers", "merge_finetuned", "zero_shot_logits"]

register(name="wemoe", prefix="wemoe_", config_cls=WEMoEConfig, model_cls=WEMoEModel)
