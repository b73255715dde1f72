"""Task vectors that do not stand in each other's way: every task's strongest directions, all made orthogonal.

Shapes: T tasks, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import torch

from .finetuned import TaskVectors


class OrthogonalTaskVectors(TaskVectors):
    """Task vectors whose sum is TSV-merge (arXiv 2412.00081), each task's part for itself.

    Of a matrix each of T tasks has a T-th of the rank, in directions that no other task has. Of everything that is no matrix
    a task has a T-th of its task vector.
    """

    def stacked(self, name: str) -> torch.Tensor:
        """Return the tasks' parts of the parameter `name`, `[T, *shape]`."""
        deltas = torch.stack([super(OrthogonalTaskVectors, self).delta(task, name) for task in self.tasks])
        return without_interference(deltas) if deltas.ndim == 3 else deltas / len(self.tasks)

    def delta(self, task: str, name: str) -> torch.Tensor:
        """Return one task's part; the others' have to be computed for that."""
        return self.stacked(name)[self.tasks.index(task)]

    def summed(self, name: str) -> torch.Tensor:
        """Return the sum of all parts."""
        return self.stacked(name).sum(0)

    def factors(self, name: str) -> None:
        """Return None: a part is no LoRA of its own, for it depends on the other tasks."""


def orthogonal(vectors: TaskVectors) -> OrthogonalTaskVectors:
    """Return the same task vectors without interference."""
    return OrthogonalTaskVectors(vectors.tasks, vectors.base, vectors.finetuned)


def without_interference(deltas_TOI: torch.Tensor) -> torch.Tensor:
    """Make the changes of a matrix orthogonal.

    The strongest left singular vectors of all tasks stand side by side and are replaced by the nearest orthonormal ones
    (Procrustes), so are the right ones; singular values stay. Directions whose singular value is no more than rounding, as
    those beyond the rank of a LoRA, are arbitrary and take no room.

    Returns:
        Each task's part, of rank `rank_of_each`.
    """
    tasks = len(deltas_TOI)
    kept = rank_of_each(deltas_TOI.shape[1:], tasks)
    u, values, vh = torch.linalg.svd(deltas_TOI, full_matrices=False)
    rounding = max(deltas_TOI.shape[1:]) * torch.finfo(values.dtype).eps
    present_TR = (values > rounding * values[:, :1])[:, :kept]
    left = nearest_orthonormal(torch.cat(list(u[..., :kept] * present_TR[:, None]), dim=1))
    right = nearest_orthonormal(torch.cat(list(vh[:, :kept].mT * present_TR[:, None]), dim=1))
    left_TOR, right_TIR = (torch.stack(side.chunk(tasks, dim=1)) for side in (left, right))
    return left_TOR * (values[:, :kept] * present_TR)[:, None] @ right_TIR.mT


def rank_of_each(shape: torch.Size, tasks: int) -> int:
    """Return the rank of a task's part of a matrix."""
    return max(1, min(shape) // tasks)


def nearest_orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return the matrix with orthonormal columns (rows, if there are more columns) that is nearest to the given one."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh
