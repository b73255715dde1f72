from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft_moe_merge.selection.base import Selector
from peft_moe_merge.selection.files import load_selector, save_selector
from peft_moe_merge.tuners.adapter_config import AdapterConfig
from peft_moe_merge.tuners.moe_lora_merge.pool import PAIRS, STRATEGIES
from peft_moe_merge.tuners.registration import peft_type

FORMAT_VERSION = 1
"""Version of the adapter files that this release writes; it reads all up to this one."""


@dataclass
class MoELoraMergeConfig(AdapterConfig):
    """Configuration of [`MoELoraMergeModel`]: a mixture of LoRA experts with one router per task.

    With its defaults it adapts all encoder MLP blocks of a CLIP model as arXiv 2405.11530 does (55 experts, two per
    sample, rank 64).

    Args:
        num_experts: experts per block, shared by all tasks.
        top_k: experts that a sample takes in a block.
        r: bottleneck rank of an expert.
        lora_alpha: an expert's output is scaled by `lora_alpha / r`.
        lora_dropout: dropout on an expert's hidden units, in training.
        tasks: names of the tasks that have a router, in order; more can be added later by `model.add_task(name)`.
        current_task: the task that routes and trains when no `task_ids` are given; the first one if None. Kept up to
            date by `model.set_task(name)`, so a saved adapter comes back with the task it was saved with.
        target_modules: names, or a regular expression, of the modules to adapt: MLP blocks (`fc1`, activation,
            `fc2`) or `nn.Linear`. None takes all encoder MLP blocks of a CLIP model.
        exclude_modules: names, or a regular expression, of modules to leave out.
        layers_to_transform: layer indexes to adapt; all of them if None.
        layers_pattern: name of the `nn.ModuleList` that `layers_to_transform` counts in, if it is not found.
        modules_to_save: further modules to train and save whole.
        init_weights: True starts with experts that add nothing. False gives them random output weights, for tests.
        expert_input: what the experts of an MLP block read, "residual" (the residual stream, before the layer norm,
            as the paper does) or "normalized" (what the block itself reads).
        routing: "sample" (token 0 of a sample decides for all its tokens, as the paper does) or "token" (every token
            decides for itself, and counts; for `nn.Linear` targets).
        merge_pair: which two experts merge, "most_used" (the paper's) or "most_similar" among the frequently used.
        merge_strategy: how they become one, "average" (the paper's) or "aligned" (hidden units are matched first).
        merge_router_columns: what the router's column of the overwritten expert becomes, "keep" (the paper's) or the
            "mean" of the two experts' columns.
        router_balance_loss: weight of a loss that spreads a task's samples over the experts; 0 is off. With this or the
            next, add `model.auxiliary_loss()` to the loss.
        router_locality_loss: weight of a loss that keeps the router off experts that have moved far; 0 is off.
        selector: kind of the task selector in the adapter's folder, if there is one; set by the library.
        format_version: version of the adapter's files; set by the library.

    Attributes:
        task_selector: the selector itself. It is no field: it has files of its own, which are saved and loaded with
            this configuration's.

    Raises:
        ValueError: for values that contradict themselves or one another, and for files of a newer release.
        TypeError: for a field that this release does not have.
    """

    num_experts: int = field(default=55, metadata={"help": "Experts per block, shared by all tasks."})
    top_k: int = field(default=2, metadata={"help": "Experts that a sample takes in a block."})
    r: int = field(default=64, metadata={"help": "Bottleneck rank of an expert."})
    lora_alpha: float = field(default=6.4, metadata={"help": "An expert's output is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on an expert's hidden units."})
    tasks: list[str] = field(default_factory=lambda: ["default"], metadata={"help": "Tasks with a router, in order."})
    current_task: str | None = field(default=None, metadata={"help": "The task that routes and trains."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "MLP blocks or linear layers to adapt. None: all encoder MLP blocks of a CLIP model."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indexes to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start with experts that add nothing; False: random output weights, for tests."},
    )
    expert_input: Literal["residual", "normalized"] = field(
        default="residual", metadata={"help": "What the experts of an MLP block read."}
    )
    routing: Literal["sample", "token"] = field(
        default="sample", metadata={"help": "Who decides which experts are taken: a sample, or each of its tokens."}
    )
    merge_pair: Literal["most_used", "most_similar"] = field(
        default="most_used", metadata={"help": "Which two experts merge."}
    )
    merge_strategy: Literal["average", "aligned"] = field(
        default="average", metadata={"help": "How two experts become one."}
    )
    merge_router_columns: Literal["keep", "mean"] = field(
        default="keep", metadata={"help": "What the router's column of the overwritten expert becomes."}
    )
    router_balance_loss: float = field(default=0.0, metadata={"help": "Weight of the load balance loss."})
    router_locality_loss: float = field(default=0.0, metadata={"help": "Weight of the locality loss."})
    selector: str | None = field(default=None, metadata={"help": "Kind of the attached task selector."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter's files."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type("MOE_LORA_MERGE")
        self.task_selector: Selector | None = None
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter has format_version={self.format_version}; this release of peft_moe_merge reads up to "
                f"{FORMAT_VERSION}: `pip install -U peft-moe-merge`."
            )
        for name in ("num_experts", "top_k", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} experts cannot be taken from num_experts={self.num_experts}: lower `top_k` or "
                "raise `num_experts`."
            )
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), got {self.lora_dropout!r}.")
        for name in ("router_balance_loss", "router_locality_loss"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"`{name}` is the weight of a loss, at least 0; got {getattr(self, name)!r}.")
        for name, choices in (
            ("expert_input", ("residual", "normalized")),
            ("routing", ("sample", "token")),
            ("merge_pair", tuple(PAIRS)),
            ("merge_strategy", tuple(STRATEGIES)),
            ("merge_router_columns", ("keep", "mean")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {choices}, got {getattr(self, name)!r}.")

        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"`tasks` must be a list of at least one task name, got {self.tasks!r}.")
        self.tasks = list(self.tasks)
        for position, task in enumerate(self.tasks):
            check_new_task(task, self.tasks[:position])
        if self.current_task is None:
            self.current_task = self.tasks[0]
        self.task_index(self.current_task)

        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says where `layers_to_transform` counts: give both or neither.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` does not go with the regular expression target_modules={self.target_modules!r}"
                ": name the layers in the expression, or give `target_modules` as a list."
            )
        self.target_modules = (
            set(self.target_modules) if isinstance(self.target_modules, list) else self.target_modules
        )
        self.exclude_modules = (
            set(self.exclude_modules) if isinstance(self.exclude_modules, list) else self.exclude_modules
        )

    def task_index(self, task: str) -> int:
        """Return the position of `task`, by which its router is stored.

        Raises:
            ValueError: no router for `task`.
        """
        if task not in self.tasks:
            raise ValueError(f"Unknown task {task!r}. Tasks with a router: {self.tasks}. Add one by `add_task(name)`.")
        return self.tasks.index(task)

    @property
    def has_router_losses(self) -> bool:
        """Whether `auxiliary_loss()` has anything to add."""
        return self.router_balance_loss > 0 or self.router_locality_loss > 0

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, and before it the attached selector. Without one, the files of another are ignored."""
        self.selector = None
        if self.task_selector is not None:
            check_selector(self.task_selector, self.tasks, may_lag=True)
            save_selector(self.task_selector, save_directory)
            self.selector = self.task_selector.kind
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MoELoraMergeConfig:
        """Read the configuration, and the selector beside it if it has one.

        Raises:
            FileNotFoundError: the selector is missing.
            ValueError: a file is damaged, or the selector knows other tasks than the adapter.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if config.selector is not None:
            hub, *_ = cls._split_kwargs(kwargs)
            config.task_selector = load_selector(pretrained_model_name_or_path, subfolder, **hub)
            check_selector(config.task_selector, config.tasks, may_lag=True)
        return config


def check_selector(selector: Selector, tasks: list[str], may_lag: bool = False) -> None:
    """Check that a selector chooses between an adapter's tasks: the same ones in the same order.

    Args:
        selector: to check.
        tasks: the adapter's.
        may_lag: the last tasks may lack, as they do while a new task trains.

    Raises:
        ValueError: they differ.
    """
    if selector.tasks != (tasks[: len(selector.tasks)] if may_lag else tasks):
        raise ValueError(
            f"The selector knows the tasks {selector.tasks}, the adapter has {tasks}. They must be the same in the same "
            "order: `selector.fit(task, features)` each task of the adapter, then `model.attach_selector(selector)`."
        )


def check_new_task(task: str, existing: list[str]) -> None:
    """Raise a ValueError unless `task` can join the `existing` ones."""
    if not isinstance(task, str) or not task:
        raise ValueError(f"A task name must be a non-empty string, got {task!r}.")
    if task in existing:
        raise ValueError(f"Task {task!r} is named twice; each task needs a name of its own. Tasks: {existing}.")
