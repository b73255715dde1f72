"""Fine-tuned copies of one model merged into one set of weights: what WEMoE is compared with. One merge a file."""

from .adamerging import adamerging
from .average import average
from .dare import dare
from .fisher import fisher
from .merge import merge_static
from .registry import STATIC_MERGES, StaticMerge, static_merge
from .regmean import regmean
from .task_arithmetic import task_arithmetic
from .ties import ties

__all__ = [
    "STATIC_MERGES",
    "StaticMerge",
    "adamerging",
    "average",
    "dare",
    "fisher",
    "merge_static",
    "regmean",
    "static_merge",
    "task_arithmetic",
    "ties",
]
