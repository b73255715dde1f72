"""The table of the 11 tasks: what is drawn, how it looks, and how it is said.

To add a task, write its concepts (`concepts/`) and a row here. The styles are photo-like where the small CLIP was
pretrained on drawings: coloured clutter behind, light, noise, blur, and other fonts than in pretraining.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .canvas import Concept, Style, clutter, plain
from .concepts import aerial, animals, colors, digits, flowers, food, letters, scenes, shapes, textures, vehicles


@dataclass(frozen=True)
class MiniTask:
    """One task of the suite.

    Args:
        name: its name in the stream.
        templates: sentences with one `{}` for the class name; training uses the first, evaluation averages all.
        concepts: class name -> what to draw; the order is the order of the labels.
        style: how it looks; `None` for the one task made of real images (`digits`).
    """

    name: str
    templates: tuple[str, ...]
    concepts: dict[str, Concept]
    style: Style | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in plain words, by label."""
        return tuple(self.concepts)


_OBJECT = Style(
    background=clutter(),
    scale=(0.55, 0.95),
    shift=0.2,
    rotation=20,
    shear=0.2,
    tint=18,
    jitter=14,
    light=0.6,
    noise=12,
    blur=0.8,
    occlusion=2,
)
_FIELD = replace(_OBJECT, background=plain("gray"), scale=(1.0, 1.3), shift=0.15, occlusion=1)

_SERIF = (
    "STIXGeneral.ttf",
    "STIXGeneralItalic.ttf",
    "DejaVuSerif-Italic.ttf",
    "cmr10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)

_TABLE = (
    MiniTask(
        "aerial",
        ("a satellite photo of {}.",),
        aerial.CONCEPTS,
        replace(_FIELD, rotation=180, tint=25, noise=18),
    ),
    MiniTask(
        "animals",
        ("a photo of a {}, a type of animal.",),
        animals.CONCEPTS,
        replace(_OBJECT, background=clutter("green", "brown", "tan", "light green", "gray", pieces=9), jitter=30),
    ),
    MiniTask(
        "colors",
        ("a photo of a {} thing.",),
        colors.CONCEPTS,
        replace(_OBJECT, scale=(0.35, 0.8), shift=0.35, rotation=180, tint=22, light=0.9, occlusion=3),
    ),
    MiniTask(
        "digits",
        ('a photo of the number: "{}".',),
        digits.CONCEPTS,
        None,
    ),
    MiniTask(
        "flowers",
        ("a photo of a {}, a type of flower.",),
        flowers.CONCEPTS,
        replace(
            _OBJECT, background=clutter("green", "dark green", "light green", "brown", pieces=10), tint=28, shear=0.35
        ),
    ),
    MiniTask(
        "food",
        ("a photo of {}, a type of food.",),
        food.CONCEPTS,
        replace(
            _OBJECT,
            background=clutter("brown", "tan", "white", "light gray", pieces=4),
            tint=30,
            rotation=40,
            light=0.8,
        ),
    ),
    MiniTask(
        "letters",
        ('a photo of the letter "{}".',),
        letters.CONCEPTS,
        replace(
            _OBJECT,
            background=clutter(pieces=1),
            fonts=_SERIF,
            scale=(0.75, 0.95),
            shift=0.06,
            rotation=8,
            occlusion=1,
        ),
    ),
    MiniTask(
        "scenes",
        ("a photo of a scene: {}.",),
        scenes.CONCEPTS,
        replace(_FIELD, rotation=10, tint=35, jitter=22, light=0.9, noise=16, occlusion=3),
    ),
    MiniTask(
        "shapes",
        ("a photo of a {}, a type of shape.",),
        shapes.CONCEPTS,
        replace(_OBJECT, background=clutter(pieces=3), scale=(0.65, 0.95), shift=0.1, rotation=12, occlusion=1),
    ),
    MiniTask(
        "textures",
        ("a photo of a {} texture.",),
        textures.CONCEPTS,
        replace(_FIELD, rotation=45, shear=0.3, tint=30),
    ),
    MiniTask(
        "vehicles",
        ("a photo of a {}, a type of vehicle.",),
        vehicles.CONCEPTS,
        replace(
            _OBJECT, background=clutter("light blue", "gray", "light gray", "dark gray", "sand", pieces=8), jitter=28
        ),
    ),
)

TASKS: dict[str, MiniTask] = {task.name: task for task in _TABLE}
"""The suite by name, in Order I (alphabetical)."""
