"""Puppets: a built-in video dataset (ours) of jointed figures whose classes differ by how their limbs move.

Every clip shows a figure of 15 limbs, in 3D, that makes one action in 2 seconds. The actions are those of
`puppet_actions`: each comes with its mirror image, its time reversal, or both, as classes of their own, which show the
same poses in another order. So a frame, or all frames without their order, tell at most which action it is, and not
which of its variants. Proportions, clothes, posture, strength, timing and view are drawn with the same distribution in
every class.

A clip is a pure function of (generator version, preset, seed, class, index); between machines it may differ by what a
clip of motion shapes may.
"""

import operator
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
    most_contrasting,
    random_numbers,
    soft_edged,
)
from .made_up_videos import MadeUpVideos
from .puppet_actions import ACTIONS, CLASSES, LIMB_JOINTS, SIDES, Variant, joint_angles

GENERATOR_VERSION = 1  # raise it with any change that alters a clip: it names the cache folder and seeds the clips

VIEW = 45.0  # degrees that a figure may be turned away from the camera, to either side
STANDING = {"shoulder out": 12.0, "elbow": 15.0, "hip out": 5.0, "knee": 4.0}  # degrees, the usual posture

JOINTS = ("pelvis", "chest", "neck", "head") + tuple(
    f"{side} {joint}"
    for side in SIDES
    for joint in ("shoulder", "elbow", "wrist", "hand", "hip", "knee", "ankle", "toe")
)


class _Limb(NamedTuple):
    """A capsule from one joint to another, of two radii in metres, in one of the figure's colours."""

    start: str
    end: str
    radii: tuple[float, float]
    colour: str


LIMBS = (
    _Limb("pelvis", "chest", (0.13, 0.15), "shirt"),
    _Limb("left shoulder", "right shoulder", (0.075, 0.075), "shirt"),
    _Limb("neck", "head", (0.1, 0.11), "head"),
) + tuple(
    _Limb(f"{side} {start}", f"{side} {end}", radii, colour)
    for side in SIDES
    for start, end, radii, colour in (
        ("shoulder", "elbow", (0.065, 0.055), "shirt"),
        ("elbow", "wrist", (0.055, 0.045), "sleeve"),
        ("wrist", "hand", (0.05, 0.055), "skin"),
        ("hip", "knee", (0.1, 0.075), "trousers"),
        ("knee", "ankle", (0.075, 0.055), "trousers"),
        ("ankle", "toe", (0.06, 0.045), "shoe"),
    )
)


class _Style(NamedTuple):
    backgrounds: tuple[str, ...]
    patterns: tuple[str, ...]  # of clothes
    ground_levels: tuple[float, float]  # range (0..1) of the background's red, green and blue
    clothes_levels: tuple[float, float]  # and of the clothes'
    contrast: float  # smallest difference in luma (0..1) between the clothes' and the background's colours
    crowded: bool  # other figures, objects that move, and something that stands in the way


_TEXTURES, _PATTERNS = ("noise", "stripes", "checker"), ("flat", "hoops", "stripes", "checks")
PRESETS = {
    "plain": _Style(("flat",), ("flat",), (0, 0.5), (0.4, 1), 0.2, False),
    "textured": _Style(_TEXTURES, _PATTERNS, (0, 1), (0, 1), 0.15, False),
    "crowd": _Style(_TEXTURES, _PATTERNS, (0, 1), (0, 1), 0.15, True),
}


# Bodies -------------------------------------------------------------------------------------------------------------


def _turn(axis: int, degrees: np.ndarray) -> np.ndarray:
    """Rotations (frames, 3, 3) about x (0), y (1) or z (2) for angles (frames,)."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.zeros((len(degrees), 3, 3))
    matrix[:, axis, axis] = 1
    matrix[:, first, first] = matrix[:, second, second] = cos
    matrix[:, first, second], matrix[:, second, first] = -sin, sin
    return matrix


def _move_body(angles: dict[str, np.ndarray], size: dict[str, float]) -> dict[str, np.ndarray]:
    """
    Forward kinematics: where the joints are, (frames, 3) metres each. x points to the figure's left, y up, z to its
    front; the lowest foot stands on the floor at y = 0 unless the figure jumps.
    """
    frames = len(angles["bend"])

    def vector(x=0.0, y=0.0, z=0.0) -> np.ndarray:
        return np.tile([x, y, z], (frames, 1))

    def step(rotation: np.ndarray, offset: np.ndarray) -> np.ndarray:
        return np.einsum("fij,fj->fi", rotation, offset)

    still = _turn(0, np.zeros(frames))
    chest = _turn(1, angles["twist"]) @ _turn(2, -angles["lean"]) @ _turn(0, angles["bend"])
    at = {"pelvis": vector()}
    at["chest"] = step(chest, vector(y=size["trunk"]))
    at["neck"] = at["chest"] + step(chest, vector(y=0.16))
    at["head"] = at["neck"] + step(chest, vector(y=0.13))
    for side, sign in SIDES.items():
        own = {joint: angles[f"{side} {joint}"] for joint in LIMB_JOINTS}
        arm = chest @ _turn(2, sign * own["shoulder out"]) @ _turn(0, -own["shoulder forward"])
        arm = arm @ _turn(1, sign * own["shoulder roll"])
        forearm = arm @ _turn(0, -own["elbow"])
        at[f"{side} shoulder"] = at["chest"] + step(chest, vector(sign * size["shoulders"]))
        at[f"{side} elbow"] = at[f"{side} shoulder"] + step(arm, vector(y=-size["arm"]))
        at[f"{side} wrist"] = at[f"{side} elbow"] + step(forearm, vector(y=-size["forearm"]))
        at[f"{side} hand"] = at[f"{side} wrist"] + step(forearm, vector(y=-0.09))
        thigh = _turn(2, sign * own["hip out"]) @ _turn(0, -own["hip forward"])
        shin = thigh @ _turn(0, own["knee"])
        at[f"{side} hip"] = vector(sign * size["hips"])
        at[f"{side} knee"] = at[f"{side} hip"] + step(thigh, vector(y=-size["thigh"]))
        at[f"{side} ankle"] = at[f"{side} knee"] + step(shin, vector(y=-size["shin"]))
        # The ankle bends half of what would keep the foot level.
        at[f"{side} toe"] = at[f"{side} ankle"] + 0.1 * (
            step(shin, vector(z=1)) + step(still, vector(0.2 * sign, 0, 1))
        )
    lowest = np.min([at[f"{side} {joint}"][:, 1] for side in SIDES for joint in ("ankle", "toe")], axis=0)
    place = vector() + np.stack([angles["sideways"], angles["jump"] - lowest + 0.06, angles["forward"]], axis=1)
    facing = _turn(1, angles["turn"])
    return {joint: step(facing, position) + place for joint, position in at.items()}


def _draw_body(rng, variant: Variant, heading: float) -> np.ndarray:
    """A figure of its own build, posture and timing in action: (frames, joints, 3) metres, turned by `heading`."""
    usual = {"trunk": 0.46, "shoulders": 0.19, "hips": 0.1, "arm": 0.28, "forearm": 0.25, "thigh": 0.42, "shin": 0.42}
    height = log_uniform(rng, 0.92, 1.08)
    size = {part: height * length * log_uniform(rng, 0.88, 1.14) for part, length in usual.items()}
    # The clip may begin a little before the action and end a little after, and time flows unevenly. All of this has
    # the same distribution backwards.
    before, after, uneven = 0.08 * rng.random(), 0.08 * rng.random(), 0.2 * (2 * rng.random() - 1)
    whole = np.arange(FRAMES) / FRAMES  # so that the middle frames of equal parts of the clip lie evenly about 0.5
    u = np.clip((whole - before) / (1 - before - after), 0, 1)
    angles = joint_angles(variant, u + uneven * np.sin(2 * np.pi * u) / (2 * np.pi), start=rng.random())
    strength = log_uniform(rng, 0.85, 1.15)
    for joint in angles:
        angles[joint] = strength * angles[joint]
        if joint.startswith(tuple(SIDES)):
            offset, sway = 14 * (rng.random() - 0.5), np.sin(2 * np.pi * ((0.5 + rng.random()) * whole + rng.random()))
            angles[joint] += STANDING.get(joint.split(" ", 1)[1], 0.0) + offset + 2.5 * sway
    at = _move_body(angles, size)
    positions = np.stack([at[joint] for joint in JOINTS], axis=1)
    return positions @ _turn(1, np.array([heading]))[0].T


# Views --------------------------------------------------------------------------------------------------------------


class _View(NamedTuple):
    distance: float  # of the camera from the middle of the scene, in metres
    scale: float  # pixels a metre there
    tilt: np.ndarray  # (3, 3) from the scene to the camera: looking down, and held not quite level
    centre: np.ndarray  # (2, frames): the middle of the scene in the picture, in pixels

    def see(self, positions: np.ndarray) -> np.ndarray:
        """Positions (frames, points, 3) of the scene as the camera has them: x to the right, y up, z towards it."""
        return (positions - [0, 1.0, 0]) @ self.tilt.T

    def project(self, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of points that are seen: (frames, points, 2) pixels, and pixels a metre (frames, points)."""
        scale = self.scale * self.distance / np.maximum(self.distance - seen[..., 2], 1.0)
        return self.centre.T[:, None] + scale[..., None] * seen[..., :2] * [1, -1], scale


def _draw_view(rng) -> _View:
    degrees = np.array([25 * rng.random() - 5]), np.array([8 * (rng.random() - 0.5)])
    tilt = (_turn(2, degrees[1]) @ _turn(0, degrees[0]))[0]
    distance, scale = 4.5 + 2.5 * rng.random(), 38 + 8 * rng.random()
    return _View(distance, scale, tilt, SIZE / 2 + 10 * (rng.random((2, 1)) - 0.5) + camera_walk(rng))


# Pictures -----------------------------------------------------------------------------------------------------------


class _Capsules(NamedTuple):
    """What is painted: n shapes with round ends, in every frame."""

    ends: np.ndarray  # (frames, n, 2, 2): start and end, x and y in pixels
    radii: np.ndarray  # (frames, n, 2): at start and end, in pixels
    nearness: np.ndarray  # (frames, n): the nearest is painted last
    colours: np.ndarray  # (n, 2, 3): two colours, 0..1
    waves: np.ndarray  # (n, 4): radians from start to end and where they start, the same from axis to edge

    def at(self, moments: slice | np.ndarray) -> "_Capsules":
        """The same of some frames."""
        return _Capsules(self.ends[moments], self.radii[moments], self.nearness[moments], self.colours, self.waves)


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of n ranges, one range after the other, and before them which of the ranges each is of."""
    lengths = np.maximum(end - first, 0)
    which = np.repeat(np.arange(len(first)), lengths)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(lengths) - lengths - first, lengths)


def _pixels_near(start: np.ndarray, end: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Frame, row and column of all pixels within `reach` (frames,) of the line from `start` to `end`, (frames, 2) each,
    and of few others: of a row, those between the ends of the part of the line that is as near to the row, and `reach`
    more.
    """

    def inside(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bounds = np.stack([np.ceil(low), np.floor(high) + 1])
        return _ranges(*np.clip(bounds, 0, SIZE).astype(int))

    above, below = np.minimum(start, end)[:, 1], np.maximum(start, end)[:, 1]
    frame, row = inside(above - reach, below + reach)
    reach, (x, y), (dx, dy) = reach[frame], start[frame].T, (end - start)[frame].T
    dy = np.where(np.abs(dy) < 1e-6, 1e-6, dy)
    between = dx * np.clip(np.stack([row - y - reach, row - y + reach]) / dy, 0, 1)
    line, column = inside(x + between.min(0) - reach, x + between.max(0) + reach)
    return frame[line], row[line], column


def _paint(frames: np.ndarray, capsules: _Capsules) -> None:
    """Draw into `frames` (frames, SIZE, SIZE, 3) uint8, from the farthest to the nearest of every frame."""
    every, levels, channels = np.arange(len(frames)), frames.reshape(-1), np.arange(3)[:, None]
    for which in np.argsort(capsules.nearness, axis=1, kind="stable").T:  # (frames,): one of each frame
        start, end = capsules.ends[every, which].astype(np.float32).swapaxes(0, 1)  # (frames, 2)
        radii = capsules.radii[every, which].astype(np.float32)
        frame, row, column = _pixels_near(start, end, radii.max(1) + 0.6)
        (dx, dy), waves = (end - start).T, capsules.waves[which].astype(np.float32)
        square = np.maximum(dx * dx + dy * dy, 1e-6)
        facts = [*start.T, dx, dy, dx / square, dy / square, np.sqrt(square), *radii.T, *waves.T]
        one, two = (255 * capsules.colours[which].astype(np.float32)).swapaxes(0, 1)
        facts = np.stack([*facts, *one.T, *(two - one).T])
        facts = np.repeat(facts, np.bincount(frame, minlength=len(frames)), axis=1)  # as `frame` ascends
        x, y, dx, dy, part_x, part_y, length, first, last, *wave = facts[:13]  # (pixels,) each
        x, y = column - x, row - y
        along = np.clip(x * part_x + y * part_y, 0, 1)
        off_x, off_y, thick = x - along * dx, y - along * dy, first + along * (last - first)
        inside = np.sqrt(off_x * off_x + off_y * off_y) - thick
        side = (x * dy - y * dx) / thick / length
        mix = soft_edged(np.sin(wave[0] * along + wave[1]) * np.cos(wave[2] * side + wave[3]))
        shade = 1 - 0.35 * np.clip(1 + inside / thick, 0, 1) ** 2
        colour = shade * (facts[13:16] + mix * facts[16:])  # (3, pixels)
        where = 3 * ((frame * SIZE + row) * SIZE + column) + channels
        behind = levels.take(where).astype(np.float32)
        covered = np.clip(0.5 - inside, 0, 1)  # the edge blends over one pixel
        levels[where] = np.rint(behind + covered * (colour - behind)).astype(np.uint8)


_FLAT = (0.0, 0.0, 0.0, 0.0)


def _draw_wave(rng, pattern: str) -> tuple[float, float, float, float]:
    frequency, phase = log_uniform(rng, 7, 14), 2 * np.pi * rng.random()
    if pattern == "hoops":
        return frequency, phase, 0.0, 0.0
    if pattern == "stripes":
        return 0.0, np.pi / 2, frequency / 2, phase
    return (frequency, phase, frequency / 3, 0.0) if pattern == "checks" else _FLAT


def _draw_clothes(rng, style: _Style, grounds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Colours (limbs, 2, 3) and waves (limbs, 4) of a figure."""
    apart = [(ground, style.contrast) for ground in grounds]
    tones = np.array([0.3, 0.18, 0.12]) + rng.random((64, 1)) * np.array([0.68, 0.62, 0.58])
    skin = most_contrasting(tones, apart)
    hair, shoe = contrasting_colour(rng, (0, 1), [(skin, 0.2)]), contrasting_colour(rng, style.clothes_levels, apart)
    looks = {
        "head": ([skin, hair], (np.pi, -0.45 * np.pi, 0.0, 0.0)),  # hair from the middle of the head upwards
        "skin": ([skin, skin], _FLAT),
        "shoe": ([shoe, shoe], _FLAT),
    }
    for garment in ("shirt", "trousers"):
        others = [*apart, *([(looks["shirt"][0][0], 0.12)] if "shirt" in looks else [])]
        first = contrasting_colour(rng, style.clothes_levels, others)
        second = contrasting_colour(rng, style.clothes_levels, [*others, (first, 0.15)])
        looks[garment] = [first, second], _draw_wave(rng, choose(rng, style.patterns))
    looks["sleeve"] = looks[choose(rng, ("shirt", "skin"))]
    colours, waves = zip(*(looks[limb.colour] for limb in LIMBS))
    return np.array(colours), np.array(waves)


def _dress(view: _View, seen: np.ndarray, clothes: tuple[np.ndarray, np.ndarray], build: float) -> _Capsules:
    """A figure as it is painted, from its joints as the camera has them, (frames, joints, 3)."""
    pixels, scale = view.project(seen)
    ends = np.array([[JOINTS.index(limb.start), JOINTS.index(limb.end)] for limb in LIMBS])
    radii = build * np.array([limb.radii for limb in LIMBS]) * scale[:, ends]
    return _Capsules(pixels[:, ends], radii, seen[:, ends, 2].mean(2), *clothes)


def _draw_thing(rng, view: _View, style: _Style, grounds, nearness: float, still: bool) -> _Capsules:
    """A ball or bar that flies through the picture or, `still`, a post that stands in the way of the camera."""
    if still:
        place = np.array([0.7 * (rng.random() - 0.5), 0.0, 0.0])
        start, end, radius = place - [0, 3, 0], place + [0, 3, 0], 0.07 + 0.05 * rng.random()
        path = np.zeros((FRAMES, 3))
    else:
        start, radius = np.zeros(3), 0.1 + 0.1 * rng.random()
        end = choose(rng, (0.0, 1.0)) * 0.4 * (rng.random(3) - 0.5)
        middle, travel = rng.random((2, 3)) - 0.5
        path = 2.4 * middle * [1, 1, 0] + np.linspace(-1.5, 1.5, FRAMES)[:, None] * travel * [2, 2, 0]
    points = np.stack([path + start, path + end], axis=1)[:, None]  # (frames, 1, 2, 3), as the camera has them
    pixels, scale = view.project(points)
    colour = contrasting_colour(rng, style.clothes_levels, [(ground, style.contrast) for ground in grounds])
    second = contrasting_colour(rng, style.clothes_levels, [(colour, 0.15)])
    waves = np.array([_draw_wave(rng, choose(rng, style.patterns))])
    return _Capsules(pixels, radius * scale, np.full((FRAMES, 1), nearness), np.array([[colour, second]]), waves)


def _draw_main(rng, class_name: str) -> tuple[_View, np.ndarray]:
    """The view, and the joints of the figure that shows the class as the camera has them."""
    view = _draw_view(rng)
    return view, view.see(_draw_body(rng, CLASSES[class_name], VIEW * (2 * rng.random() - 1)))


def _draw_others(rng, class_name: str, view: _View) -> list[np.ndarray]:
    """One or two figures at the sides and behind, that do something else; never anything of novel classes."""
    known = [
        one
        for one in CLASSES.values()
        if ACTIONS[one.action].split == "train" and one.action != CLASSES[class_name].action
    ]
    others = []
    for number in range(choose(rng, (1, 2))):
        place = np.array([(-1) ** number * (0.7 + 0.6 * rng.random()), 0.0, -0.8 - 1.6 * rng.random()])
        body = _draw_body(rng, choose(rng, known), 360 * rng.random())
        others.append(view.see(body + place))
    return others


def _render(rng, class_name: str, preset: str, moments: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frames (moments, SIZE, SIZE, 3) uint8 of a clip, and where the joints are, (moments, joints, 2) in pixels."""
    view, main = _draw_main(rng, class_name)
    style = PRESETS[preset]
    frames, grounds = draw_backdrop(rng, style.backgrounds, style.ground_levels, view.centre[:, moments])

    def figure(seen: np.ndarray) -> _Capsules:
        return _dress(view, seen, _draw_clothes(rng, style, grounds), log_uniform(rng, 0.9, 1.25))

    layers = [figure(main)]
    if style.crowded:
        others = sorted(_draw_others(rng, class_name, view), key=lambda seen: seen[..., 2].mean())
        things = [_draw_thing(rng, view, style, grounds, 0.0, still) for still in (False, False, True)]
        layers = [*map(figure, others), things[0], *layers, *things[1:]]
    for layer in layers:
        _paint(frames, layer.at(moments))
    return frames, view.project(main)[0][moments]


def render_clip(class_name: str, preset: str = "plain", seed: int = 0, index: int = 0) -> np.ndarray:
    """Draw clip `index` of a class.

    Returns:
        (48, 112, 112, 3) uint8 RGB frames, 24 a second; what the video file holds before compression.

    Raises:
        ValueError: if the class or the preset is unknown.
    """
    return _render(_start_clip(class_name, preset, seed, index), class_name, preset, slice(None))[0]


def render_stills(
    preset: str = "plain", seed: int = 0, index: int = 0, count: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Draw pictures of one figure in poses of base classes, to train a backbone that sees but knows no motion.

    Returns:
        (count, 112, 112, 3) uint8 RGB, at random moments of one action, and where the joints are in them, (count, 20,
        2) pixels in the order of `JOINTS`, x to the right, y down. Joints may lie outside, or behind something.

    Raises:
        ValueError: if the preset is unknown.
    """
    PUPPETS.check(preset)
    rng = random_numbers(f"still_puppets/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{operator.index(index)}")
    class_name = choose(rng, [name for name, split in PUPPETS.splits.items() if split == "train"])
    return _render(rng, class_name, preset, (FRAMES * rng.random(count)).astype(int))


def joint_positions(class_name: str, preset: str = "plain", seed: int = 0, index: int = 0) -> np.ndarray:
    """Where the joints of the figure in a clip truly are.

    Returns:
        (48, 20, 3) metres in the order of `JOINTS`, as the camera has them: x to the right of the picture, y up, z
        towards the camera, from the middle of the scene.

    Raises:
        ValueError: if the class or the preset is unknown.
    """
    return _draw_main(_start_clip(class_name, preset, seed, index), class_name)[1]


def _start_clip(class_name: str, preset: str, seed: int, index: int) -> np.random.Generator:
    PUPPETS.check(preset, class_name)
    return random_numbers(
        f"puppets/{GENERATOR_VERSION}/{preset}/{operator.index(seed)}/{class_name}/{operator.index(index)}"
    )


PUPPETS = MadeUpVideos(
    "puppets",
    GENERATOR_VERSION,
    PRESETS,
    {name: ACTIONS[variant.action].split for name, variant in CLASSES.items()},
    render_clip,
)

load_puppets = PUPPETS.load
