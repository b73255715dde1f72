"""Fine-tuned copies of one model merged into one set of weights: what WEMoE is compared with."""

from .merge import STATIC_MERGES, merge_static

__all__ = ["STATIC_MERGES", "merge_static"]
