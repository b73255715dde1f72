"""Knowledge distillation: answer as a teacher does."""

# B images, C texts to choose from

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..settings import check_at_least, setting
from .whole_clip import WholeClipSettings

TEMPERATURE = 2.0
"""Of both softmaxes, as in LwF (arXiv 1606.09282) and ZSCL (arXiv 2303.06628)."""


@dataclass
class DistillationSettings(WholeClipSettings):
    """Of methods that train all weights and distil."""

    distillation_weight: float = setting(1.0, "lwf, lwf_vr, zscl, icarl: of the distillation loss")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 0, "distillation_weight")


@dataclass
class ExtraBatchSettings(DistillationSettings):
    """Of methods that look at other things beside a task's batch."""

    extra_batch_size: int = setting(
        64, "random sentences, reference images or exemplars per step, on top of the task's"
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "extra_batch_size")


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor) -> Tensor:
    """Tell how far the student's choice is from the teacher's.

    Kullback-Leibler divergence of the softmax at temperature T = 2 from that of the teacher, mean over rows, times T^2
    so that gradients do not shrink with T (Hinton et al., arXiv 1503.02531). It differs from the cross-entropy that LwF
    and ZSCL write down by the teacher's entropy, which has no gradient.

    Args:
        student_BC: logits; gradients go through these.
        teacher_BC: logits.
    """
    log_student_BC = F.log_softmax(student_BC.float() / TEMPERATURE, dim=-1)
    log_teacher_BC = F.log_softmax(teacher_BC.float() / TEMPERATURE, dim=-1)
    return F.kl_div(log_student_BC, log_teacher_BC, reduction="batchmean", log_target=True) * TEMPERATURE**2
