"""What the tuner does with a block's experts: it allots, counts, merges and freezes them. The rules are in `pool`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import as_in_first_process, gathered, overwrite, several_processes
from .experts import ExpertBank
from .pool import STRATEGIES, Merge, choose_merge, choose_room, choose_union, favourites, merged_start
from .routers import RouterBank

STARTS_FROM = 8
"""Earlier tasks that a new one's experts are merged from, the latest: the hundredth task is to cost what the tenth does."""


class ExpertPool:
    """The part of `MoELoraMergeModel` that acts on the experts of all blocks."""

    def _allot_experts(self, task: str) -> tuple[dict[str, list[int]], bool]:
        """Find the experts of a new task in each block, and make them where there are too few.

        Old tasks are looked at only where their experts have to merge, so that the hundredth task costs what the second does.

        Returns:
            Per block the experts, and whether old ones merged to make room.
        """
        config, banks, routers = self._config, self.expert_banks(), self.router_banks()
        reserved, made_room = config.task_experts == "reserved", False

        def free(name: str) -> list[int]:
            if reserved:
                return sorted(routers[name].columns.free)
            return (~banks[name].frozen).nonzero().flatten().tolist()

        if reserved or config.num_experts == "grow":
            missing = max(config.experts_per_task - len(free(name)) for name in banks)
            size = len(next(iter(banks.values())))
            bound = config.max_experts if config.num_experts == "grow" else size
            growth = max(0, missing if bound is None else min(missing, bound - size))
            if missing > growth and config.merge_at != "pool_full":
                raise ValueError(
                    f"The pool is full: task {task!r} needs {config.experts_per_task} experts, and {missing - growth} of "
                    f"these are missing in a pool of at most {bound}. Make the adapter with num_experts='grow' and no "
                    "`max_experts`, or with merge_at='pool_full', which merges old experts to make room."
                )
            if missing > growth and size + growth <= config.experts_per_task:  # one expert at least is all old tasks'
                raise ValueError(
                    f"The pool is full: task {task!r} needs {config.experts_per_task} experts, and old tasks one at least, "
                    f"in a pool of at most {bound}. Make the adapter with a larger pool (`max_experts`, or `num_experts` if "
                    "that is a number), or with a lower `experts_per_task`."
                )
            self.share_expert_usage()  # while all blocks have one size
            for name in banks:
                banks[name].grow(growth, agreed=True)
                routers[name].grow(growth)
                while reserved and len(free(name)) < config.experts_per_task:
                    self._make_room(banks[name], routers[name])
                    made_room = True
        if reserved:
            return {name: free(name)[: config.experts_per_task] for name in banks}, made_room
        return {name: list(range(len(bank))) for name, bank in banks.items()}, made_room

    def _make_room(self, bank: ExpertBank, routers: RouterBank) -> None:
        used, usage_E = list(set(range(len(bank))) - routers.columns.free), routers.total_usage()
        self._unite(bank, routers, choose_room(used, usage_E, bank.expert, self._config.merge_pair), usage_E)

    def start_merged(self, task: str | None = None, earlier: Sequence[str] | None = None) -> None:
        """Let a task's experts begin anew, from the mean of what other tasks' experts add, see `pool.merged_start`.

        `add_task` does so by itself where `expert_start` is "merged". An optimizer made before keeps its momentum. With
        several processes all of them must call.

        Args:
            task: whose experts; the current task's by default.
            earlier: the tasks that they begin from; by default the latest ones before it, `STARTS_FROM` at most. Where there
                are none, the experts stay as they are.

        Raises:
            ValueError: there is no such task; it would begin from itself, or has experts that are frozen or also another
                task's; experts are shared or not linear.
        """
        config, index = self._config, self._task_index(task)
        if not config.own_linear_experts:
            raise ValueError(
                f"Experts can't start from others where task_experts={config.task_experts!r} and expert_activation="
                f"{config.expert_activation!r}: use 'reserved' and 'identity', as `MoELoraMergeConfig.pool()` does."
            )
        from_tasks = None if earlier is None else [config.task_index(other) for other in earlier]
        name, rest = config.tasks[index], [at for at in range(len(config.tasks)) if at != index]
        if from_tasks is not None and index in from_tasks:
            raise ValueError(f"Task {name!r} can't start from itself: name other tasks in `earlier`, got {earlier}.")
        routers = self.router_banks()
        for block, bank in self.expert_banks().items():
            own = routers[block].experts_of(index)
            others = {expert for at in rest for expert in routers[block].experts_of(at)}
            if not others.isdisjoint(own) or (not bank.frozen.is_meta and bank.frozen[own].any()):
                raise ValueError(
                    f"The experts of task {name!r} can't start anew: in {block} some are frozen, or another task's too. "
                    "Add a new task by `add_task`, which gets experts of its own, and start those."
                )
        self._start_from(index, from_tasks)

    @torch.no_grad()
    def _start_from(self, index: int, from_tasks: Sequence[int] | None = None) -> None:
        """Set a task's experts to what merges from those of other tasks, by default the latest before it, if there are any."""
        from_tasks = range(index)[-STARTS_FROM:] if from_tasks is None else from_tasks
        if not from_tasks:
            return
        for bank, routers in zip(self.expert_banks().values(), self.router_banks().values(), strict=True):
            if bank.frozen.is_meta:
                continue
            own = list(dict.fromkeys(routers.experts_of(index)))  # two columns of a router may lead to one expert
            known = [[bank.expert(expert) for expert in routers.experts_of(task)] for task in from_tasks]
            for expert, start in zip(own, merged_start(known, len(own)), strict=True):
                for name, tensor in start.items():
                    as_in_first_process(tensor)
                    overwrite(getattr(bank, name)[expert], tensor)

    def expert_usage(self, task: str | None = None) -> dict[str, Tensor]:
        """Tell how often a task selected each expert in training, since it began.

        With several processes the counts are summed over all of them, and all of them must call.

        Args:
            task: its name; the current one by default, as in all that follows.

        Returns:
            Per block, int64 of shape E.

        Raises:
            ValueError: there is no such task, or no task is set.
        """
        index = self._task_index(task)
        self.share_expert_usage()
        return {name: routers.usage_of(index) for name, routers in self.router_banks().items()}

    def share_expert_usage(self) -> None:
        """Add what every process has counted since the last time to the usage they agree on. All must call."""
        banks = list(self.router_banks().values())
        device = banks[0].usage.device
        fresh = torch.stack([routers.take_unshared_usage().to(device) for routers in banks])
        if several_processes():
            dist.all_reduce(fresh)
        for routers, counts in zip(banks, fresh, strict=True):
            routers.usage += counts.to(routers.usage.device)

    def forget_unshared_usage(self) -> None:
        """Drop what this process has counted since counts were last shared: a step that was not taken."""
        for routers in self.router_banks().values():
            routers.take_unshared_usage()

    def reset_expert_usage(self) -> None:
        """Start counting the current task's selections at zero. Without a current task there is nothing to count."""
        if self.current_task is None:
            return
        index = self._task_index(None)
        self.share_expert_usage()
        for routers in self.router_banks().values():
            routers.usage[index] = 0

    @torch.no_grad()
    def merge_experts(
        self, optimizer: torch.optim.Optimizer | None = None, *, keep: int = 1, task: str | None = None
    ) -> dict[str, Merge]:
        """Merge two experts in every block, as the configuration says.

        As published, the least used trainable expert is overwritten by the union of the two most used; with
        merge_routing="redirect", two of the task's own experts become one. With several processes all of them must call;
        they decide alike.

        Args:
            optimizer: forgets its state of the overwritten experts, so that they start without momentum.
            keep: with "redirect", leave the task at least so many experts.
            task: whose selections count, see `expert_usage`.

        Returns:
            Per block that had something to merge, which expert became the union of which two.
        """
        index, config = self._task_index(task), self._config
        self.share_expert_usage()
        merges = {}
        for name, layer in self.adapted_layers().items():
            bank, routers = layer.moe_lora_experts[self._adapter], layer.moe_lora_routers[self._adapter]
            usage_E, own = routers.usage_of(index), routers.experts_of(index)
            if config.merge_routing == "redirect":
                merge = choose_union(usage_E, own, bank.expert, config.merge_pair, keep)
            else:
                open_to_it = torch.ones_like(bank.frozen)
                if config.task_experts == "reserved":
                    open_to_it[own] = False
                    usage_E = usage_E.masked_fill(open_to_it, 0)
                    frozen_E = bank.frozen | open_to_it
                else:
                    frozen_E = bank.frozen
                merge = choose_merge(usage_E, frozen_E, bank.expert, config.merge_pair)
            if merge is None:
                continue
            if config.merge_routing == "redirect":
                changed = self._unite(bank, routers, merge, usage_E)
            else:
                changed = self._overwrite(bank, routers, merge, index)
            for parameter in changed if optimizer is not None else ():
                optimizer.state.pop(parameter, None)
            merges[name] = merge
        if merges and config.merge_routing == "redirect":
            self._train_what_may_train()
        return merges

    def _overwrite(self, bank: ExpertBank, routers: RouterBank, merge: Merge, index: int) -> list[nn.Parameter]:
        """Set a third expert to the union of two."""
        union = self._union(bank, merge, routers.usage_of(index))
        for name, tensor in union.items():
            overwrite(getattr(bank, name)[merge.target], tensor)
        if self._config.merge_routing == "mean":
            columns = [routers.experts_of(index).index(expert) for expert in merge]
            for parameter in routers.parameters_of(index):
                weight_DC = gathered(parameter)
                weight_DC[:, columns[0]] = weight_DC[:, columns[1:]].mean(dim=1)
                overwrite(parameter, weight_DC)
        return bank.parameters_of(merge.target)

    def _union(self, bank: ExpertBank, merge: Merge, usage_E: Tensor) -> dict[str, Tensor]:
        used = usage_E[[merge.first, merge.second]].double().tolist()
        share = used[0] / sum(used) if sum(used) else 0.5
        return STRATEGIES[self._config.merge_strategy](bank.expert(merge.first), bank.expert(merge.second), share)

    @torch.no_grad()
    def _unite(self, bank: ExpertBank, routers: RouterBank, merge: Merge, usage_E: Tensor) -> list[nn.Parameter]:
        """Let two experts become one, and all tasks that knew one of them know the union; the other is as new."""
        union = self._union(bank, merge, usage_E)
        for name, tensor in union.items():
            overwrite(getattr(bank, name)[merge.first], tensor)
        bank.frozen[merge.first] |= bank.frozen[merge.second]
        routers.columns.redirect(merge.second, merge.first)  # and so the counts, which are by column
        bank.refresh(merge.second, agreed=True)
        return [*bank.parameters_of(merge.first), *bank.parameters_of(merge.second)]

    def freeze_experts(self, top_k: int, task: str | None = None) -> dict[str, list[int]]:
        """In every block, freeze the `top_k` experts that a task selected most, for good; of its own, if it has such.

        With several processes all of them must call.

        Returns:
            Per block, the experts frozen by this call that were not frozen before.

        Raises:
            ValueError: `top_k` is negative; no task is set.
        """
        if top_k < 0:
            raise ValueError(f"`top_k` must not be negative, got {top_k}.")
        index, reserved = self._task_index(task), self._config.task_experts == "reserved"
        self.share_expert_usage()
        newly_frozen = {}
        for name, layer in self.adapted_layers().items():
            frozen_E = layer.moe_lora_experts[self._adapter].frozen
            routers = layer.moe_lora_routers[self._adapter]
            own = routers.experts_of(index) if reserved else None
            best = favourites(routers.usage_of(index), top_k, own)
            newly_frozen[name] = [expert for expert in best if not frozen_E[expert]]
            frozen_E[newly_frozen[name]] = True
        self._train_what_may_train([index])
        return newly_frozen

    def frozen_experts(self) -> dict[str, list[int]]:
        """List, per block, the frozen experts in ascending order."""
        return {name: bank.frozen.nonzero().flatten().tolist() for name, bank in self.expert_banks().items()}
