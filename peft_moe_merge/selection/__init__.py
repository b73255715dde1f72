"""Which task is an image from? Selectors that choose, per image, a task's routers or plain CLIP.

selector = GaussianSelector(PatchTokens(depth=2))
selector.fit("flowers", batches_of_features)     # task by task; old data is never needed again
task_ids, scores = selector.select(features)     # -1 = none of them: plain CLIP
model.attach_selector(selector)                  # from now on the model selects by itself
"""

from .autoencoder import AutoencoderSelector
from .base import NONE, Selector, decide
from .features import AlexNetFeatures, FeatureSource, ImageFeatures, PatchTokens
from .files import SELECTORS, load_selector, save_selector
from .gaussian import GaussianSelector
from .prototypes import PrototypeSelector, TextSelector

__all__ = [
    "NONE",
    "SELECTORS",
    "AlexNetFeatures",
    "AutoencoderSelector",
    "FeatureSource",
    "GaussianSelector",
    "ImageFeatures",
    "PatchTokens",
    "PrototypeSelector",
    "Selector",
    "TextSelector",
    "decide",
    "load_selector",
    "save_selector",
]
