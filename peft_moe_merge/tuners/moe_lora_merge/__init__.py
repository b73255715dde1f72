from peft_moe_merge.tuners.registration import register

from .config import MoELoraMergeConfig
from .layer import MLP, Linear, MoELoraMergeLayer
from .model import MoELoraMergeModel

__all__ = ["MLP", "Linear", "MoELoraMergeConfig", "MoELoraMergeLayer", "MoELoraMergeModel"]

register(
    name="moe_lora_merge",
    prefix=MoELoraMergeModel.prefix,
    config_cls=MoELoraMergeConfig,
    model_cls=MoELoraMergeModel,
)
