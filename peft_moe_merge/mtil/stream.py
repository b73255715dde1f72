"""The protocol: train a task, end it, test on all tasks; then the next."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor, get_scheduler

from peft_moe_merge.inference import zero_shot
from peft_moe_merge.selection.candidates import check_candidates

from . import checkpoint
from .checkpoint import Progress
from .data.batches import eval_batches, train_batches
from .data.label_space import LabelSpace
from .data.task import Task
from .fingerprint import fingerprint
from .methods.base import Method, Routed, is_routed
from .preparing import prepared
from .selection import SelectorSettings, StreamSelectors
from .settings import check_at_least, check_choices, check_positive, setting
from .sharding import sharded_copy

SHARDED_OTHERWISE = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class StreamSettings:
    """How a stream trains. The defaults are those of arXiv 2405.11530."""

    steps: int = setting(1000, "optimizer steps per task")
    batch_size: int = setting(64, "images per step, over all processes")
    lr: list[float] | None = setting(None, "peak learning rate, or one per task; default: the suite's, else 1e-3")
    weight_decay: float = setting(0.0, "of AdamW")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = setting("cosine", "of the learning rate")
    warmup_steps: int | None = setting(None, "of the schedule; default: 100, or a tenth of the steps if less")
    crop_scale: float = setting(0.9, "smallest part of an image's area that a random-resized crop keeps")
    max_grad_norm: float | None = setting(None, "clip gradients to this norm; default: do not")
    eval_batch_size: int = setting(256, "images per batch and process when testing")
    num_workers: int = setting(0, "processes that decode images")
    protocol: Literal["mtil", "x_tail"] = setting(
        "mtil", "x_tail: after MTIL's tests, test among all classes of all tasks too, and nobody names the task"
    )

    def __post_init__(self):
        check_choices(self, "schedule")
        check_choices(self, "protocol")
        check_at_least(self, 1, "steps", "batch_size", "eval_batch_size")
        check_at_least(self, 0, "weight_decay", "warmup_steps", "num_workers")
        if self.max_grad_norm is not None:
            check_positive(self, "max_grad_norm")
        if self.lr and not all(lr > 0 for lr in self.lr):
            raise ValueError(f"`lr` must be positive, got {self.lr}.")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"`crop_scale` must lie in (0, 1], got {self.crop_scale}.")
        if self.warmup_steps is None:
            self.warmup_steps = min(100, self.steps // 10)

    def for_tasks(self, tasks: list[Task]) -> StreamSettings:
        """Take the tasks' own learning rates where none is given."""
        return self if self.lr else replace(self, lr=[task.lr for task in tasks])

    def lr_of(self, position: int, task: Task) -> float:
        """Return the peak learning rate of the task at this position."""
        if not self.lr:
            return task.lr
        return self.lr[position] if len(self.lr) > 1 else self.lr[0]

    def eval_batches(self, dataset: Dataset, processor: BaseImageProcessor) -> DataLoader:
        """Go through all images of a data set once, as testing does."""
        return eval_batches(dataset, processor, batch_size=self.eval_batch_size, num_workers=self.num_workers)


@dataclass
class Stream:
    """Tasks to be learnt one after another, and how.

    Attributes:
        tasks: in order.
        settings: how they are trained.
        accelerator: device, precision, processes, trackers.
        selection: selectors to fit and test on the way, with a method that has routers.
        fingerprint: what shapes a run's result; default: all that is known here. An interrupted run goes on only where
            it is the same.

    Raises:
        ValueError: the tasks or settings contradict themselves.
    """

    tasks: list[Task]
    settings: StreamSettings
    accelerator: Accelerator
    selection: SelectorSettings | None = None
    fingerprint: dict[str, Any] | None = None

    def __post_init__(self):
        self.settings = self.settings.for_tasks(self.tasks)
        kind = self.accelerator.distributed_type
        if kind in SHARDED_OTHERWISE or (kind == DistributedType.FSDP and not self.accelerator.is_fsdp2):
            raise ValueError(
                f"A stream adds parameters between tasks, for which models have to be put together; got {kind}. Launch it "
                "data parallel (DDP), or sharded by FSDP2 (`fsdp_version: 2`)."
            )
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"A stream needs tasks with names of their own, got {names}.")
        if len(self.settings.lr) not in (1, len(names)):
            raise ValueError(
                f"{len(self.settings.lr)} learning rates for {len(names)} tasks: give one, or one per task."
            )
        if self.settings.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"batch_size={self.settings.batch_size} can't be divided among {self.accelerator.num_processes} processes."
            )

    def check(self, method: type[Method], settings: Any) -> None:
        """Refuse, before anything trains, a method that can't learn these tasks or can't be tested as asked.

        Raises:
            ValueError: with the reason, and the way out.
        """
        method.check(settings, self.tasks)
        if self.accelerator.distributed_type == DistributedType.FSDP and not method.shardable:
            raise ValueError(f"{method.name} can't be trained in parts (FSDP2). Launch it data parallel (DDP).")
        if not is_routed(method):
            return
        if self.selection and self.selection.selectors:
            for task in self.tasks:
                check_candidates(task.class_names)  # they tell which tasks may be chosen
        elif self.settings.protocol == "x_tail":
            raise ValueError(
                f"Under x_tail nobody names the task, so {method.name} needs a selector to route by: "
                "`--selectors discriminant`, for example."
            )

    def run(
        self,
        build_method: Callable[[], Method],
        output_dir: str | Path,
        *,
        seed: int = 42,
        resume: bool = False,
        stop_after: int | None = None,
    ) -> Progress:
        """Let one method learn the tasks in order.

        Args:
            build_method: makes the method, with its model, anew.
            output_dir: where checkpoints go, one per learnt task, the latest of which stays.
            seed: of everything random.
            resume: go on where an earlier run in `output_dir` was interrupted; the result is the same. Another number of
                processes draws other noise and crops, and a warning says so.
            stop_after: leave after so many tasks, as if interrupted.

        Returns:
            The accuracies after each task and what else is to be told.

        Raises:
            FileExistsError: `output_dir` holds a run and `resume` is off.
            ValueError: the method can't learn these tasks, or the run to be resumed is of other settings, data or
                weights.
            OSError: a checkpoint could not be written; the one before is whole.
            RuntimeError: with several processes, whatever stopped this one, another's end included.
        """
        output_dir = Path(output_dir)
        set_seed(seed)
        method = build_method()
        self.check(type(method), method.settings)
        selection = self.selection if self.selection and self.selection.selectors else None
        selectors = StreamSelectors(selection) if selection and isinstance(method, Routed) else None
        shaped_by = self.fingerprint
        if shaped_by is None:
            told = [self.settings, method.settings, *([selection] if selectors else [])]
            shaped_by = fingerprint(self.tasks, method.model, method.processor, self.accelerator, *told)
        progress = Progress(settings={**shaped_by, **method.content(method.settings), "seed": seed})
        done = checkpoint.load(output_dir, progress.settings, resume)
        if done is not None:
            progress, weights = done
            method.load(weights)
            if progress.processes[-1] != self.accelerator.num_processes:
                method.change_processes(progress.processes[-1], self.accelerator.num_processes)
            if selectors is not None:
                selectors.load(weights / checkpoint.SELECTORS)
            self.accelerator.wait_for_everyone()  # until all have read
            if self.accelerator.is_main_process:
                checkpoint.drop_older(output_dir)
        for position in range(len(progress.matrix), len(self.tasks[:stop_after])):
            with self._said_by_which_process(position, output_dir):
                self._learn(method, position, seed, progress, selectors)
                if self.accelerator.is_main_process:
                    goes_on = position + 1 < len(self.tasks)
                    write = method.save_so_far if goes_on else method.save
                    write_selectors = partial(selectors.save, in_parts=goes_on) if selectors else None
                    checkpoint.save(output_dir, progress, write, write_selectors, goes_on)
                self.accelerator.wait_for_everyone()
        return progress

    def _learn(
        self, method: Method, position: int, seed: int, progress: Progress, selectors: StreamSelectors | None
    ) -> None:
        """Train a task, test on all, and note it."""
        began = time.perf_counter()

        def log(step: int, **values: float) -> None:
            named = {f"{method.name}/seed_{seed}/{name}": value for name, value in values.items()}
            self.accelerator.log(named, step=step)

        task_seed = seed + 1_000_003 * (position + 1)
        set_seed(task_seed)
        self.train(method, position, task_seed, progress, log)
        row = [self.accuracy(method, task) for task in self.tasks]
        progress.matrix.append(row)
        progress.processes.append(self.accelerator.num_processes)
        all_classes = LabelSpace.of_all(self.tasks) if self.settings.protocol == "x_tail" else None
        if selectors is not None:
            selectors.fit(method, self.tasks[position], self.settings, self.accelerator)
            told, x_tail = selectors.evaluate(method, self.tasks, self.settings, self.accelerator, all_classes)
            progress.selection.append(told)
            progress.x_tail += [x_tail] if all_classes is not None else []
            progress.selector_bytes = {name: s.bytes_per_task for name, s in selectors.selectors.items()}
        elif all_classes is not None:
            progress.x_tail.append([[None, None, self.accuracies_among(method, all_classes)]])
        progress.seconds += time.perf_counter() - began
        accuracies = {f"accuracy/{task.name}": value for task, value in zip(self.tasks, row, strict=True)}
        log((position + 1) * self.settings.steps, **accuracies)

    @contextmanager
    def _said_by_which_process(self, position: int, output_dir: Path) -> Iterator[None]:
        """When one of several processes fails the others notice only that it is gone: say so, and how to go on."""
        try:
            yield
        except Exception as error:
            processes = self.accelerator.num_processes
            if processes == 1:
                raise
            raise RuntimeError(
                f"Process {self.accelerator.process_index} of {processes} had to stop in task "
                f"{self.tasks[position].name!r}: {error}. If it lost its connection, another process failed first and "
                f"says why. The tasks learnt before are safe in {str(output_dir)!r}: start all processes again with "
                "`resume=True` (`--resume`)."
            ) from error

    def train(
        self,
        method: Method,
        position: int,
        seed: int,
        progress: Progress,
        log: Callable[..., None] = lambda step, **values: None,
    ) -> None:
        """Let a method learn one task, and note in `progress` how that went. One that has nothing to train takes no steps.

        Args:
            method: the learner.
            position: of the task in the stream.
            seed: of the order of the images.
            progress: gets the losses, and what the method tells.
            log: takes an optimizer step of the stream and named values.
        """
        task = self.tasks[position]
        if method.trains:
            method.begin_task(task)
        else:
            method.model.to(self.accelerator.device).eval()
            method.learn(task)
        parameters = method.trainable_parameters()
        progress.trainable_parameters = max(progress.trainable_parameters, sum(p.numel() for p in parameters))
        if not method.trains:
            return
        with sharded_copy(method, self.accelerator):
            losses = self._optimize(method, position, seed, log) if parameters else []
        method.end_task()
        progress.losses.append(losses)
        progress.history.append(json.loads(json.dumps(method.history())))  # as a resumed run reads it

    def _optimize(self, method: Method, position: int, seed: int, log: Callable[..., None]) -> list[float]:
        """Take the steps of a task, and return their losses."""
        task, settings, accelerator = self.tasks[position], self.settings, self.accelerator
        lr = method.learning_rate(settings.lr_of(position, task))
        optimizer = torch.optim.AdamW(method.parameter_groups(lr), lr=lr, weight_decay=settings.weight_decay)
        schedule = get_scheduler(settings.schedule, optimizer, settings.warmup_steps, settings.steps)
        batches = train_batches(
            task.train,
            method.processor.image_processor,
            steps=settings.steps * accelerator.num_processes,
            batch_size=settings.batch_size // accelerator.num_processes,
            seed=seed,
            crop_scale=settings.crop_scale,
            num_workers=settings.num_workers,
        )
        losses = []
        with prepared(accelerator, method.model, optimizer, batches) as (model, optimizer, batches):
            # sharded ones, if they are now
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            model.train()
            bar = tqdm(batches, desc=task.name, disable=not accelerator.is_main_process, leave=False)
            for batch in bar:
                loss = method.loss(model, batch)
                accelerator.backward(loss)
                if settings.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                if not optimizer.step_was_skipped:
                    schedule.step()
                optimizer.zero_grad()
                method.after_step(optimizer)
                losses.append(loss.detach())
                if len(losses) % 10 == 0:
                    bar.set_postfix(loss=f"{losses[-1].item():.3f}")
                    log(position * settings.steps + len(losses), loss=losses[-1].item(), lr=schedule.get_last_lr()[0])
        return [round(loss, 6) for loss in torch.stack(losses).tolist()]

    @torch.no_grad()
    def accuracy(self, method: Method, task: Task) -> float:
        """Test on a task's test images against its own classes. Top-1, in percent."""
        method.model.to(self.accelerator.device).eval()
        method.prepare_evaluation(task)
        with self.accelerator.autocast():
            classes = LabelSpace.of_task(task)
            return self._accuracy(method, task, classes, method.scorer(classes, self.accelerator.device))

    @torch.no_grad()
    def accuracies_among(self, method: Method, all_classes: LabelSpace) -> list[float]:
        """Test on all tasks' test images against all classes, by a method that has no routes to choose from."""
        method.model.to(self.accelerator.device).eval()
        with self.accelerator.autocast():
            scores = method.scorer(all_classes, self.accelerator.device)
            return [self._accuracy(method, task, all_classes, scores) for task in self.tasks]

    def _accuracy(self, method: Method, task: Task, classes: LabelSpace, scores: Callable[[Tensor], Tensor]) -> float:
        batches = self.accelerator.prepare(self.settings.eval_batches(task.test, method.processor.image_processor))
        columns_K = classes.columns[task.name].to(self.accelerator.device)
        labelled = ((batch["pixel_values"], columns_K[batch["labels"]]) for batch in batches)
        return zero_shot.accuracy(scores, labelled, self.accelerator.gather_for_metrics)


def run_stream(
    tasks: list[Task],
    build_method: Callable[[], Method],
    settings: StreamSettings,
    output_dir: str | Path,
    accelerator: Accelerator,
    selection: SelectorSettings | None = None,
    **how: Any,
) -> Progress:
    """Let one method learn tasks in order: `Stream(...).run(build_method, output_dir, **how)`."""
    return Stream(tasks, settings, accelerator, selection).run(build_method, output_dir, **how)
