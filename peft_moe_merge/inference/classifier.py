"""Images in; label, task and probabilities out.

Shapes: B images, R routes (the tasks, then CLIP without experts), V routes that some image takes, in a row, C classes of a
task or candidates, N prompts, P projection width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.selection.candidates import Candidates, check_candidates, same_name, tasks_of_candidates
from peft_moe_merge.selection.discriminant import DiscriminantSelector
from peft_moe_merge.selection.fusion import fuse
from peft_moe_merge.selection.incremental import IncrementalSelector
from peft_moe_merge.selection.mixture import mixture
from peft_moe_merge.tuners.moe_lora_merge.config import MoELoraMergeConfig, check_selector
from peft_moe_merge.tuners.moe_lora_merge.context import PLAIN

from .classes import ANY_CLASS, TaskClasses, as_task_classes, read_classes, write_classes
from .rgb import load_rgb
from .zero_shot import class_features, cosines, prompts_of

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prediction:
    """What an image is.

    Attributes:
        label: the most probable class.
        score: its probability.
        task: whose routers and classes it was judged by, the likeliest where several were mixed; None for CLIP without
            experts.
        probabilities: of all classes in question, in their order; they add up to 1.
    """

    label: str
    score: float
    task: str | None
    probabilities: dict[str, float]


class ContinualClassifier:
    """Classifies images of all tasks that an adapter has learnt.

    An image that belongs to task `t` is encoded by the routers of `t` and told apart among the classes of `t`, whose
    prompts are encoded by the same routers. An image of no known task takes CLIP without experts and is told apart
    among `open_classes`. Images of different tasks share a batch. Class texts are encoded once; after training the
    model further, make a new classifier.

        classifier = ContinualClassifier(model, processor, {"pets": ["cat", "dog"], "food": ["soup", "pie"]})
        classifier("tom.jpg", task="pets").label
        classifier("tom.jpg", candidates=["cat", "tiger"]).label

    **Candidates are evidence.** Whoever asks which of some classes an image shows tells much about its task. A task may
    route an image only if its classes are among the candidates: where these are the classes of one task or several
    together, one of those tasks; otherwise tasks that share at least half of the smaller of the two lists, by equal names
    or by text embeddings of plain CLIP with a cosine of at least `similarity`. Among several, the attached selector
    chooses; it also tells images of no task where some candidates are of none. The task that it chooses has never been
    told apart from the other tasks, so candidates that are classes of those alone have probability 0. Where no task is left, CLIP without experts
    answers, as if nothing had been learnt; so asking about what is new costs nothing of its zero-shot ability.

    Args:
        model: a CLIP with an adapter of [`MoELoraMergeConfig`]; it is put into evaluation mode.
        processor: of the CLIP.
        tasks: the classes of every task of the adapter, by its name: their names, or [`TaskClasses`] with templates.
        open_classes: what an image of no known task may be; default: the classes of all tasks, each by the templates
            of the first task that has it.
        batch_size: images per forward pass.
        similarity: cosine between the embeddings of "a photo of a ..." of two class names from which on they mean the
            same; above 1, only equal names do.
        soft: where a selector chooses, take the likeliest tasks of each image, up to three that have 95 % of its posterior, and
            mix their class probabilities by it. Each costs a pass. CLIP without experts is one of them, see
            [`IncrementalSelector.posterior`].
        fuse: let the attached selector have a say in the class, too, where a task routes: a `DiscriminantSelector` with
            `means="classes"`, fitted with labels that count the task's class names. It costs a pass of plain CLIP as
            deep as the selector looks, unless that chooses the task anyway. See [`fuse`].

    Raises:
        TypeError: the adapter is of another method.
        ValueError: `tasks` are not those of the adapter; `fuse` without such a selector.
    """

    def __init__(
        self,
        model: PeftModel,
        processor: CLIPProcessor,
        tasks: Mapping[str, TaskClasses | Sequence[str]],
        *,
        open_classes: TaskClasses | Sequence[str] | None = None,
        batch_size: int = 64,
        similarity: float = 0.95,
        soft: bool = False,
        fuse: bool = False,
    ):
        config = model.peft_config[model.active_adapter]
        if not isinstance(config, MoELoraMergeConfig):
            raise TypeError(
                f"The classifier needs an adapter of MoELoraMergeConfig, got one of {type(config).__name__}."
            )
        names = list(config.tasks)
        if set(names) != set(tasks):
            raise ValueError(
                f"The adapter has the tasks {names}, but classes are given for {list(tasks)}: name the same."
            )
        self.model = model.eval()
        self.processor = processor
        self.tasks = {name: as_task_classes(tasks[name]) for name in names}
        self.open_classes = None if open_classes is None else as_task_classes(open_classes)
        self.batch_size = batch_size
        self.similarity = similarity
        self.soft = soft
        self.fuse = fuse
        self._names = names
        self._texts: dict[int, tuple[list[str], Tensor]] = {}
        self._plain: dict[int, Tensor] = {}
        if fuse:
            self._class_selector()
        self._asked: tuple[TaskClasses | tuple[str, ...], dict[int, tuple[list[str], Tensor]]] = ((), {})

    def __call__(
        self,
        images: Image | str | Path | Sequence[Image | str | Path],
        task: str | int | Sequence[str | int] | None = None,
        candidates: TaskClasses | Sequence[str] | None = None,
    ) -> Prediction | list[Prediction]:
        """Classify.

        Args:
            images: one or several, as PIL images of any mode, paths or URLs.
            task: name or id of the images' task, one for all or one per image; -1 for CLIP without experts. None lets
                the candidates and the selector that is attached to the model choose for each image.
            candidates: classes that the images may be, all of them compared where `task` is given; they also tell which
                tasks may route the images (see above). Names are prompted as in their task, those of no task by "a photo of a {}."; all by
                the templates of [`TaskClasses`] where that is given. None takes the classes of the task.

        Returns:
            A prediction, or as many as there are images.

        Raises:
            ValueError: an unknown task; fewer or more tasks than images; no task and no selector, or one that does not
                know all tasks, or has no posterior where tasks are to be mixed; no candidates, or one named twice; no such file; an image whose range of values is not
                known, see `to_rgb`.
            OSError: a file is no image, or a URL can't be reached.
        """
        single = isinstance(images, (str, Path)) or not isinstance(images, Sequence)
        images = [images] if single else list(images)
        given = None if task is None else self._ids(task, len(images))
        asked = None
        if candidates is not None:
            asked = candidates if isinstance(candidates, TaskClasses) else check_candidates(candidates)
        evidence = None if asked is None or given is not None else self.evidence(asked)
        predictions = []
        for start in range(0, len(images), self.batch_size):
            stop = start + self.batch_size
            batch = [load_rgb(image) for image in images[start:stop]]
            predictions += self._predict(batch, None if given is None else given[start:stop], asked, evidence)
        return predictions[0] if single else predictions

    def _ids(self, task: str | int | Sequence[str | int], count: int) -> list[int]:
        tasks = [task] * count if isinstance(task, (str, int)) else list(task)
        if len(tasks) != count:
            raise ValueError(f"{len(tasks)} tasks for {count} images: give one, or one per image.")
        known = {name: index for index, name in enumerate(self._names)}
        ids = [known.get(task, task) for task in tasks]
        unknown = [task for task in ids if isinstance(task, str) or not PLAIN <= task < len(known)]
        if unknown:
            raise ValueError(f"Unknown tasks {unknown}. There are {known}, and -1 for CLIP without experts.")
        return ids

    @torch.no_grad()
    def _predict(
        self,
        images: list[Image],
        ids: list[int] | None,
        asked: TaskClasses | tuple[str, ...] | None,
        evidence: Candidates | None,
    ) -> list[Prediction]:
        clip = self.model.get_base_model()
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(clip.device, clip.dtype)
        selector = self._class_selector() if self.fuse else None
        seen_BF = None if selector is None else self.model.frozen_features(selector.source, pixels)
        if ids is None:
            shares_BR = self._select(pixels, evidence, seen_BF)
        else:
            shares_BR = self._all_of(torch.tensor(ids, device=clip.device))
        rows_V, routes_V = shares_BR.nonzero(as_tuple=True)
        ids_V = routes_V.where(routes_V < len(self._names), PLAIN)
        features = self.model.get_image_features(pixel_values=pixels[rows_V], task_ids=ids_V).pooler_output
        features_VP = F.normalize(features.float(), dim=-1)
        found: list[dict[str, float]] = [{} for _ in images]
        for task in ids_V.unique().tolist():
            labels, texts_CP = self.class_texts(task) if asked is None else self._candidate_texts(task, asked)
            of_task = (ids_V == task).nonzero().squeeze(1)
            logits = clip.logit_scale.exp().float() * cosines(features_VP[of_task], texts_CP)
            if evidence is not None and task != PLAIN:
                logits[:, sorted(evidence.ruled_out(task))] = -torch.inf
            log_likely = logits.log_softmax(dim=-1)
            if selector is not None and task != PLAIN:
                known_K, posterior_BK = selector.class_posterior(seen_BF[rows_V[of_task]], task)
                columns_K, asked_K = self._columns(task, known_K.tolist(), labels)
                log_likely = fuse(
                    logits, torch.tensor(columns_K, dtype=torch.long, device=logits.device), posterior_BK[:, asked_K]
                )
            likely = shares_BR[rows_V[of_task], routes_V[of_task], None] * log_likely.exp()
            for row, probabilities in zip(rows_V[of_task].tolist(), likely.tolist(), strict=True):
                for label, probability in zip(labels, probabilities, strict=True):
                    found[row][label] = found[row].get(label, 0.0) + probability
        predictions = []
        for by_label, route in zip(found, shares_BR.argmax(dim=1).tolist(), strict=True):
            best = max(by_label, key=by_label.get)
            predictions.append(Prediction(best, by_label[best], (*self._names, None)[route], by_label))
        return predictions

    def _class_selector(self) -> DiscriminantSelector:
        """Return the attached selector, if it has a say in classes."""
        selector = self.model.task_selector
        if not isinstance(selector, DiscriminantSelector) or not selector.needs_labels:
            got = (
                "none is attached" if selector is None else f"the attached {type(selector).__name__} knows tasks alone"
            )
            raise ValueError(
                f"fuse=True asks a selector that knows classes, and {got}: fit a `DiscriminantSelector.for_classes(model)`, "
                "then `model.attach_selector(selector)`."
            )
        check_selector(selector, self._names)
        for task, own in zip(self._names, selector.own, strict=True):
            if len(own["counts"]) > len(self.tasks[task].class_names):
                raise ValueError(
                    f"The selector was fitted with labels up to {len(own['counts']) - 1} of task {task!r}, for which "
                    f"{len(self.tasks[task].class_names)} classes are named: name all, in the order of the labels."
                )
        return selector

    def _all_of(self, ids_B: Tensor) -> Tensor:
        """Let one route have all of each image: shares B x R."""
        routes = len(self._names) + 1
        return F.one_hot(ids_B.where(ids_B != PLAIN, routes - 1), routes).float()

    def _columns(self, task: int, known: list[int], labels: list[str]) -> tuple[list[int], list[int]]:
        """Find the classes of a task that are asked about: where in `labels`, and where among the `known` ones they are."""
        rows = {same_name(label): row for row, label in enumerate(labels)} | {
            label: r for r, label in enumerate(labels)
        }
        names = self.tasks[self._names[task]].class_names
        asked: dict[int, int] = {}
        for column, label in enumerate(known):
            row = rows.get(names[label], rows.get(same_name(names[label])))
            if row is not None:
                asked.setdefault(row, column)  # of names that differ in case alone, the first
        return list(asked), list(asked.values())

    def _select(self, pixels: Tensor, evidence: Candidates | None, seen_BF: Tensor | None) -> Tensor:
        """Let candidates and selector choose: the share of each route, B x R."""
        allowed, may_be_none = tuple(range(len(self._names))), True
        if evidence is not None:
            allowed, may_be_none = evidence.allowed, not evidence.complete
            if not allowed or (len(allowed) == 1 and not may_be_none):
                only = allowed[0] if allowed else PLAIN
                return self._all_of(torch.full((len(pixels),), only, device=pixels.device))
        selector = self.model.task_selector
        if selector is None:
            of = "" if evidence is None else f" The candidates leave {[self._names[task] for task in allowed]}"
            of += " or none of them." if of and may_be_none else "." if of else ""
            raise ValueError(
                f"Which task are these images from?{of} Give `task=` (one of {self._names}, or -1 for CLIP without "
                "experts), or let a selector choose: `model.attach_selector(selector)`."
            )
        check_selector(selector, self._names)
        features = self.model.frozen_features(selector.source, pixels) if seen_BF is None else seen_BF
        if not self.soft:
            return self._all_of(selector.select(features, allowed, may_be_none)[0])
        if not isinstance(selector, IncrementalSelector):
            raise ValueError(
                f"soft=True mixes tasks by their posterior, which a {type(selector).__name__} does not have: attach a "
                "DiscriminantSelector or RidgeSelector, or leave `soft` off."
            )
        return mixture(selector.posterior(features, allowed, may_be_none))

    def evidence(self, candidates: TaskClasses | Sequence[str]) -> Candidates:
        """Tell which tasks may route an image that is one of these classes, and whether it can be of none.

        Raises:
            ValueError: no candidates, or one named twice.
        """
        names = check_candidates(as_task_classes(candidates).class_names)
        classes = [self.tasks[task].class_names for task in self._names]
        by_name = tasks_of_candidates(names, classes)
        if self.similarity > 1 or by_name.complete:
            return by_name
        asked_CP = self._plain_texts(names)

        def alike(task: int) -> Tensor:
            if task not in self._plain:
                self._plain[task] = self._plain_texts(classes[task])
            return cosines(asked_CP, self._plain[task])

        return tasks_of_candidates(names, classes, alike, self.similarity)

    def _plain_texts(self, names: Sequence[str]) -> Tensor:
        return self._encode_classes(dict(zip(names, prompts_of(names, ANY_CLASS), strict=True)), PLAIN)[1]

    def _candidate_texts(self, task: int, asked: TaskClasses | tuple[str, ...]) -> tuple[list[str], Tensor]:
        latest = self._asked  # read once: another thread may put its own candidates there meanwhile
        if latest[0] != asked:
            latest = self._asked = (asked, {})
        if task not in latest[1]:
            names = asked.class_names if isinstance(asked, TaskClasses) else asked
            prompts = {name: prompts_of([name], self._templates(task, name, asked))[0] for name in names}
            latest[1][task] = self._encode_classes(prompts, task)
        return latest[1][task]

    def _templates(self, task: int, name: str, asked: TaskClasses | tuple[str, ...]) -> Sequence[str]:
        """Find a candidate's prompt forms: those given, else those of the routing task, else of the first that has it."""
        if isinstance(asked, TaskClasses):
            return asked.templates
        first = [self._names[task]] if task != PLAIN else []
        for of_task in (*first, *self._names):
            if same_name(name) in map(same_name, self.tasks[of_task].class_names):
                return self.tasks[of_task].templates
        return ANY_CLASS

    @torch.no_grad()
    def class_texts(self, task: str | int) -> tuple[list[str], Tensor]:
        """Encode the classes of a task, by name or id, by its routers; those of -1 by CLIP without experts.

        Returns:
            The class names, and their features C x P of unit length, means over the templates.
        """
        (task,) = self._ids(task, 1)
        if task not in self._texts:
            if task != PLAIN:
                sources = [self.tasks[self._names[task]]]
            else:
                sources = list(self.tasks.values()) if self.open_classes is None else [self.open_classes]
            prompts: dict[str, list[str]] = {}
            for classes in sources:
                of_classes = prompts_of(classes.class_names, classes.templates)
                for name, of_class in zip(classes.class_names, of_classes, strict=True):
                    prompts.setdefault(name, of_class)
            self._texts[task] = self._encode_classes(prompts, task)
        return self._texts[task]

    @torch.no_grad()
    def _encode_classes(self, prompts: Mapping[str, list[str]], task: int) -> tuple[list[str], Tensor]:
        features_CP = class_features(
            self.model, self.processor.tokenizer, list(prompts.values()), device=self.model.device, task_id=task
        )
        return list(prompts), features_CP

    # ------------------------------------------------------------------------------------------------ saving, loading

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write adapter, processor and classes; `from_pretrained` reads them, and PEFT the adapter alone.

        Push the folder by `huggingface_hub.HfApi().upload_folder(...)`.
        """
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        write_classes(folder, self.tasks, self.open_classes)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | os.PathLike,
        *,
        clip: CLIPModel | None = None,
        processor: CLIPProcessor | None = None,
        batch_size: int = 64,
        similarity: float = 0.95,
        soft: bool = False,
        fuse: bool = False,
        **download: Any,
    ) -> ContinualClassifier:
        """Load what `save_pretrained` wrote.

        Args:
            adapter: folder, or name on the Hub.
            clip: the CLIP that the adapter is for; default: the one that the adapter names.
            processor: default: the one beside the adapter.
            batch_size, similarity, soft, fuse: as in the constructor.
            download: `revision`, `token`, `cache_dir`, ... of the adapter; the CLIP gets `token` and `cache_dir`.

        Raises:
            FileNotFoundError: the folder has no classes beside the adapter.
            ValueError: the classes are damaged, or the adapter does not name its CLIP, or does not fit `clip`.
        """
        tasks, open_classes = read_classes(adapter, **download)
        if clip is None:
            config = PeftConfig.from_pretrained(adapter, **download)
            if config.base_model_name_or_path is None:
                raise ValueError(f"The adapter {str(adapter)!r} does not say which CLIP it is for: give `clip`.")
            further = {key: download[key] for key in ("token", "cache_dir") if key in download}
            clip = CLIPModel.from_pretrained(
                config.base_model_name_or_path, revision=config.revision, use_safetensors=True, **further
            )
        return cls(
            PeftModel.from_pretrained(clip, adapter, **download),
            processor or CLIPProcessor.from_pretrained(adapter, **download),
            tasks,
            open_classes=open_classes,
            batch_size=batch_size,
            similarity=similarity,
            soft=soft,
            fuse=fuse,
        )
