"""The bank of one block's routers, one per task.

Shapes: B samples, D input width, E experts, C experts that a task's router knows, K top_k, T tasks, G decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoELoraMergeConfig
from .distributed import in_backward, is_sharded, several_processes
from .mixture import tensors_of
from .pool import untouched
from .routing import router_logits, top_k_gates

UNSHARED = 256
"""Counts that are kept one by one before they are added up."""


@dataclass
class Decisions:
    """What a router decided in a training call, kept for losses and for the stop rule.

    Attributes:
        task: whose router it was.
        probabilities_GE: softmax over all experts of the noisy scores, with gradient.
        scores_GE: the scores without noise.
        indices_GK: the experts selected.
    """

    task: int
    probabilities_GE: Tensor
    scores_GE: Tensor
    indices_GK: Tensor


class Columns(nn.Module):
    """Which expert each column of each task's router leads to. Two columns may lead to one expert, if two were merged.

    Kept twice: as buffers, which are saved, and as lists, which the host can read without asking the device.

    Attributes:
        num_experts: E.
        lists: per task, the experts.
        free: those of the E experts that no task knows. It follows from the lists, and is kept so that a further task need
            not look at those before.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.lists: list[list[int]] = []
        self.free = set(range(num_experts))
        self.register_load_state_dict_post_hook(_read_columns)

    def append(self, experts: Sequence[int], device: torch.device) -> None:
        """Add a task."""
        self.register_buffer(str(len(self.lists)), torch.tensor(experts, dtype=torch.int64, device=device))
        self.lists.append(list(experts))
        self.free.difference_update(experts)

    def grow(self, experts: int) -> None:
        """Know of so many more experts."""
        self.free.update(range(self.num_experts, self.num_experts + experts))
        self.num_experts += experts

    def __getitem__(self, task: int) -> Tensor:
        return getattr(self, str(task))

    def experts(self, tasks: Sequence[int], position_B: Tensor | None, columns_BK: Tensor) -> Tensor:
        """Translate columns of each sample's router into experts."""
        if len(tasks) == 1:
            return self[tasks[0]][columns_BK]
        known = [self.lists[task] for task in tasks]
        widest = max(map(len, known))
        padded = [experts + [0] * (widest - len(experts)) for experts in known]
        return torch.tensor(padded, device=columns_BK.device)[position_B].gather(1, columns_BK)

    def set(self, task: int, experts: Sequence[int]) -> None:
        """Let a task's columns lead to these experts."""
        self[task].copy_(torch.tensor(experts))
        self.lists[task] = list(experts)
        self.free = set(untouched(self.num_experts, self.lists))

    def redirect(self, old: int, new: int) -> None:
        """Lead to `new` whatever led to `old`."""
        for task, experts in enumerate(self.lists):
            if old in experts:
                self.set(task, [new if expert == old else expert for expert in experts])


def _read_columns(columns: Columns, incompatible_keys: Any) -> None:
    if not any(buffer.is_meta for buffer in columns.buffers()):
        columns.lists = [columns[task].tolist() for task in range(len(columns.lists))]
        columns.free = set(untouched(columns.num_experts, columns.lists))


class RouterBank(nn.Module):
    """One block's routers, one per task in the order of `config.tasks`, and how often each selected which expert.

    Stored by index, not name: a task may be called anything, also what an adapter or a module is called. A router has a
    column for each expert that its task can choose, and no others.

    Attributes:
        weight: per task D x C.
        noise_weight: per task D x C; empty where routing has no noise.
        columns: per task, which experts these are; None where every task knows all of them, in order.
        usage: int64 T x E, selections in training, of all processes, as far as they have been shared. Where tasks have
            experts of their own T x C, by column: T x E would grow with the square of the tasks.
        stopped: bool T, whose router has learnt enough and trains no more.
        keep_decisions: record what is decided in training.
        unshared: what this process has counted since and not yet shared with the others, (task, counts_E or the number
            of samples that took all of the task's experts). Not a buffer, which data parallel training would overwrite
            with the first process's; and a list, to which threads can append at the same time.
    """

    def __init__(self, config: MoELoraMergeConfig, in_features: int):
        super().__init__()
        self.in_features = in_features
        self.noisy = config.router_noise > 0
        self.weight = nn.ParameterList()
        self.noise_weight = nn.ParameterList()
        self.columns = Columns(config.experts_at_start) if config.stores_columns else None
        self.counts_columns = config.task_experts == "reserved"
        width = 0 if self.counts_columns else config.experts_at_start
        self.register_buffer("usage", torch.zeros(0, width, dtype=torch.int64))
        self.register_buffer("stopped", torch.zeros(0, dtype=torch.bool))
        self.keep_decisions = config.has_router_losses
        self.unshared: list[tuple[int, Tensor | int]] = []
        self.register_state_dict_pre_hook(_count_everything)

    def add_task(self, experts: Sequence[int]) -> None:
        """Add a router that knows these experts.

        Raises:
            RuntimeError: the others are sharded.
        """
        if len(self.weight) and is_sharded(self.weight[0]):
            raise RuntimeError(
                "A task can't be added to a model that is sharded (FSDP). Name all tasks in the config beforehand, or save "
                "the adapter, load it into a new model, add the task there and shard that."
            )
        like = self.weight[0] if len(self.weight) else torch.empty(())
        for routers in (self.weight, self.noise_weight) if self.noisy else (self.weight,):
            shape = (self.in_features, len(experts))
            routers.append(nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)))
        wider = max(0, len(experts) - self.usage.shape[1]) if self.counts_columns else 0
        self.usage = F.pad(self.usage, (0, wider, 0, 1))
        self.stopped = F.pad(self.stopped, (0, 1))
        if self.columns is not None:
            self.columns.append(experts, self.usage.device)

    def grow(self, experts: int) -> None:
        """Know of so many more experts."""
        if self.columns is not None:
            self.columns.grow(experts)
        if not self.counts_columns:
            self.usage = F.pad(self.usage, (0, experts))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.usage.shape[1] if self.columns is None else self.columns.num_experts

    def usage_of(self, task: int) -> Tensor:
        """Return how often a task selected each of the E experts, as far as counts have been shared."""
        return self._by_expert(slice(task, task + 1))

    def total_usage(self) -> Tensor:
        """Return how often all tasks together selected each of the E experts."""
        return self._by_expert(slice(None))

    def _by_expert(self, tasks: slice) -> Tensor:
        if not self.counts_columns:
            return self.usage[tasks].sum(dim=0)
        usage_E = self.usage.new_zeros(self.num_experts)
        for task in range(len(self.weight))[tasks]:
            usage_E.index_add_(0, self.columns[task], self.usage[task, : len(self.columns[task])])
        return usage_E

    def experts_of(self, task: int) -> list[int]:
        """List the experts that a task's router knows, column by column."""
        return list(range(self.num_experts)) if self.columns is None else self.columns.lists[task]

    def parameters_of(self, task: int) -> list[nn.Parameter]:
        """Return one router's parameters."""
        return [routers[task] for routers in (self.weight, self.noise_weight) if len(routers)]

    def count(self, task: int, counts: Tensor | int) -> None:
        """Add selections of this process: counts_E, or the number of samples that took all experts of the task."""
        self.unshared.append((task, counts))
        if len(self.unshared) > UNSHARED and not several_processes():
            self.usage += self.take_unshared_usage()

    def take_unshared_usage(self) -> Tensor:
        """Return what this process has counted and not shared, of the shape of `usage`, and forget it."""
        counted, fresh = len(self.unshared), torch.zeros_like(self.usage)
        for task, counts in self.unshared[:counted]:
            if isinstance(counts, int):
                fresh[task, : len(self.experts_of(task))] += counts
            elif self.counts_columns:
                known = self.experts_of(task)
                for column in {known.index(expert) for expert in known}:  # if two lead to one expert, the first counts
                    fresh[task, column] += counts[known[column]].to(fresh.device)
            else:
                fresh[task] += F.pad(counts, (0, self.num_experts - len(counts))).to(fresh.device)
        del self.unshared[:counted]  # what another thread has appended meanwhile stays
        return fresh

    def forward(
        self,
        x_BD: Tensor,
        tasks: Sequence[int],
        top_k: int,
        position_B: Tensor | None = None,
        noise: float = 0.0,
        record: list[Decisions] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let each sample's router decide.

        Args:
            x_BD: what the routers look at.
            tasks: whose routers they are.
            top_k: K.
            position_B: for each sample, the position of its task in `tasks`; None when there is one.
            noise: factor on the exploration noise; 0 outside training.
            record: gets what was decided.

        Returns:
            indices_BK and gates_BK, see `top_k_gates`.
        """
        logits_BC = self.logits(x_BD, tasks, position_B, noise)
        with torch.autocast(x_BD.device.type, enabled=False):
            indices_BK, gates_BK = top_k_gates(logits_BC, min(top_k, logits_BC.shape[1]))
        if self.columns is not None:
            indices_BK = self.columns.experts(tasks, position_B, indices_BK)
        if record is not None:
            record += self.decisions(x_BD, logits_BC, indices_BK, tasks, position_B)
        return indices_BK, gates_BK

    def logits(self, x: Tensor, tasks: Sequence[int], position_B: Tensor | None = None, noise: float = 0.0) -> Tensor:
        """Score the experts that the tasks know: ... x C; -inf where another task of the batch knows more."""
        # A choice between experts is a comparison of close numbers: half precision would decide it by rounding.
        dtype = torch.promote_types(self.weight[0].dtype, torch.float32)
        if len(tasks) == 1 and not noise and not torch.is_autocast_enabled(x.device.type):  # nothing to be done before
            return x.to(dtype) @ self.weight[tasks[0]].to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            weight, masked_TC = self._of_tasks(self.weight, tasks, dtype)
            noise_weight = self._of_tasks(self.noise_weight, tasks, dtype)[0] if noise else None
            logits = router_logits(x.to(dtype), weight, noise_weight, position_B, noise)
            return logits if masked_TC is None else logits.masked_fill(masked_TC[position_B], -torch.inf)

    @staticmethod
    def _of_tasks(weights: nn.ParameterList, tasks: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return one task's weights, D x C, or those of several, T x D x C, and where these are padded, T x C."""
        if len(tasks) == 1:
            return weights[tasks[0]].to(dtype), None
        own = tensors_of(weights, tasks)
        widths = [weight.shape[1] for weight in own]
        if len(set(widths)) == 1:
            return torch.stack(own).to(dtype), None
        padded_TDC = torch.stack(
            [F.pad(weight, (0, max(widths) - width)).to(dtype) for weight, width in zip(own, widths, strict=True)]
        )
        device = padded_TDC.device
        return padded_TDC, torch.arange(max(widths), device=device) >= torch.tensor(widths, device=device).unsqueeze(1)

    @torch.compiler.disable
    def decisions(
        self, x_BD: Tensor, logits_BC: Tensor, indices_BK: Tensor, tasks: Sequence[int], position_B: Tensor | None
    ) -> list[Decisions]:
        """Say what was decided, task by task, spread over all E experts."""
        if in_backward():
            return []
        scores_BC = self.logits(x_BD.detach(), tasks, position_B).detach()
        decisions = []
        for position, task in enumerate(tasks):
            rows = slice(None) if position_B is None else position_B == position
            width = self.weight[task].shape[1]
            probabilities, scores = logits_BC[rows, :width].softmax(dim=-1), scores_BC[rows, :width]
            if self.columns is not None:
                columns = self.columns[task].expand(len(scores), -1)
                everything = probabilities.new_zeros(len(scores), self.num_experts)
                probabilities = everything.scatter_add(1, columns, probabilities)
                scores = torch.full_like(everything, -torch.inf).scatter(1, columns, scores)
            decisions.append(Decisions(task, probabilities, scores, indices_BK[rows]))
        return decisions


def _count_everything(routers: RouterBank, prefix: str, keep_vars: bool) -> None:
    # Alone, the process may save at any moment and no count is lost. With others it would have to wait for them here;
    # there, the counts in a state dict are those of the last time they were shared, which is every optimizer step.
    if not several_processes():
        routers.usage += routers.take_unshared_usage()
