"""One owner of all settings: what is learnt, from which model, how, by which methods. Checked whole before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import CLIPModel, CLIPProcessor

from . import checkpoint
from .checkpoint import Progress
from .clip import ModelSettings
from .data.suites import DataSettings
from .data.task import Task
from .fingerprint import fingerprint
from .methods import METHODS, MethodSettings
from .methods.base import Method
from .results import empty_results
from .selection import SelectorSettings
from .stream import Stream, StreamSettings


@dataclass
class Experiment:
    """Everything that shapes what methods come to; which of them run, where and with which seed, is up to the calls.

    Data and model are loaded when they are first asked for.

    Args:
        data: what is learnt.
        model: what it is learnt by.
        training: how.
        methods: the settings of all methods.
        selection: selectors to try with methods that have routers.
        accelerator: device, precision, processes, trackers.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: StreamSettings = field(default_factory=StreamSettings)
    methods: MethodSettings = field(default_factory=MethodSettings)
    selection: SelectorSettings = field(default_factory=SelectorSettings)
    accelerator: Accelerator = field(default_factory=Accelerator)

    @cached_property
    def tasks(self) -> list[Task]:
        """The stream, with all images. Raises what `DataSettings.load` raises."""
        with self.accelerator.main_process_first():  # the others find in the cache what it has downloaded
            return self.data.load(progress=self.accelerator.is_main_process)

    def build_clip(self) -> tuple[CLIPModel, CLIPProcessor]:
        """Make the model anew."""
        return self.model.build(self.tasks)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by name, with the tasks' own learning rates where none is given."""
        told = (self.data, self.model, self.training.for_tasks(self.tasks), self.methods, self.selection)
        return {name: value for one in told for name, value in asdict(one).items()}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What shapes a result, the content of data and model included. Runs are compared by it, and by their seeds."""
        told = (self.data, self.model, self.training.for_tasks(self.tasks), self.methods, self.selection)
        return fingerprint(self.tasks, *self.build_clip(), self.accelerator, *told)

    def stream(self, seed: int) -> Stream:
        """Return the stream of a seed, with its few images if they are few."""
        tasks = self.data.draw(self.tasks, seed)
        return Stream(tasks, self.training, self.accelerator, self.selection, self.fingerprint)

    def check(
        self, methods: Sequence[str], seeds: Sequence[int], output_dir: str | Path, *, resume: bool = False
    ) -> None:
        """Find out, before anything trains, whatever would stop one of these runs later.

        Settings out of range are refused when they are made. Here it is their agreement with data, model and the runs of
        before.

        Raises:
            ValueError, FileExistsError, OSError: with what was expected, and the way out.
        """
        for what, given in (("methods", methods), ("seeds", seeds)):
            if not given or len(set(given)) != len(given):
                raise ValueError(f"`{what}` must name at least one, and none twice; got {list(given)}.")
        if unknown := [name for name in methods if name not in METHODS]:
            raise ValueError(f"Unknown methods {unknown}; there are {list(METHODS)}.")
        self.selection.check(*self.build_clip(), self.tasks[0])
        own = {name: METHODS[name].settings_class.of(self.methods) for name in methods}
        for seed in seeds:
            stream = self.stream(seed)
            for name in methods:
                stream.check(METHODS[name], own[name])
                shaped_by = {**self.fingerprint, **METHODS[name].content(own[name]), "seed": seed}
                checkpoint.load(run_folder(output_dir, name, seed), shaped_by, resume)

    def run(
        self,
        method: str,
        seed: int,
        output_dir: str | Path,
        *,
        resume: bool = False,
        stop_after: int | None = None,
        expert_figures: bool = False,
    ) -> Progress:
        """Let a method learn the stream; see `Stream.run`.

        Args:
            method: a key of `METHODS`.
            seed: of everything random.
            output_dir: of the experiment; the run has a folder of its own in it.
            resume: go on with the run that is there.
            stop_after: leave after so many tasks.
            expert_figures: note what a report's pictures of experts show, of a method that has such.
        """

        def build() -> Method:
            made = METHODS[method](*self.build_clip(), self.methods)
            if expert_figures and has_experts_to_watch(method):
                made.watch_experts()
            return made

        return self.stream(seed).run(
            build,
            run_folder(output_dir, method, seed),
            seed=seed,
            resume=resume,
            stop_after=stop_after,
        )

    def results(self, **further: Any) -> dict[str, Any]:
        """Start the document of the results; `further` settings stand beside the experiment's."""
        names = [task.name for task in self.tasks]
        told = {**self.settings, **further, "mixed_precision": self.accelerator.mixed_precision}
        return empty_results(self.data.suite, names, told, self.fingerprint)


def has_experts_to_watch(method: str) -> bool:
    """Tell whether the method of this name has experts of our tuner, which `expert_figures` shows."""
    return callable(getattr(METHODS[method], "watch_experts", None))


def run_folder(output_dir: str | Path, method: str, seed: int) -> Path:
    """Return where the checkpoints of a run are."""
    return Path(output_dir) / method / f"seed_{seed}"
