"""Knowledge distillation: answer as a teacher does."""

# B images, C texts to choose from

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2.0
"""Of both softmaxes, as in LwF (arXiv 1606.09282) and ZSCL (arXiv 2303.06628)."""


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
