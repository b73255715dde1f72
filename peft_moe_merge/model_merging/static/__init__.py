"""Fine-tuned copies of one model merged into one set of weights: what WEMoE is compared with. One merge a file."""

from .adamerging import adamerging
from .average import average
from .consensus import consensus
from .dare import dare
from .fisher import fisher
from .iso_c import iso_c
from .merge import merge_static
from .registry import STATIC_MERGES, StaticMerge, static_merge
from .regmean import regmean
from .task_arithmetic import task_arithmetic
from .ties import ties
from .tsv import tsv

__all__ = [
    "STATIC_MERGES",
    "StaticMerge",
    "adamerging",
    "average",
    "consensus",
    "dare",
    "fisher",
    "iso_c",
    "merge_static",
    "regmean",
    "static_merge",
    "task_arithmetic",
    "ties",
    "tsv",
]
