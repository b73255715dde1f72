"""One task as one graph, for machines that have PyTorch and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import CLIPModel

from .classifier import ContinualClassifier


class _ImagesToLogits(nn.Module):
    def __init__(self, clip: CLIPModel, texts_CP: Tensor):
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.register_buffer("texts_CP", texts_CP * clip.logit_scale.detach().exp().float())

    def forward(self, pixel_values: Tensor) -> Tensor:
        features_BP = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return F.normalize(features_BP.float(), dim=-1) @ self.texts_CP.T


def export_task(classifier: ContinualClassifier, task: str) -> ExportedProgram:
    """Trace one task: `pixel_values`, B x 3 x H x W for any B, to logits, B x C in the order of the task's classes.

    The graph holds the vision tower, the experts that the task can choose (see `bake_task`) and the encoded class texts;
    the text tower and all other tasks are left out. A softmax of the logits gives the classifier's probabilities.

        torch.export.save(export_task(classifier, "pets"), "pets.pt2")
        logits = torch.export.load("pets.pt2").module()(pixel_values)

    Raises:
        ValueError: there is no such task.
    """
    clip = classifier.model.bake_task(task).get_base_model()
    size = clip.config.vision_config.image_size
    example = torch.zeros(2, 3, size, size, dtype=clip.dtype, device=clip.device)
    _, texts_CP = classifier.class_texts(task)
    with torch.no_grad():
        return torch.export.export(_ImagesToLogits(clip, texts_CP), (example,), dynamic_shapes=({0: Dim("batch")},))
