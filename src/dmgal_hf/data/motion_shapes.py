"""Motion shapes: a built-in video dataset (ours) whose classes differ by motion alone.

Every clip shows one textured shape moving over a background for 2 seconds. What moves is drawn at random with the same
distribution in every class; how it moves is the class. The picture is a torus (what leaves on the right comes back on
the left), so at every moment the position is uniform on the picture, whatever the motion; so is the angle. Sizes that
change run evenly through one range; a size that stays is drawn evenly from that range. So a single frame, taken at a
random moment, has the same distribution in all classes: it says nothing about the class.

A clip is a pure function of (generator version, preset, seed, class, index). The random draws, hence classes, shapes,
colours and paths, are the same everywhere. Pixels and files are bit-identical on one machine, whatever the number of
processes. Between machines the last bit of a sine or of the colour conversion may differ, which can move single pixels
by a grey level or two; the bytes of the files also depend on the version of x264.
"""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from .clip_looks import (
    FRAMES,
    SIZE,
    camera_walk,
    choose,
    contrasting_colour,
    draw_backdrop,
    log_uniform,
    random_numbers,
    soft_edged,
)
from .made_up_videos import MadeUpVideos

GENERATOR_VERSION = 1  # raise it with any change that alters a clip: it names the cache folder and seeds the clips
RADIUS_RANGE = (16, 26)  # pixels, before the size changes
SCALE_RANGE = 0.9  # change of the logarithm of the size, where it changes; one value, or sizes would tell the class

MotionPath = Callable[[np.ndarray], np.ndarray]


def _along(timing: Callable[[np.ndarray], np.ndarray], x=0.0, y=0.0, turn=0.0, log_scale=0.0) -> MotionPath:
    direction = np.array([[x], [y], [turn], [log_scale]])
    return lambda u: direction * timing(u)


def _together(*paths: MotionPath) -> MotionPath:
    return lambda u: sum(path(u) for path in paths)


# A path maps time u, (frames,) from 0 to 1 over the clip, to (4, frames): x and y in picture widths to the right and
# down, turns clockwise, logarithm of the size. The start is drawn per clip: only changes of x, y and turn matter.
_steady = partial(_along, lambda u: u - 0.5)
_there_and_back = partial(_along, lambda u: 0.5 - np.abs(2 * u - 1))
_stop_and_go = partial(_along, lambda u: np.minimum(u, 0.33) + np.maximum(u, 0.67))
_swing = partial(_along, lambda u: np.sin(4 * np.pi * u))
_zigzag = partial(_along, lambda u: 2 / np.pi * np.arcsin(np.sin(4 * np.pi * u)))
_circle = _together(_along(lambda u: np.cos(2 * np.pi * u), x=0.2), _along(lambda u: np.sin(2 * np.pi * u), y=0.2))


class Motion(NamedTuple):
    """A class: its split ("train" holds the base classes, "test" the novel ones) and how it moves."""

    split: str
    path: MotionPath


# Validation and novel classes vary and combine what base classes show: another direction, the other sense of rotation.
# Within a split every two classes differ plainly in eight uniformly sampled frames.
MOTIONS: dict[str, Motion] = {
    "right": Motion("train", _steady(x=0.6)),
    "left": Motion("train", _steady(x=-0.6)),
    "up": Motion("train", _steady(y=-0.6)),
    "down": Motion("train", _steady(y=0.6)),
    "up_left": Motion("train", _steady(x=-0.42, y=-0.42)),
    "up_right": Motion("validation", _steady(x=0.42, y=-0.42)),
    "down_left": Motion("train", _steady(x=-0.42, y=0.42)),
    "down_right": Motion("test", _steady(x=0.42, y=0.42)),
    "rotate_cw": Motion("train", _steady(turn=0.6)),
    "rotate_ccw": Motion("validation", _steady(turn=-0.6)),
    "rock": Motion("train", _swing(turn=0.11)),
    "grow": Motion("train", _steady(log_scale=SCALE_RANGE)),
    "shrink": Motion("train", _steady(log_scale=-SCALE_RANGE)),
    "grow_and_back": Motion("train", _there_and_back(log_scale=SCALE_RANGE)),
    "shrink_and_back": Motion("test", _there_and_back(log_scale=-SCALE_RANGE)),
    "circle_cw": Motion("train", _circle),
    "circle_ccw": Motion("test", lambda u: _circle(-u)),
    "spiral_out_ccw": Motion("train", lambda u: 1.6 * u * _circle(-1.5 * u)),
    "figure_eight": Motion("validation", _together(_along(lambda u: np.sin(2 * np.pi * u), x=0.24), _swing(y=0.15))),
    "oscillate_horizontal": Motion("train", _swing(x=0.15)),
    "oscillate_vertical": Motion("validation", _swing(y=0.15)),
    "oscillate_rising": Motion("test", _swing(x=0.11, y=-0.11)),
    "oscillate_falling": Motion("train", _swing(x=0.11, y=0.11)),
    "right_and_back": Motion("train", _there_and_back(x=0.4)),
    "left_and_back": Motion("validation", _there_and_back(x=-0.4)),
    "up_and_back": Motion("test", _there_and_back(y=-0.4)),
    "down_and_back": Motion("train", _there_and_back(y=0.4)),
    "stop_and_go_right": Motion("train", _stop_and_go(x=0.7)),
    "zigzag_right": Motion("train", _together(_steady(x=0.5), _zigzag(y=0.12))),
    "zigzag_down": Motion("train", _together(_steady(y=0.5), _zigzag(x=0.12))),
    "arc_right": Motion("train", _together(_steady(x=0.5), _there_and_back(y=-0.35))),
    "roll_right": Motion("train", _together(_steady(x=0.5), _steady(turn=0.6))),
    "roll_left": Motion("test", _together(_steady(x=-0.5), _steady(turn=-0.6))),
    "down_growing": Motion("train", _together(_steady(y=0.5), _steady(log_scale=SCALE_RANGE))),
    "up_shrinking": Motion("validation", _together(_steady(y=-0.5), _steady(log_scale=-SCALE_RANGE))),
    "circle_ccw_pulsing": Motion("train", _together(lambda u: _circle(-u), _there_and_back(log_scale=SCALE_RANGE))),
}


class _Style(NamedTuple):
    backgrounds: tuple[str, ...]
    textures: tuple[str, ...]
    ground_levels: tuple[float, float]  # range (0..1) of the background's red, green and blue
    object_levels: tuple[float, float]  # and of the object's
    contrast: float  # smallest difference in luma (0..1) between the object's and the background's colours


PRESETS = {
    "plain": _Style(("flat",), ("flat", "stripes", "checker", "dots", "gradient"), (0, 0.5), (0.4, 1), 0.2),
    "textured": _Style(
        ("noise", "stripes", "checker"), ("stripes", "checker", "dots", "gradient", "blotches"), (0, 1), (0, 1), 0.15
    ),
}


def _box(p, q, half_width: float, half_height: float):
    return np.maximum(np.abs(p) - half_width, np.abs(q) - half_height)


def _star(p, q):
    sector = np.abs(np.mod(np.arctan2(q, p), 0.4 * np.pi) - 0.2 * np.pi)  # 0 at the notches, 0.2 pi at the five tips
    return np.hypot(p, q) * (0.853 * np.cos(sector) - 0.521 * np.sin(sector)) - 0.384


# Signed distances (negative inside) of shapes that reach at most 1.1 from their centre, at coordinates p, q.
SHAPES = {
    "disc": lambda p, q: np.hypot(p, q) - 1,
    "ring": lambda p, q: np.abs(np.hypot(p, q) - 0.72) - 0.28,
    "triangle": lambda p, q: np.maximum(p, 0.866 * np.abs(q) - 0.5 * p) - 0.53,
    "square": lambda p, q: _box(p, q, 0.76, 0.76),
    "bar": lambda p, q: _box(p, q, 1.0, 0.42),
    "cross": lambda p, q: np.minimum(_box(p, q, 1.0, 0.33), _box(p, q, 0.33, 1.0)),
    "ell": lambda p, q: np.minimum(_box(p, q + 0.5, 0.85, 0.32), _box(p + 0.53, q, 0.32, 0.82)),
    "star": _star,
}


# Weight (0..1) of the object's second colour at p, q in its own unit coordinates; f a frequency; a, b, c phases.
TEXTURES = {
    "flat": lambda f, a, b, c, p, q: np.zeros_like(p),
    "gradient": lambda f, a, b, c, p, q: np.clip(0.5 - 0.5 * q, 0, 1),
    "stripes": lambda f, a, b, c, p, q: soft_edged(np.sin(f * q + a)),
    "checker": lambda f, a, b, c, p, q: soft_edged(np.sin(f * p + a) * np.sin(f * q + b)),
    "dots": lambda f, a, b, c, p, q: np.clip(3 * np.cos(f * p + a) * np.cos(f * q + b) - 1, 0, 1),
    "blotches": lambda f, a, b, c, p, q: soft_edged(np.sin(f * p + a + np.sin(5 * q + b)) + np.sin(f * q + c + 3 * p)),
}


def _paint(frames, centre, radius, angle, shape, texture, colours) -> None:
    """Draw the object into `frames` (frames, SIZE, SIZE, 3) uint8, wrapping around the edges.

    `centre`, `radius` and `angle` as `_draw_track` gives them; `colours` (2, 3) in 0..1. Only the square window around
    the object is computed; it is smaller than the picture, so it never meets itself.
    """
    reach = math.ceil(1.1 * radius.max()) + 1
    offset = np.arange(-reach, reach + 1)
    corner = np.floor(centre).astype(int)
    part = (centre - corner).astype(np.float32)
    dx = offset.astype(np.float32) - part[0][:, None, None]  # (frames, 1, window)
    dy = offset.astype(np.float32)[:, None] - part[1][:, None, None]  # (frames, window, 1)
    radius = radius.astype(np.float32)[:, None, None]
    cos, sin = np.cos(angle).astype(np.float32)[:, None, None], np.sin(angle).astype(np.float32)[:, None, None]
    p, q = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius  # (frames, window, window)
    inside = np.clip(0.5 - radius * shape(p, q), 0, 1)[..., None]  # the edge blends over one pixel
    # A cap of the second colour at one side, whatever the texture: rotation shows on every object, also on a disc.
    mix = np.maximum(texture(p, q), np.clip(0.5 + radius * (p - 0.35), 0, 1))[..., None]
    first, second = colours.astype(np.float32) * 255
    where = (
        np.arange(len(frames))[:, None, None],
        np.mod(corner[1][:, None] + offset, SIZE)[:, :, None],
        np.mod(corner[0][:, None] + offset, SIZE)[:, None, :],
    )
    behind = frames[where].astype(np.float32)
    frames[where] = np.rint(behind + inside * (first + mix * (second - first) - behind)).astype(np.uint8)


def _draw_track(rng, motion: Motion, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the object is: centre (2, frames) and radius (frames,) in pixels, angle (frames,) in radians clockwise."""
    start, angle, radius = SIZE * rng.random((2, 1)), 2 * np.pi * rng.random(), log_uniform(rng, *RADIUS_RANGE)
    speed, kept_scale = log_uniform(rng, 0.8, 1.25), SCALE_RANGE * (rng.random() - 0.5)
    x, y, turn, log_scale = motion.path(np.linspace(0, 1, FRAMES))
    log_scale = log_scale if log_scale.any() else log_scale + kept_scale
    centre = start + speed * SIZE * np.stack([x, y]) + camera
    return centre, radius * np.exp(speed * log_scale), angle + speed * 2 * np.pi * turn


def render_clip(class_name: str, preset: str = "plain", seed: int = 0, index: int = 0) -> np.ndarray:
    """Draw clip `index` of a class.

    Returns:
        (48, 112, 112, 3) uint8 RGB frames, 24 a second; what the video file holds before compression.

    Raises:
        ValueError: if the class or the preset is unknown.
    """
    MOTION_SHAPES.check(preset, class_name)
    rng = random_numbers(
        f"motion_shapes/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{class_name}/{operator.index(index)}"
    )
    camera = camera_walk(rng)
    frames, _, _, paint = _draw_looks(rng, PRESETS[preset], camera)
    paint(*_draw_track(rng, MOTIONS[class_name], camera))
    return frames


def render_still(preset: str = "plain", seed: int = 0, index: int = 0) -> tuple[np.ndarray, str, str]:
    """Draw one picture as the clips show them, to train a backbone that sees but knows no motion.

    Returns:
        (112, 112, 3) uint8 RGB, the name of the shape (one of `SHAPES`) and that of its texture (one of `TEXTURES`).

    Raises:
        ValueError: if the preset is unknown.
    """
    MOTION_SHAPES.check(preset)
    rng = random_numbers(f"still_shapes/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{operator.index(index)}")
    frames, shape, texture, paint = _draw_looks(rng, PRESETS[preset], np.zeros((2, 1)))
    radius = log_uniform(rng, *RADIUS_RANGE) * np.exp(SCALE_RANGE * (rng.random(1) - 0.5))
    paint(SIZE * rng.random((2, 1)), radius, 2 * np.pi * rng.random(1))
    return frames[0], shape, texture


def _draw_looks(rng, style: _Style, camera: np.ndarray) -> tuple[np.ndarray, str, str, Callable]:
    """How a clip looks; nothing of it depends on the class.

    Returns:
        The background (frames, SIZE, SIZE, 3) uint8 for a camera walk (2, frames), the names of shape and texture, and
        what paints the object into it for a centre, a radius and an angle as `_draw_track` gives them.
    """
    frames, grounds = draw_backdrop(rng, style.backgrounds, style.ground_levels, camera)
    apart = [(ground, style.contrast) for ground in grounds]
    first = contrasting_colour(rng, style.object_levels, apart)
    second = contrasting_colour(rng, style.object_levels, [*apart, (first, 0.15)])
    shape, phases = choose(rng, list(SHAPES)), 2 * np.pi * rng.random(3).astype(np.float32)
    texture = choose(rng, style.textures)
    pattern = partial(TEXTURES[texture], log_uniform(rng, 5, 9), *phases)
    paint = partial(_paint, frames, shape=SHAPES[shape], texture=pattern, colours=np.stack([first, second]))
    return frames, shape, texture, paint


MOTION_SHAPES = MadeUpVideos(
    "motion shapes", GENERATOR_VERSION, PRESETS, {name: motion.split for name, motion in MOTIONS.items()}, render_clip
)

load_motion_shapes = MOTION_SHAPES.load
