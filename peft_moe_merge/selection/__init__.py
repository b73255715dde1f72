"""Which task is an image from? Selectors that choose, per image, a task's routers or plain CLIP.

selector = DiscriminantSelector(Depths((2,)))
selector.fit("flowers", batches_of_features)     # task by task; old data is never needed again
task_ids, scores = selector.select(features)     # -1 = none of them: plain CLIP
model.attach_selector(selector)                  # from now on the model selects by itself
"""

from .autoencoder import AutoencoderSelector
from .base import NONE, Selector, decide
from .candidates import Candidates, tasks_of_candidates
from .discriminant import DiscriminantSelector
from .features import AlexNetFeatures, Depths, FeatureSource, ImageFeatures, PatchTokens
from .files import SELECTORS, load_selector, save_selector
from .fusion import fuse
from .gaussian import GaussianSelector
from .incremental import IncrementalSelector
from .mixture import mixture
from .prototypes import PrototypeSelector, TextSelector
from .ridge import RidgeSelector

__all__ = [
    "NONE",
    "SELECTORS",
    "AlexNetFeatures",
    "AutoencoderSelector",
    "Candidates",
    "Depths",
    "DiscriminantSelector",
    "FeatureSource",
    "GaussianSelector",
    "ImageFeatures",
    "IncrementalSelector",
    "PatchTokens",
    "PrototypeSelector",
    "RidgeSelector",
    "Selector",
    "TextSelector",
    "decide",
    "fuse",
    "load_selector",
    "mixture",
    "save_selector",
    "tasks_of_candidates",
]
