"""What a WEMoE adapter is made of."""

from __future__ import annotations

import warnings
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from peft_moe_merge.tuners.adapter_config import AdapterConfig
from peft_moe_merge.tuners.registration import peft_type

ROUTERS = {"mlp": "learned", "projection": "projection"}
"""What `gates` was called in release 0.1: `router`, and its values."""


@dataclass
class WEMoEConfig(AdapterConfig):
    """Configuration of a [`WEMoEModel`]: weight-ensembling mixture of experts over fine-tuned copies of one model.

    Sources: WEMoE (arXiv 2402.00433), E-WEMoE (arXiv 2410.21804) for `shared_router` and `sparsity`, SMILE
    (arXiv 2408.10174) for `gates="projection"`.

    Args:
        tasks: the names of the fine-tuned models, in the order of the gates. `merge_finetuned` fills them in.
        scaling: λ of task arithmetic. It weighs the sum of task vectors outside of the MLP blocks, and is the output
            bias of every router, so that before adaptation the whole model is task arithmetic.
        gates: `"learned"` ones are per image, from the mean over its tokens, one set per MLP block. `"projection"`
            needs no training: every targeted linear layer gates each token by the length of its projection on the
            leading right singular vectors of each task vector.
        router_depth: 0 (a learned constant), 1 (linear) or 2 (one hidden layer of the model's width).
        shared_router: one router for all blocks.
        rank: keep task vectors as truncated singular value decompositions of this rank; `None` keeps them whole.
        sparsity: the share of each weight's task vector, smallest magnitudes first, that is dropped and not stored.
        without_interference: take the tasks' orthogonal parts (TSV, arXiv 2412.00081) in place of task vectors: of each
            matrix a T-th of the rank for each of T tasks, which `rank` then is if it is not given. Not published: see `tsv`.
        gate_rank: with `gates="projection"`, how many singular vectors the gates look at.
        top_k: with `gates="projection"`, how many tasks a token is given to.
        target_modules: the MLP blocks (with `gates="projection"` the `nn.Linear` layers): a list of name endings or
            a regular expression. Known for the vision towers of CLIP and SigLIP,
            for ViT and for DINOv2.
        exclude_modules: those of `target_modules` to leave out, in the same form.
        static_modules: full names of the modules outside of the targets whose parameters the fine-tuned models
            changed; they get the sum of task vectors times `scaling`. `merge_finetuned` fills them in.
        router: what `gates` was called in release 0.1, with `"mlp"` for `"learned"`; accepted with a warning.

    Raises:
        ValueError: a value is out of range, or two options contradict each other.
    """

    tasks: list[str] = field(default_factory=list, metadata={"help": "Names of the fine-tuned models."})
    scaling: float = field(default=0.3, metadata={"help": "Weight of the sum of task vectors, and first gate value."})
    gates: Literal["learned", "projection"] = field(default="learned", metadata={"help": "How gates are computed."})
    router_depth: int = field(default=2, metadata={"help": "Layers of a learned router: 0, 1 or 2."})
    shared_router: bool = field(default=False, metadata={"help": "One router for all blocks."})
    rank: int | None = field(default=None, metadata={"help": "Rank of the stored task vectors, None for all."})
    sparsity: float = field(default=0.0, metadata={"help": "Share of a task vector that is dropped."})
    without_interference: bool = field(default=False, metadata={"help": "Make the tasks' changes orthogonal (TSV)."})
    gate_rank: int = field(default=16, metadata={"help": "Singular vectors that projection gates look at."})
    top_k: int = field(default=1, metadata={"help": "Tasks per token with projection gates."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "MLP blocks to ensemble."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Targets to leave out."})
    static_modules: list[str] | None = field(default=None, metadata={"help": "Modules merged by task arithmetic."})
    router: InitVar[str | None] = None

    def __post_init__(self, router: str | None) -> None:
        super().__post_init__()
        if router is not None:
            warnings.warn("`WEMoEConfig.router` is now `gates`, and 'mlp' is 'learned'.", FutureWarning, stacklevel=3)
            if router not in ROUTERS:
                raise ValueError(f"WEMoEConfig: router={router!r}, expected one of {list(ROUTERS)} (now `gates`).")
            self.gates = ROUTERS[router]
        self.peft_type = peft_type("WEMOE")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))

        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"WEMoEConfig: {name}={getattr(self, name)!r}, expected {expected}.")

        require(self.gates in ("learned", "projection"), "gates", "'learned' or 'projection' (training-free)")
        require(self.router_depth in (0, 1, 2), "router_depth", "0, 1 or 2")
        require(self.rank is None or self.rank >= 1, "rank", "a positive integer, or None for whole task vectors")
        require(0.0 <= self.sparsity < 1.0, "sparsity", "a share in [0, 1), such as 0.9")
        require(self.gate_rank >= 1, "gate_rank", "a positive integer")
        require(self.top_k >= 1, "top_k", "a positive integer")
        if len(set(self.tasks)) != len(self.tasks):
            twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
            raise ValueError(f"WEMoEConfig: the task names {twice} occur more than once; every task needs its own.")
        if self.rank is not None and self.sparsity:
            raise ValueError(
                f"WEMoEConfig: rank={self.rank} and sparsity={self.sparsity} are two ways to store a task vector; "
                "choose one of them."
            )
        if self.without_interference and (self.sparsity or self.gates == "projection"):
            raise ValueError(
                "WEMoEConfig: without_interference=True keeps task vectors by their rank, and needs sparsity=0 and "
                f"gates='learned'; got sparsity={self.sparsity} and gates={self.gates!r}."
            )
        if self.gates == "projection":
            if self.shared_router:
                raise ValueError(
                    "WEMoEConfig: shared_router=True needs gates='learned'; projection gates learn nothing."
                )
            if self.sparsity:
                raise ValueError("WEMoEConfig: gates='projection' work with rank=..., not with sparsity=....")
            if self.rank is not None and self.gate_rank > self.rank:
                raise ValueError(
                    f"WEMoEConfig: gate_rank={self.gate_rank} singular vectors are asked of experts of "
                    f"rank={self.rank}; choose gate_rank <= rank."
                )

    @classmethod
    def tsv(cls, **fields: Any) -> WEMoEConfig:
        """Return a configuration whose model is TSV-merge before it adapts, not task arithmetic.

        `scaling` is 1 and task vectors are without interference; other fields as usual. It stores as many numbers of an MLP as
        the MLP has, whatever the number of tasks.
        """
        return cls(**{"scaling": 1.0, "without_interference": True, **fields})


def _router(config: WEMoEConfig) -> str:
    """Return `gates` by its old name and value."""
    warnings.warn("`WEMoEConfig.router` is now `gates`, and 'mlp' is 'learned'.", FutureWarning, stacklevel=2)
    return next(old for old, new in ROUTERS.items() if new == config.gates)


WEMoEConfig.router = property(_router)  # it stands in the place of the default value of the argument of this name
