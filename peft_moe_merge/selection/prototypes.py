"""Prototypes of classes: the task that has the class most like the image.

Shapes: B images, F features, T tasks, C classes of a task, P projection width (= F here).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .taskwise import TaskwiseSelector


class PrototypeSelector(TaskwiseSelector):
    """The mean feature of every class; a task's score is the largest cosine to one of its classes. Needs labels."""

    kind = "prototypes"
    own_names = ("prototypes",)

    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sums: dict[int, Tensor] = {}
        for features_BF, labels_B in batches:
            if labels_B is None:
                raise ValueError("Prototypes of classes need labels: pass batches of (features, labels).")
            unit_BF = F.normalize(features_BF.double(), dim=1).cpu()
            for label in labels_B.unique().tolist():
                sums[label] = sums.get(label, 0) + unit_BF[labels_B.cpu() == label].sum(dim=0)
        prototypes_CF = torch.stack([sums[label] for label in sorted(sums)])
        return {"prototypes": F.normalize(prototypes_CF, dim=1).float()}, {}

    def decision_function(self, features_BF: Tensor) -> Tensor:
        with torch.autocast(features_BF.device.type, enabled=False):
            unit_BF = F.normalize(features_BF.float(), dim=1)
            cosines = [unit_BF @ own["prototypes"].T for own in self.prepared(features_BF.device)]
            return torch.stack([cosines_BC.amax(dim=1) for cosines_BC in cosines], dim=1)


class TextSelector(PrototypeSelector):
    """CLIP's own text embeddings of the classes in the place of image prototypes: nothing is learnt but the threshold.

    They are stored all the same, so that selecting does not need the text tower. The source must be `ImageFeatures()`.
    """

    kind = "text"

    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if texts_CP is None:
            raise ValueError("Selecting by text needs the classes' text embeddings: `fit(task, features, texts_CP)`.")
        for _ in batches:
            pass  # the held-out ones are all that counts
        if texts_CP.ndim != 2 or texts_CP.shape[1] != self.width:
            raise ValueError(
                f"Text embeddings of shape {tuple(texts_CP.shape)} can't be compared with image features of width "
                f"{self.width}: take projected text embeddings (classes x width) and `ImageFeatures()`."
            )
        if not texts_CP.isfinite().all():
            raise ValueError(f"The text embeddings of task {task!r} are NaN or infinite.")
        return {"prototypes": F.normalize(texts_CP.detach().float(), dim=1).cpu()}, {}
