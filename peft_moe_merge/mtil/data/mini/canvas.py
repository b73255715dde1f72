"""A canvas on which concepts are drawn once and look different in every style.

A concept (`concepts/`) only says what to draw: polygons, discs, lines and glyphs in the coordinates of the square
[-1, 1] x [-1, 1] (y points down) and in named colours. The `Style` says how it looks: filled or as line drawing, on
which background, how much colours, position, light and noise vary. The small CLIP is pretrained in drawing styles and
the tasks are rendered in photo-like ones, so that the domain shift between the two is a difference of `Style` values.

Pixels: everything is drawn at `_SUPERSAMPLING` times the final size with corners rounded to whole pixels, then averaged down;
one NumPy Generator per image makes every random choice.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

IMAGE_SIZE = 32
_SUPERSAMPLING = 3
_SIZE = IMAGE_SIZE * _SUPERSAMPLING
_GLYPH_SIZE = 96
_CIRCLE = np.array([(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * np.pi, 20, endpoint=False)])
_RAMP = np.linspace(-1, 1, IMAGE_SIZE)
_MUTING = 0.35  # how grey the ground of a clutter is, so that it seldom swallows what lies on it

Point = tuple[float, float]
Concept = Callable[["Canvas"], None]

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (25, 25, 28),
    "blue": (45, 85, 205),
    "brown": (125, 78, 42),
    "gray": (130, 130, 132),
    "green": (50, 150, 60),
    "orange": (240, 140, 35),
    "pink": (245, 150, 185),
    "purple": (130, 55, 165),
    "red": (205, 40, 40),
    "white": (242, 242, 240),
    "yellow": (245, 215, 50),
    "cream": (245, 228, 190),
    "dark blue": (22, 36, 92),
    "dark green": (28, 82, 40),
    "dark gray": (72, 74, 80),
    "light blue": (150, 200, 238),
    "light gray": (196, 198, 202),
    "light green": (150, 200, 100),
    "sand": (222, 196, 140),
    "skin": (232, 190, 150),
    "tan": (196, 152, 100),
}

Background = Callable[[np.random.Generator], Image.Image]


def plain(*colours: str) -> Background:
    """A background of one flat colour, drawn at random among `colours`."""

    def paint(rng: np.random.Generator) -> Image.Image:
        return Image.new("RGB", (_SIZE, _SIZE), COLOURS[colours[rng.integers(len(colours))]])

    return paint


def clutter(*colours: str, pieces: int = 6) -> Background:
    """A gradient between two of `colours` (any, when none is named) under `pieces` random polygons of muted colours."""
    names = colours or tuple(COLOURS)

    def paint(rng: np.random.Generator) -> Image.Image:
        ends = np.array([COLOURS[names[i]] for i in rng.integers(len(names), size=2)])
        ends = ends * (1 - _MUTING) + 128 * _MUTING
        row = ends[0] + (ends[1] - ends[0]) * np.linspace(0.0, 1.0, _SIZE)[:, None]
        image = Image.fromarray(row[:, None].round().astype(np.uint8)).resize((_SIZE, _SIZE), Image.Resampling.NEAREST)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.ROTATE_90)
        pen = ImageDraw.Draw(image)
        for _ in range(pieces):
            centre, spread = rng.uniform(0, _SIZE, 2), rng.uniform(0.05, 0.25) * _SIZE
            corners = centre + rng.uniform(-spread, spread, (rng.integers(3, 6), 2))
            piece = 0.5 * np.array(COLOURS[names[rng.integers(len(names))]]) + 0.5 * rng.uniform(30, 225, 3)
            pen.polygon(_whole(corners), fill=_rgb(piece))
        return image

    return paint


@dataclass(frozen=True)
class Style:
    """How a concept is rendered.

    Args:
        background: paints what is behind the concept.
        line: `None` fills shapes with their colours; a colour name draws outlines of that colour on empty shapes;
            `"own"` draws outlines in each shape's own colour.
        line_width: width of outlines in pixels of the final image.
        scale: range of the concept's size relative to the image.
        shift: largest displacement from the centre, in half image widths.
        rotation: largest rotation in degrees, either way.
        shear: largest horizontal shear.
        tint: standard deviation of the colour change of every colour, shared by the whole image (0-255).
        jitter: standard deviation of the colour change of each shape drawn (0-255).
        light: strength of the light falling off across the image (0-1).
        noise: standard deviation of the pixel noise (0-255).
        blur: largest radius of the blur in pixels of the final image.
        occlusion: largest number of small pieces drawn over the concept.
        fonts: font files that glyphs are set in, among those that matplotlib ships.
    """

    background: Background
    line: str | None = None
    line_width: float = 1.0
    scale: tuple[float, float] = (0.75, 0.9)
    shift: float = 0.05
    rotation: float = 5.0
    shear: float = 0.0
    tint: float = 0.0
    jitter: float = 0.0
    light: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    occlusion: int = 0
    fonts: tuple[str, ...] = ("DejaVuSans.ttf",)


class Canvas:
    """A drawing surface in one style; the only thing a concept sees.

    Args:
        rng: makes every random choice of this image, the concept's own included.
        style: how it looks.
    """

    def __init__(self, rng: np.random.Generator, style: Style) -> None:
        self.rng = rng
        self.style = style
        self._image = style.background(rng)
        self._paper = self._image.getpixel((0, 0))
        self._pen = ImageDraw.Draw(self._image)
        self._tint = rng.normal(0, 1, 3) * style.tint
        self.scale = rng.uniform(*style.scale)
        angle = np.deg2rad(rng.uniform(-style.rotation, style.rotation))
        shear = rng.uniform(-style.shear, style.shear)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        half = _SIZE / 2
        self._matrix = half * self.scale * turn @ np.array([[1.0, shear], [0.0, 1.0]])
        self._offset = half * (1 + rng.uniform(-style.shift, style.shift, 2))

    # what concepts call ------------------------------------------------------------------------------------------

    def uniform(self, low: float, high: float) -> float:
        """A uniform random number."""
        return float(self.rng.uniform(low, high))

    def pick(self, *options: str) -> str:
        """One of `options` at random."""
        return options[self.rng.integers(len(options))]

    def polygon(self, points: Sequence[Point], colour: str) -> None:
        """A closed shape."""
        corners = _whole(self._place(points))
        if self.style.line is None:
            self._pen.polygon(corners, fill=self._mix(colour))
        else:
            self._pen.polygon(corners, fill=self._paper)
            self._stroke([*corners, corners[0]], colour, self.style.line_width)

    def disc(
        self, x: float, y: float, radius: float, colour: str, height: float | None = None, turn: float = 0
    ) -> None:
        """A disc or, with a `height` (half of it, as `radius` is half the width), an ellipse turned by `turn` degrees."""
        a, b = radius, radius if height is None else height
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        self.polygon(_CIRCLE @ np.array([[a * cos, a * sin], [-b * sin, b * cos]]) + (x, y), colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """An upright rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def path(self, points: Sequence[Point], colour: str, width: float = 0.08) -> None:
        """An open line of the given width (in half image widths)."""
        pixels = width * self.scale * IMAGE_SIZE / 2
        corners = _whole(self._place(points))
        if self.style.line is None:
            self._pen.line(
                corners, fill=self._mix(colour), width=max(1, round(pixels * _SUPERSAMPLING)), joint="curve"
            )
        else:
            self._stroke(corners, colour, min(pixels, self.style.line_width))

    def glyph(self, character: str, colour: str) -> None:
        """A letter or digit that fills the square, in one of the style's fonts."""
        glyph = _glyph(character, self.style.fonts[self.rng.integers(len(self.style.fonts))])
        # PIL asks where each output pixel comes from: invert the placement, then go to the glyph's own pixels
        back = np.linalg.inv(self._matrix) * _GLYPH_SIZE / 2
        shift = _GLYPH_SIZE / 2 - back @ self._offset
        how = (*back[0], shift[0], *back[1], shift[1])
        mask = glyph.transform((_SIZE, _SIZE), Image.Transform.AFFINE, how, Image.Resampling.BILINEAR)
        if self.style.line is not None:
            wide = mask.filter(ImageFilter.MaxFilter(2 * round(self.style.line_width * _SUPERSAMPLING) + 1))
            self._image.paste(self._line_colour(colour), (0, 0), wide)
            self._image.paste(self._paper, (0, 0), mask)
        else:
            self._image.paste(self._mix(colour), (0, 0), mask)

    # what the renderer calls -------------------------------------------------------------------------------------

    def finish(self) -> Image.Image:
        """The finished image, `IMAGE_SIZE` x `IMAGE_SIZE`, RGB."""
        style, rng = self.style, self.rng
        for _ in range(rng.integers(style.occlusion + 1)):
            corners = rng.uniform(0, _SIZE, 2) + rng.uniform(-0.1, 0.1, (4, 2)) * _SIZE
            self._pen.polygon(_whole(corners), fill=_rgb(rng.uniform(30, 225, 3)))
        image = self._image.reduce(_SUPERSAMPLING)
        if style.blur:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, style.blur)))
        pixels = np.asarray(image, dtype=np.float64)
        if style.light:
            direction = rng.uniform(0, 2 * np.pi)
            fall = math.cos(direction) * _RAMP + math.sin(direction) * _RAMP[:, None]
            gain = (1 + style.light * rng.uniform(-0.5, 0.5)) * (1 + 0.6 * style.light * rng.uniform(0, 1) * fall)
            pixels = pixels * gain[..., None]
        if style.noise:
            pixels = pixels + rng.normal(0, style.noise, pixels.shape)
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    # ---------------------------------------------------------------------------------------------------------------

    def _place(self, points: Sequence[Point]) -> np.ndarray:
        return np.asarray(points, dtype=np.float64) @ self._matrix.T + self._offset

    def _mix(self, colour: str) -> tuple[int, int, int]:
        shade = np.array(COLOURS[colour]) + self._tint
        if self.style.jitter:
            shade = shade + self.rng.normal(0, self.style.jitter, 3)
        return _rgb(shade)

    def _line_colour(self, colour: str) -> tuple[int, int, int]:
        return self._mix(colour if self.style.line == "own" else self.style.line)

    def _stroke(self, corners: list[Point], colour: str, pixels: float) -> None:
        self._pen.line(corners, fill=self._line_colour(colour), width=max(1, round(pixels * _SUPERSAMPLING)))


def render(concept: Concept, style: Style, rng: np.random.Generator) -> Image.Image:
    """Renders one image of a concept.

    Args:
        concept: draws itself on a canvas.
        style: how it looks.
        rng: makes every random choice; the same state gives the same pixels.

    Returns:
        An RGB image of `IMAGE_SIZE` x `IMAGE_SIZE` pixels.
    """
    canvas = Canvas(rng, style)
    concept(canvas)
    return canvas.finish()


def _whole(points: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(point) for point in np.rint(points).astype(np.int64).tolist()]


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    return tuple(min(255, max(0, round(v))) for v in colour.tolist())


@functools.cache
def _font_folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.cache
def _glyph(character: str, font: str) -> Image.Image:
    """The glyph as a mask, scaled so that its ink fills a square of `_GLYPH_SIZE` up to a margin."""
    face = ImageFont.truetype(str(_font_folder() / font), _GLYPH_SIZE)
    left, top, right, bottom = face.getbbox(character)
    ink = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(ink).text((-left, -top), character, font=face, fill=255)
    ink.thumbnail((_GLYPH_SIZE, _GLYPH_SIZE))
    mask = Image.new("L", (_GLYPH_SIZE, _GLYPH_SIZE))
    mask.paste(ink, ((_GLYPH_SIZE - ink.width) // 2, (_GLYPH_SIZE - ink.height) // 2))
    return mask
