from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from peft_moe_merge.selection.base import Selector
from peft_moe_merge.selection.files import load_selector, save_selector
from peft_moe_merge.tuners.adapter_config import AdapterConfig
from peft_moe_merge.tuners.registration import peft_type

from .mixture import ACTIVATIONS

FORMAT_VERSION = 2
"""Version of the adapter files that this release writes; it reads all up to this one."""

NO_TASK = ""
"""`current_task` of an adapter that is to leave the model as it is. No task can be called so."""

CHOICES = (
    "task_experts",
    "expert_start",
    "expert_input",
    "routing",
    "merge_pair",
    "merge_strategy",
    "merge_routing",
    "merge_at",
)
"""Fields whose annotation lists what they may be."""

POOL: dict[str, Any] = {
    "num_experts": "grow",
    "task_experts": "reserved",
    "experts_per_task": 2,
    "top_k": 2,
    "r": 8,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "router_noise": 0.0,
    "expert_activation": "identity",
    "merge_strategy": "product",
    "merge_routing": "redirect",
    "merge_at": "pool_full",
}
"""The fields that `MoELoraMergeConfig.pool` sets. How they were chosen: `docs/merging.md`."""


@dataclass
class MoELoraMergeConfig(AdapterConfig):
    """Configuration of [`MoELoraMergeModel`]: a mixture of LoRA experts with one router per task.

    With its defaults it adapts all encoder MLP blocks of a CLIP model as arXiv 2405.11530 does (55 experts, two per
    sample, rank 64, shared by all tasks). `MoELoraMergeConfig.pool(...)` is what we recommend: experts of their own for
    every task, beside all linear layers.

    Args:
        num_experts: experts per block. "grow" makes more whenever a task needs them, up to `max_experts`.
        task_experts: whose the experts are, "shared" (by all tasks, as in the paper) or "reserved" (a task gets
            `experts_per_task` untouched ones of its own in every block, and its routers know no others).
        experts_per_task: how many a task gets, when reserved; with "shared" and "grow", how many unfrozen ones it finds at
            least.
        max_experts: bound of a growing pool; None for none.
        expert_start: what the experts of a task that joins by `add_task` start from, "fresh" (they add nothing) or "merged"
            (the mean of what the latest earlier tasks' experts add, as far as their rank holds it; reserved identity
            experts). Earlier tasks stay as they are either way.
        top_k: experts that a sample takes in a block.
        r: bottleneck rank of an expert.
        lora_alpha: an expert's output is scaled by `lora_alpha / r`.
        use_rslora: scale by `lora_alpha / sqrt(r)` instead (arXiv 2312.03732).
        lora_dropout: dropout on an expert's hidden units, in training.
        expert_activation: between the two matrices of an expert, "relu" (the paper's), another function of
            `torch.nn.functional`, or "identity": then an expert is a plain low-rank update without biases, which can be
            merged exactly and exported as a LoRA.
        tasks: names of the tasks that have a router, in order; more can be added later by `model.add_task(name)`.
        current_task: the task that routes and trains when no `task_ids` are given; the first one if None; none of them,
            so that the model is left as it is, if "". Kept up to date by `model.set_task(name)`, so a saved adapter comes
            back with the task it was saved with.
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
        merge_pair: which two experts merge, "most_used" (the paper's), "most_similar" among the frequently used, or, as a
            control, "random". A full pool merges its most alike experts, whatever this says but "random".
        merge_strategy: how they become one, "average" (the paper's), "aligned" (hidden units are matched first) or
            "product" (the best low-rank approximation of the usage-weighted sum of their updates; identity experts), or,
            as a control, "keep_used" (the more selected one stays as it is, the other is lost).
        merge_routing: what becomes of the routers, "keep" (the paper's: the union overwrites a third expert, whose column
            stays), "mean" (that column becomes the mean of the two experts') or "redirect" (all that chose one of the two
            get the union, and the other's place is free again; reserved experts).
        merge_at: when `ExpertMergeCallback` and the pool merge: every so many "steps" (the paper's), at a late step of a
            task, "task_end", so that it goes on with fewer experts, or when a bounded pool has no place for the next task,
            "pool_full".
        router_noise: factor on the exploration noise in training; 0 routes without noise, and has no parameters for it.
        router_balance_loss: weight of a loss that spreads a task's samples over the experts; 0 is off. This and the next
            join the loss that the model returns in training; to a loss of your own add `model.auxiliary_loss()`.
        router_locality_loss: weight of a loss that keeps the router off experts that have moved far; 0 is off.
        selector: kind of the task selector in the adapter's folder, if there is one; set by the library.
        pool_size: experts per block of a growing pool; set by the library.
        router_widths: how many experts each task's routers know; set by the library where these are not all.
        format_version: version of the adapter's files; set by the library.

    Attributes:
        task_selector: the selector itself. It is no field: it has files of its own, which are saved and loaded with
            this configuration's.

    Raises:
        ValueError: for values that contradict themselves or one another, and for files of a newer release.
        TypeError: for a field that this release does not have.
    """

    num_experts: int | Literal["grow"] = field(
        default=55, metadata={"help": "Experts per block; 'grow' makes more when a task needs them."}
    )
    task_experts: Literal["shared", "reserved"] = field(
        default="shared", metadata={"help": "Whose the experts are: shared by all tasks, or reserved for each."}
    )
    experts_per_task: int = field(default=2, metadata={"help": "Experts of its own that a task gets per block."})
    max_experts: int | None = field(default=None, metadata={"help": "Bound of a growing pool."})
    expert_start: Literal["fresh", "merged"] = field(
        default="fresh",
        metadata={"help": "What a further task's experts start from: nothing, or earlier tasks', merged."},
    )
    top_k: int = field(default=2, metadata={"help": "Experts that a sample takes in a block."})
    r: int = field(default=64, metadata={"help": "Bottleneck rank of an expert."})
    lora_alpha: float = field(default=6.4, metadata={"help": "An expert's output is scaled by lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    expert_activation: str = field(
        default="relu", metadata={"help": f"Inside an expert: one of {', '.join(ACTIVATIONS)}."}
    )
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
    merge_pair: Literal["most_used", "most_similar", "random"] = field(
        default="most_used", metadata={"help": "Which two experts merge."}
    )
    merge_strategy: Literal["average", "aligned", "product", "keep_used"] = field(
        default="average", metadata={"help": "How two experts become one."}
    )
    merge_routing: Literal["keep", "mean", "redirect"] = field(
        default="keep", metadata={"help": "What becomes of the routers that chose the two."}
    )
    merge_at: Literal["steps", "task_end", "pool_full"] = field(
        default="steps", metadata={"help": "When experts merge."}
    )
    router_noise: float = field(default=1.0, metadata={"help": "Factor on the exploration noise in training."})
    router_balance_loss: float = field(default=0.0, metadata={"help": "Weight of the load balance loss."})
    router_locality_loss: float = field(default=0.0, metadata={"help": "Weight of the locality loss."})
    selector: str | None = field(default=None, metadata={"help": "Kind of the attached task selector."})
    pool_size: int | None = field(default=None, metadata={"help": "Experts per block of a growing pool."})
    router_widths: list[int] | None = field(default=None, metadata={"help": "Experts that each task's routers know."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter's files."})
    merge_router_columns: InitVar[str | None] = None

    @classmethod
    def pool(cls, **values: Any) -> MoELoraMergeConfig:
        """Make the configuration that we recommend: every task gets a few experts of its own, plain low-rank updates beside
        all linear layers of both towers, so that nothing is forgotten; the pool grows with the tasks.

        Args:
            values: any fields; they come before those set here, see `POOL`.
        """
        return cls(**{**POOL, **values})

    def __post_init__(self, merge_router_columns: str | None):
        super().__post_init__()
        if merge_router_columns is not None:  # also in files of the first release
            self.merge_routing = merge_router_columns
        self.peft_type = peft_type("MOE_LORA_MERGE")
        self.task_selector: Selector | None = None
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter has format_version={self.format_version}; this release of peft_moe_merge reads up to "
                f"{FORMAT_VERSION}: `pip install -U peft-moe-merge`."
            )
        self.format_version = FORMAT_VERSION
        self._check_numbers()
        self._check_choices()
        self._check_tasks()
        self._check_pool()
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says where `layers_to_transform` counts: give both or neither.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"`layers_to_transform` does not go with the regular expression target_modules={self.target_modules!r}"
                ": name the layers in the expression, or give `target_modules` as a list."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def _check_numbers(self) -> None:
        numbers = ["experts_per_task", "top_k", "r"]
        numbers += ["num_experts"] if self.num_experts != "grow" else []
        numbers += [name for name in ("max_experts", "pool_size") if getattr(self, name) is not None]
        for name in numbers:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                also = ", or 'grow'" if name == "num_experts" else ""
                raise ValueError(f"`{name}` must be a positive integer{also}, got {value!r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"`lora_dropout` must lie in [0, 1), got {self.lora_dropout!r}.")
        for name in ("router_balance_loss", "router_locality_loss", "router_noise"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                what = "a factor" if name == "router_noise" else "the weight of a loss"
                raise ValueError(f"`{name}` is {what}, at least 0; got {getattr(self, name)!r}.")

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        choices = {name: get_args(hints[name]) for name in CHOICES}
        choices["expert_activation"] = tuple(ACTIVATIONS)
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")

    def _check_tasks(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"`tasks` must be a list of at least one task name, got {self.tasks!r}.")
        self.tasks = list(self.tasks)
        for position, task in enumerate(self.tasks):
            check_new_task(task, self.tasks[:position])
        if self.current_task is None:
            self.current_task = self.tasks[0]
        if self.current_task != NO_TASK:
            self.task_index(self.current_task)

    def _check_pool(self) -> None:
        reserved, grows = self.task_experts == "reserved", self.num_experts == "grow"
        name = "experts_per_task" if reserved or grows else "num_experts"
        found = getattr(self, name)
        if self.top_k > found:
            raise ValueError(
                f"top_k={self.top_k} experts cannot be taken from {name}={found}: lower `top_k` or raise `{name}`."
            )
        bound = self.max_experts if grows else self.num_experts
        if self.max_experts is not None and not grows:
            raise ValueError(
                f"`max_experts` bounds a growing pool, but num_experts={self.num_experts}: set num_experts='grow', or "
                "leave `max_experts` out."
            )
        if bound is not None and self.experts_per_task > bound and (reserved or grows):
            raise ValueError(
                f"experts_per_task={self.experts_per_task} do not fit into a pool of at most {bound}: raise "
                f"`{'max_experts' if grows else 'num_experts'}` or lower `experts_per_task`."
            )
        needed = self.experts_per_task * len(self.tasks)
        if reserved and bound is not None and needed > bound and self.router_widths is None:
            raise ValueError(
                f"{len(self.tasks)} tasks with {self.experts_per_task} experts each need {needed}, the pool has {bound}: "
                "raise it, lower `experts_per_task`, or name one task here and add the others by `add_task`, with "
                "merge_at='pool_full', which merges old experts to make room."
            )
        if self.merge_routing == "redirect" and not reserved:
            raise ValueError(
                "merge_routing='redirect' points tasks to the union of their experts, which shared experts have no need "
                "of: use task_experts='reserved', or merge_routing='keep'."
            )
        if self.merge_at == "pool_full" and self.merge_routing != "redirect":
            raise ValueError(
                f"merge_at='pool_full' frees places by merging, which merge_routing={self.merge_routing!r} does not: use "
                "merge_routing='redirect'."
            )
        if self.merge_strategy == "product" and self.expert_activation != "identity":
            raise ValueError(
                "merge_strategy='product' sums linear updates, but experts with expert_activation="
                f"{self.expert_activation!r} are not linear: use expert_activation='identity', or 'average' or 'aligned'."
            )
        if self.expert_start == "merged" and not self.own_linear_experts:
            raise ValueError(
                "expert_start='merged' starts a task's own experts from the sum of earlier tasks' linear updates, but here "
                f"task_experts={self.task_experts!r} and expert_activation={self.expert_activation!r}: use 'reserved' and "
                "'identity', as `MoELoraMergeConfig.pool()` does, or expert_start='fresh'."
            )

    @property
    def own_linear_experts(self) -> bool:
        """Whether tasks have experts of their own, and these are plain low-rank updates, which can be summed."""
        return self.task_experts == "reserved" and self.expert_activation == "identity"

    @property
    def current_index(self) -> int | None:
        """Position of the current task in `tasks`; None where no task is to route."""
        return None if self.current_task == NO_TASK else self.tasks.index(self.current_task)

    @property
    def scaling(self) -> float:
        """What an expert's output is multiplied by."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def stores_columns(self) -> bool:
        """Whether a task's routers know only some experts, so that each has to say which."""
        return self.task_experts == "reserved" or self.num_experts == "grow"

    @property
    def experts_at_start(self) -> int:
        """Experts that a bank is made with."""
        if self.pool_size is not None:
            return self.pool_size
        if self.num_experts != "grow":
            return self.num_experts
        return self.experts_per_task * (len(self.tasks) if self.task_experts == "reserved" else 1)

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
