"""LwF-VR: on a task's images, keep answering random sentences as before."""

from __future__ import annotations

from typing import Any

import torch

from ..data.task import Task
from .distillation import ExtraBatchSettings
from .lwf import LwF

WORDS = 6
"""Of a random sentence."""


class LwFVR(LwF):
    """LwF whose sentences are random words of the tokenizer's vocabulary, others at each step.

    Ding et al., Don't stop learning: towards continual learning for the CLIP model, arXiv 2207.09248 (vocabulary
    replay). Simplified: only tokens that are ASCII words take part, sentences have a fixed number of words, and only the
    images' choice among sentences is distilled. Nothing of earlier tasks is needed, so the first task distils too.
    """

    name = "lwf_vr"
    settings_class = ExtraBatchSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        tokenizer = self.processor.tokenizer
        special = set(tokenizer.all_special_ids)
        words = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special)
        self.words = sorted({word for word in words if word.isascii() and word.isalpha()})

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    def distilled_texts(self) -> list[str]:
        size = (self.settings.extra_batch_size, WORDS)
        chosen = torch.randint(len(self.words), size, generator=self.generator)
        return [" ".join(self.words[word] for word in sentence) for sentence in chosen.tolist()]
