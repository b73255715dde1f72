"""One image through a classifier, with what led to the answer: the task, its evidence, the experts, the time.

Nothing is kept: all of a call is in the `Look` that it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
from PIL.Image import Image

from peft_moe_merge import ContinualClassifier
from peft_moe_merge.inference.classifier import Prediction
from peft_moe_merge.selection import NONE

VISION = "vision_model"
"""What the names of an image tower's blocks contain."""


@dataclass(frozen=True)
class Score:
    """How well a task fits an image, in the selector's own unit: a task below its bar is not chosen.

    Attributes:
        task: its name.
        score: the higher the better.
        bar: what the score must reach.
        asked: whether the class names leave the task in question.
    """

    task: str
    score: float
    bar: float
    asked: bool


@dataclass(frozen=True)
class Look:
    """What one image came to.

    Attributes:
        answer: of the adapted model.
        plain: of CLIP without experts, among the same classes.
        reasons: why this task, as sentences.
        scores: of all tasks, the best first; empty where no selector was asked.
        gates: per block of the image tower, the weight of each of its experts; empty where none took part.
        owners: whose each expert is, the task's name; empty where tasks share experts.
        answer_ms, plain_ms: milliseconds from the image to the answer.
    """

    answer: Prediction
    plain: Prediction
    reasons: tuple[str, ...]
    scores: tuple[Score, ...]
    gates: dict[str, list[float]]
    owners: tuple[str, ...]
    answer_ms: float
    plain_ms: float


def look(
    classifier: ContinualClassifier, image: Image, names: list[str] | None = None, task: str | int | None = None
) -> Look:
    """Classify an image, and tell what led there.

    Args:
        classifier: with an adapter of its own.
        image: of any size.
        names: classes that it may be; None for the classes of the task.
        task: its name, or -1 for CLIP without experts; None lets names and selector choose.

    Raises:
        ValueError: names given twice; or nobody can choose the task, and none is given.
    """
    begin = perf_counter()
    with classifier.model.recorded_gates() as recorded:
        answer = classifier(image, task=task, candidates=names)
    middle = perf_counter()
    plain = classifier(image, task=NONE, candidates=names or _classes_of(classifier, answer.task))
    end = perf_counter()
    reasons, scores = _reasons(classifier, image, names, task, answer.task)
    if classifier.fuse and answer.task is not None:
        reasons.append("Among its classes the selector had a say, too.")
    # blocks of the prompts are there too, where class names were encoded on the way
    gates = {block: passes[-1][0].tolist() for block, passes in recorded.items() if VISION in block}
    return Look(
        answer=answer,
        plain=plain,
        reasons=tuple(reasons),
        scores=tuple(scores),
        gates=gates,
        owners=_owners(classifier, gates),
        answer_ms=1000 * (middle - begin),
        plain_ms=1000 * (end - middle),
    )


def _classes_of(classifier: ContinualClassifier, task: str | None) -> object:
    return None if task is None else classifier.tasks[task]


def _owners(classifier: ContinualClassifier, gates: dict[str, list[float]]) -> tuple[str, ...]:
    owners: dict[int, set[str]] = {}
    for task in classifier.tasks:
        for block, experts in classifier.model.experts_of_task(task).items():
            for expert in experts if block in gates else ():
                owners.setdefault(expert, set()).add(task)
    if any(len(tasks) > 1 for tasks in owners.values()):
        return ()
    return tuple(
        owners[expert].pop() if expert in owners else "" for expert in range(max(map(len, gates.values()), default=0))
    )


def _reasons(
    classifier: ContinualClassifier, image: Image, names: list[str] | None, task: str | int | None, chosen: str | None
) -> tuple[list[str], list[Score]]:
    if task is not None:
        return ["The task was given, so nothing was chosen."], []
    known = list(classifier.tasks)
    allowed, may_be_none = list(range(len(known))), True
    reasons = []
    if names is not None:
        evidence = classifier.evidence(names)
        allowed, may_be_none = list(evidence.allowed), not evidence.complete
        if not allowed:
            return ["The class names are those of no task, so CLIP without experts answers."], []
        asked = _listed([known[index] for index in allowed])
        reasons.append(f"The class names are evidence: they leave {asked}{' or no task' if may_be_none else ''}.")
        if len(allowed) == 1 and not may_be_none:
            return [*reasons, "One task is left, so nothing had to be chosen by looking."], []
    scores = _scores(classifier, image, allowed)
    best = next(score for score in scores if score.asked)
    if chosen is None:
        reasons.append(
            f"The selector finds {best.task} most likely, but below the bar of its own images: none of them."
        )
    else:
        over = "" if not may_be_none else f", and above its bar ({best.score:.1f} over {best.bar:.1f})"
        reasons.append(f"The selector finds {chosen} most likely{over}.")
    return reasons, scores


@torch.no_grad()
def _scores(classifier: ContinualClassifier, image: Image, allowed: list[int]) -> list[Score]:
    model, selector = classifier.model, classifier.model.task_selector
    clip = model.get_base_model()
    pixels = classifier.processor(images=[image], return_tensors="pt")["pixel_values"].to(clip.device, clip.dtype)
    scores_BT, bars_BT = selector.judge(model.frozen_features(selector.source, pixels))
    known = zip(classifier.tasks, scores_BT[0].tolist(), bars_BT[0].tolist(), strict=True)
    scores = [Score(name, score, bar, index in allowed) for index, (name, score, bar) in enumerate(known)]
    return sorted(scores, key=lambda one: -one.score)


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
