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

import hashlib
import io
import math
import multiprocessing
import operator
import os
import signal
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, Video
from huggingface_hub import constants
from tqdm.auto import tqdm

GENERATOR_VERSION = 1  # raise it with any change that alters a clip: it names the cache folder and seeds the clips
SIZE = 112  # pixels, height and width
FRAMES = 48
FRAMES_PER_SECOND = 24

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


def _log_uniform(rng, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def _choose(rng, options):
    return options[int(rng.random() * len(options))]


def _colours(rng, number: int, levels: tuple[float, float]) -> np.ndarray:
    return levels[0] + (levels[1] - levels[0]) * rng.random((number, 3))


def _contrasting_colour(rng, levels: tuple[float, float], others: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """A random colour (3,) within levels whose luma differs from each of `others` (colour, margin) by its margin.

    Luma, because video halves the resolution of colour, and some models look at grey. The first of 64 draws that
    fits, else the one that comes nearest.
    """
    luma = np.array([0.299, 0.587, 0.114])
    colours = _colours(rng, 64, levels)
    slack = np.min([np.abs((colours - other) @ luma) - margin for other, margin in others], axis=0)
    return colours[np.argmax(np.minimum(slack, 0))]


def _camera_walk(rng) -> np.ndarray:
    """(2, frames): a smooth random walk of the whole picture, in pixels, of about 2 pixels over the clip."""
    knots = np.cumsum(2.4 * rng.random((2, 9)) - 1.2, axis=1)
    position = np.linspace(0, 8, FRAMES)
    left = np.minimum(position.astype(int), 7)
    ease = 0.5 - 0.5 * np.cos(np.pi * (position - left))
    return knots[:, left] * (1 - ease) + knots[:, left + 1] * ease


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


def _soft_edged(wave):
    """Two-tone weights (0..1) from a wave (-1..1)."""
    return np.clip(0.5 + 2 * wave, 0, 1)


# Weight (0..1) of the object's second colour at p, q in its own unit coordinates; f a frequency; a, b, c phases.
TEXTURES = {
    "flat": lambda f, a, b, c, p, q: np.zeros_like(p),
    "gradient": lambda f, a, b, c, p, q: np.clip(0.5 - 0.5 * q, 0, 1),
    "stripes": lambda f, a, b, c, p, q: _soft_edged(np.sin(f * q + a)),
    "checker": lambda f, a, b, c, p, q: _soft_edged(np.sin(f * p + a) * np.sin(f * q + b)),
    "dots": lambda f, a, b, c, p, q: np.clip(3 * np.cos(f * p + a) * np.cos(f * q + b) - 1, 0, 1),
    "blotches": lambda f, a, b, c, p, q: _soft_edged(
        np.sin(f * p + a + np.sin(5 * q + b)) + np.sin(f * q + c + 3 * p)
    ),
}


def _background(rng, name: str, shift: np.ndarray) -> np.ndarray:
    """Weight (0..1) of the background's second colour, (frames, SIZE, SIZE) float32, periodic like the picture.

    `shift` (2, frames): how far the camera has moved the picture, in pixels, x then y.
    """
    if name == "noise":
        finest = _log_uniform(rng, 4, 14)  # waves a picture
        frequency = np.hypot(np.fft.fftfreq(SIZE, 1 / SIZE)[:, None], np.fft.rfftfreq(SIZE, 1 / SIZE))
        noise = np.fft.rfft2(rng.random((SIZE, SIZE)) - 0.5) * np.exp(-((frequency / finest) ** 2))
        noise = np.fft.irfft2(noise, s=(SIZE, SIZE))
        still = np.clip(0.5 + 0.3 * noise / noise.std(), 0, 1)
    else:
        x = 2 * np.pi * np.arange(SIZE) / SIZE
        across, down = _choose(rng, range(2, 8)) * x, _choose(rng, range(2, 8)) * x[:, None]
        slant = _choose(rng, (-1, 1))
        still = _soft_edged(np.sin(across + slant * down) if name == "stripes" else np.sin(across) * np.sin(down))

    still = np.pad(still.astype(np.float32), (0, SIZE), mode="wrap")
    whole, part = np.mod(np.floor(-shift), SIZE).astype(int), np.mod(-shift, 1).astype(np.float32)
    moved = np.empty((shift.shape[1], SIZE, SIZE), np.float32)
    for frame, ((column, row), (right, lower)) in enumerate(zip(whole.T, part.T, strict=True)):
        window = still[row : row + SIZE + 1, column : column + SIZE + 1]
        rows = window[:-1] + lower * (window[1:] - window[:-1])
        moved[frame] = rows[:, :-1] + right * (rows[:, 1:] - rows[:, :-1])
    return moved


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
    start, angle, radius = SIZE * rng.random((2, 1)), 2 * np.pi * rng.random(), _log_uniform(rng, *RADIUS_RANGE)
    speed, kept_scale = _log_uniform(rng, 0.8, 1.25), SCALE_RANGE * (rng.random() - 0.5)
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
    _check_preset(preset)
    if class_name not in MOTIONS:
        raise ValueError(f"unknown motion class {class_name!r}: use one of {', '.join(MOTIONS)}")
    rng = _random_numbers(
        f"motion_shapes/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{class_name}/{operator.index(index)}"
    )
    camera = _camera_walk(rng)
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
    _check_preset(preset)
    rng = _random_numbers(f"still_shapes/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{operator.index(index)}")
    frames, shape, texture, paint = _draw_looks(rng, PRESETS[preset], np.zeros((2, 1)))
    radius = _log_uniform(rng, *RADIUS_RANGE) * np.exp(SCALE_RANGE * (rng.random(1) - 0.5))
    paint(SIZE * rng.random((2, 1)), radius, 2 * np.pi * rng.random(1))
    return frames[0], shape, texture


def _random_numbers(name: str) -> np.random.Generator:
    # Philox, and only its method `random`: the same numbers on every machine.
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _draw_looks(rng, style: _Style, camera: np.ndarray) -> tuple[np.ndarray, str, str, Callable]:
    """How a clip looks; nothing of it depends on the class.

    Returns:
        The background (frames, SIZE, SIZE, 3) uint8 for a camera walk (2, frames), the names of shape and texture, and
        what paints the object into it for a centre, a radius and an angle as `_draw_track` gives them.
    """
    grounds, backdrop = list(_colours(rng, 1, style.ground_levels)), _choose(rng, style.backgrounds)
    if backdrop == "flat":
        frames = np.empty((camera.shape[1], SIZE, SIZE, 3), np.uint8)
        frames[:] = np.rint(255 * grounds[0])
    else:
        grounds.append(np.clip(grounds[0] + 0.5 * (rng.random(3) - 0.5), 0, 1))
        levels = np.rint(np.linspace(255 * grounds[0], 255 * grounds[1], 256)).astype(np.uint8)
        frames = np.take(levels, np.rint(255 * _background(rng, backdrop, camera)).astype(np.uint8), axis=0)
    apart = [(ground, style.contrast) for ground in grounds]
    first = _contrasting_colour(rng, style.object_levels, apart)
    second = _contrasting_colour(rng, style.object_levels, [*apart, (first, 0.15)])
    shape, phases = _choose(rng, list(SHAPES)), 2 * np.pi * rng.random(3).astype(np.float32)
    texture = _choose(rng, style.textures)
    pattern = partial(TEXTURES[texture], _log_uniform(rng, 5, 9), *phases)
    paint = partial(_paint, frames, shape=SHAPES[shape], texture=pattern, colours=np.stack([first, second]))
    return frames, shape, texture, paint


def _encode(frames: np.ndarray) -> bytes:
    """One H.264 mp4 file, the same bytes on every call."""
    file = io.BytesIO()
    # bitexact: no library version in the file's header.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=FRAMES_PER_SECOND,
            # A keyframe every 12 frames and no B-frames: a reader that wants 8 of the 48 frames starts at the keyframe
            # before each, and gets frames in the order they are stored. Longer groups save little at this size.
            options={"preset": "veryfast", "crf": "18", "g": "12", "bf": "0", "sc_threshold": "0"},
        )
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1  # x264's output depends on the number of its threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _clip_name(index: int) -> str:
    return f"{index:05d}.mp4"


def _write_clip(job: tuple[str, str, str, int, int]) -> None:
    """Render one clip into its class folder; top-level, with plain arguments, so that a spawned process can run it."""
    folder, class_name, preset, seed, index = job
    target = Path(folder) / class_name / _clip_name(index)
    content = _encode(render_clip(class_name, preset, seed, index))
    # Written aside and renamed: a file under its final name is always whole, also when the program is killed or when
    # another one writes the same clip (the same bytes) at the same time.
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        aside.write_bytes(content)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _write_clips(jobs: list[tuple], num_proc: int) -> None:
    bar = {"total": len(jobs), "desc": "Making motion shapes", "unit": "clip"}
    if num_proc == 1:
        for _ in tqdm(map(_write_clip, jobs), **bar):
            pass
        return
    # The start method is the program's own choice (`multiprocessing.set_start_method`), else the platform's default.
    # Ctrl-C is the parent's business: it then drops what is queued, and the processes end with the clip at hand.
    start_method, ignore_ctrl_c = multiprocessing.get_context(), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(num_proc, start_method, initializer=signal.signal, initargs=ignore_ctrl_c)
    try:
        for _ in tqdm(pool.map(_write_clip, jobs, chunksize=4), **bar):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r} of motion shapes: use one of {', '.join(PRESETS)}")


def load_motion_shapes(
    preset: str = "plain",
    clips_per_class: int = 40,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> DatasetDict:
    """Make the motion shapes clips that are not yet in the cache, and offer them as datasets.

    Args:
        preset: "plain" (flat backgrounds) or "textured" (textured backgrounds, no plain objects, less contrast).
        clips_per_class: clips a class. Asking for more later only adds files; asking for fewer takes the first ones.
        seed: another seed, other clips of the same classes, in a folder of their own.
        cache_dir: where the clips go, by default `<HF_HOME>/dmgal_hf/motion_shapes`. A complete cache is only read.
        num_proc: processes that make clips, by default one a CPU core. The clips do not depend on it.

    Returns:
        DatasetDict of "train" (base classes), "validation" and "test" (novel classes), with disjoint classes. Columns:
        `video` (`Video(decode=False)`), `label` (`ClassLabel` with the names of all splits), `video_id`.

    Raises:
        ValueError: unknown preset, or `clips_per_class` or `num_proc` below 1.
        OSError: the cache folder cannot be made or written.
    """
    _check_preset(preset)
    num_proc = (os.cpu_count() or 1) if num_proc is None else num_proc
    for name, value in (("clips_per_class", clips_per_class), ("num_proc", num_proc)):
        if operator.index(value) < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")

    root = Path(cache_dir) if cache_dir is not None else Path(constants.HF_HOME, "dmgal_hf", "motion_shapes")
    folder = root.expanduser().absolute() / f"{preset}-seed{operator.index(seed)}-v{GENERATOR_VERSION}"
    try:
        jobs = []
        for name in MOTIONS:
            (folder / name).mkdir(parents=True, exist_ok=True)
            present = set(os.listdir(folder / name))
            missing = (index for index in range(clips_per_class) if _clip_name(index) not in present)
            jobs += [(str(folder), name, preset, operator.index(seed), index) for index in missing]
        if jobs:
            _write_clips(jobs, min(num_proc, math.ceil(len(jobs) / 8)))  # fewer than 8 clips are not worth a process
    except OSError as error:
        raise OSError(
            f"cannot write motion shapes clips under {folder}: {error}; give a writable folder with room as cache_dir"
        ) from error

    label = ClassLabel(names=list(MOTIONS))
    features = Features({"video": Video(decode=False), "label": label, "video_id": Value("string")})
    splits = DatasetDict()
    for split in ("train", "validation", "test"):
        clips = [(n, i) for n, motion in MOTIONS.items() if motion.split == split for i in range(clips_per_class)]
        paths = [str(folder / name / _clip_name(index)) for name, index in clips]
        ids = [f"{name}_{index:05d}" for name, index in clips]
        columns = {"video": paths, "label": [name for name, _ in clips], "video_id": ids}
        splits[split] = Dataset.from_dict(columns, features=features, split=split)
    return splits
