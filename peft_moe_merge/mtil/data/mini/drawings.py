"""Drawings with captions, what the small CLIP is pretrained on: the concepts as sketch, chalk drawing and flat icon.

None of the three is a style of the tasks. `examples/pretrain_mini_clip.py` draws many; methods that need a reference
set of images and sentences beside the stream draw some anew.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from tqdm.auto import tqdm

from .canvas import COLOURS, IMAGE_SIZE, Concept, Style, plain, render
from .tasks import TASKS

_DRAWING_STREAM = 77  # keeps the seeds of drawings apart from those of the tasks
_SANS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf")
_DRAWN = {"scale": (0.5, 0.95), "shift": 0.2, "rotation": 12.0, "shear": 0.1, "fonts": _SANS}
STYLES: dict[str, tuple[Style, tuple[str, ...]]] = {
    "sketch": (
        Style(plain("white", "cream", "light gray"), line="black", line_width=0.8, tint=10, **_DRAWN),
        ("a sketch of", "a pencil drawing of", "a line drawing of"),
    ),
    "chalk": (
        Style(plain("black", "dark green", "dark blue", "dark gray"), line="white", line_width=1.0, tint=10, **_DRAWN),
        ("a chalk drawing of", "a blackboard with", "white lines showing"),
    ),
    "icon": (
        Style(plain(*COLOURS), tint=12, jitter=8, **_DRAWN),
        ("an icon of", "a cartoon of", "a flat picture of"),
    ),
}
_FULL_FRAME = {"aerial", "scenes", "textures"}
_COLOUR_ONLY = {"colors"}

PHRASES: dict[str, tuple[str, ...]] = {
    "aerial": ("a map of {}", "{} from the air", "the land below: {}"),
    "animals": ("a {}", "a {}, an animal", "the head of a {}"),
    "colors": ("something {}", "the color {}", "a {} thing"),
    "digits": ("the number {}", "the digit {}", "the figure {}"),
    "flowers": ("a {}", "a {} flower", "a {}, a plant"),
    "food": ("a {}", "{} to eat", "a {}, food"),
    "letters": ("the letter {}", "a capital {}", 'the character "{}"'),
    "scenes": ("a scene with {}", "a landscape: {}", "a place: {}"),
    "shapes": ("a {}", "a {} shape", "the outline of a {}"),
    "textures": ("a {} surface", "a {} pattern", "{} material"),
    "vehicles": ("a {}", "a {}, a vehicle", "a {} for transport"),
}


@dataclass(frozen=True)
class Pair:
    """One concept in one style: how to draw it, which rows of the drawings it owns, what may be said of it."""

    concept: int
    draw: Concept
    style: Style
    images: slice
    captions: list[str]


def pair_table(drawings: int) -> list[Pair]:
    """All pairs of a concept and a style it can be drawn in, with their captions."""
    pairs: list[Pair] = []
    concept = 0
    for task in TASKS.values():
        for name, draw in task.concepts.items():
            for style, media in STYLES.values():
                if task.name in _COLOUR_ONLY and style.line is not None:
                    continue
                if task.name in _FULL_FRAME:
                    style = replace(style, scale=(1.0, 1.1), shift=0.05)
                captions = [f"{medium} {phrase.format(name)}" for medium in media for phrase in PHRASES[task.name]]
                start = len(pairs) * drawings
                pairs.append(Pair(concept, draw, style, slice(start, start + drawings), captions))
            concept += 1
    return pairs


def draw_images(pairs: list[Pair], seed: int) -> np.ndarray:
    """Renders all drawings -> uint8 pixels [pairs * drawings, H, W, 3]."""
    pixels = np.empty((pairs[-1].images.stop, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for i, pair in enumerate(tqdm(pairs, desc="drawing", unit="concept")):
        for k in range(pair.images.stop - pair.images.start):
            rng = np.random.default_rng([seed, _DRAWING_STREAM, i, k])
            pixels[pair.images.start + k] = np.asarray(render(pair.draw, pair.style, rng))
    return pixels
