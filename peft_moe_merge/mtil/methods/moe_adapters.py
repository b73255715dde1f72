"""MoE-Adapters: ours without merging."""

from __future__ import annotations

from .moe_lora_merge import MoELoraMerge


class MoEAdapters(MoELoraMerge):
    """Experts freeze when a task ends, and never merge.

    After Yu et al., Boosting continual learning of vision-language models via mixture-of-experts adapters, arXiv
    2403.11549. What is compared is merging alone: number, shape and place of the experts, noise and balance of the
    routers are those of our method with the same settings, not that paper's; which router an image takes at test time
    is known, where that paper has autoencoders decide.
    """

    name = "moe_adapters"
    merge_every = None
