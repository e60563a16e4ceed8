"""The grammar of the puppets' actions: a table of joint angles over time, and what patterns, mirror and time make of
it.

An action is one stroke, written as key angles that follow each other at even intervals, and a pattern that says when
the limbs of the left and of the right side make it. "In turn", the left limb makes a stroke in the first half of the
clip, the right limb in the second. So both sides, and all poses of the stroke, occur in every clip of the action, of
its mirror image, of its time reversal and of both: only their order tells the four apart. Where a mirror image would
look like the reversal, or like the action itself, it is no class of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Angles in degrees from hanging straight; positive is forward, outward, bent, and for a roll the bent forearm upward.
LIMB_JOINTS = ("shoulder forward", "shoulder out", "shoulder roll", "elbow", "hip forward", "hip out", "knee")
# "bend" forward in degrees, "jump" in metres. "lean" and "twist" in degrees to the side of the limb that makes the
# stroke; over a whole clip "turn" in degrees and "sideways" in metres to the left, "forward" in metres.
BODY_JOINTS = ("bend", "jump", "lean", "twist", "turn", "forward", "sideways")
SIDEWAYS_JOINTS = ("lean", "twist", "turn", "sideways")  # a mirror turns them round
SIDES = {"left": 1, "right": -1}

Stroke = tuple[tuple[str, ...], np.ndarray]  # the sides that make it, and its time, (frames,) from 0 to 1


def _in_turn(u: np.ndarray, times: int) -> list[Stroke]:
    halves = np.clip(2 * u, 0, 1), np.clip(2 * u - 1, 0, 1)
    return [((side,), _repeat(half, times)) for side, half in zip(SIDES, halves)]


def _together(u: np.ndarray, times: int) -> list[Stroke]:
    return [(tuple(SIDES), _repeat(u, times))]


def _behind(lag: float) -> Callable[[np.ndarray, int], list[Stroke]]:
    return lambda u, times: [(("left",), np.mod(times * u, 1)), (("right",), np.mod(times * u - lag, 1))]


def _repeat(u: np.ndarray, times: int) -> np.ndarray:
    return np.where(u < 1, np.mod(times * u, 1), 1)


PATTERNS = {
    "in turn": _in_turn,
    "together": _together,
    "a quarter behind": _behind(0.25),
    "half behind": _behind(0.5),
}


class Action(NamedTuple):
    """
    A row of the table.

    Attributes:
        split: "train" (base classes), "validation" or "test" (novel ones), for the action and all its variants.
        pattern: when left and right make the stroke, one of `PATTERNS`.
        stroke: key angles by joint, the first at the start of a stroke and the last at its end. "other X" is a joint
            of the limb on the other side.
        variants: which of "mirrored", "reversed" and "mirrored reversed" are classes of their own. The others look
            like the action or like one of the variants that are.
        times: strokes, of a side where they come in turn.
        over_clip: what "turn", "forward" and "sideways" add up to from the first frame to the last.
    """

    split: str
    pattern: str
    stroke: dict[str, tuple[float, ...]]
    variants: tuple[str, ...]
    times: int = 1
    over_clip: dict[str, float] = {}


ALL = ("mirrored", "reversed", "mirrored reversed")

ACTIONS: dict[str, Action] = {
    "punch": Action("train", "in turn", {
        "shoulder forward": (0, -40, 88, 45, 0),
        "elbow": (0, 130, 0, 0, 0),
        "twist": (0, 15, -20, 0, 0),
    }, ALL),
    "kick": Action("train", "in turn", {
        "hip forward": (0, 75, 90, 40, 0),
        "knee": (0, 110, 5, 0, 0),
        "bend": (0, 10, -15, 0, 0),
        "other shoulder forward": (0, 20, 60, 20, 0),
    }, ALL),
    "throw": Action("train", "in turn", {
        "shoulder out": (0, 95, 25, 0, 0),
        "shoulder roll": (0, 70, 0, 0, 0),
        "shoulder forward": (0, 0, 150, 60, 0),
        "elbow": (0, 100, 15, 0, 0),
        "twist": (0, 25, -15, -10, 0),
    }, ALL),
    "salute": Action("train", "in turn", {
        "shoulder forward": (0, 60, 0, 0, 0),
        "shoulder out": (0, 0, 80, 85, 0),
        "shoulder roll": (0, 0, 80, 0, 0),
        "elbow": (0, 100, 130, 0, 0),
    }, ALL),
    "circle_leg": Action("train", "in turn", {
        "hip forward": (0, 65, 0, -35, 0),
        "hip out": (0, 0, 65, 15, 0),
        "other shoulder out": (0, 20, 60, 30, 0),
    }, ALL),
    "jump": Action("train", "together", {
        "hip forward": (0, 60, 0, 10, 0),
        "knee": (0, 100, 0, 15, 0),
        "bend": (0, 35, 0, 0, 0),
        "shoulder forward": (0, -45, 160, 75, 0),
        "jump": (0, 0, 0.3, 0.05, 0),
    }, ("reversed",)),
    "row": Action("train", "together", {
        "bend": (0, 45, -5, -5, 0),
        "shoulder forward": (0, 85, -25, -10, 0),
        "elbow": (0, 0, 115, 60, 0),
    }, ("reversed",)),
    "wave": Action("train", "in turn", {
        "shoulder out": (0, 85, 85, 85, 85, 85, 0),
        "shoulder roll": (0, 85, 85, 85, 85, 85, 0),
        "elbow": (0, 100, 30, 100, 30, 100, 0),
    }, ("mirrored",)),
    "drum": Action("train", "a quarter behind", {
        "shoulder forward": (25, 70, 25),
        "elbow": (100, 40, 100),
    }, ("mirrored",), times=2),
    "walk": Action("train", "half behind", {
        "hip forward": (28, 0, -25, 25, 28),
        "knee": (0, 0, 20, 65, 0),
        "other shoulder forward": (30, 0, -30, 0, 30),
        "other elbow": (45, 20, 10, 20, 45),
    }, ("reversed",), times=2, over_clip={"forward": 1.0}),
    "sidestep": Action("train", "together", {
        "hip out": (0, 28, 0),
        "shoulder out": (0, 45, 0),
    }, ("mirrored",), times=2, over_clip={"sideways": 0.9}),
    "lunge": Action("validation", "in turn", {
        "hip forward": (0, 90, 65, 35, 0),
        "knee": (0, 100, 65, 0, 0),
        "other hip forward": (0, 0, -35, -10, 0),
        "other knee": (0, 0, 35, 0, 0),
        "shoulder out": (0, 0, 40, 80, 0),
    }, ALL),
    "bow_turning": Action("validation", "together", {
        "bend": (0, 70, 0),
        "shoulder out": (0, 60, 0),
    }, ("mirrored",), over_clip={"turn": 150}),
    "sit": Action("validation", "together", {
        "hip forward": (0, 85),
        "knee": (0, 88),
        "shoulder forward": (0, 35),
    }, ("reversed",)),
    "push": Action("test", "in turn", {
        "shoulder out": (0, 25, 90, 45, 0),
        "shoulder roll": (0, 40, 0, 0, 0),
        "elbow": (0, 140, 0, 0, 0),
        "lean": (0, -10, 12, 0, 0),
    }, ALL),
    "side_kick": Action("test", "in turn", {
        "hip forward": (0, 85, 0, 0, 0),
        "hip out": (0, 10, 75, 40, 0),
        "knee": (0, 115, 0, 0, 0),
        "lean": (0, 0, -25, -10, 0),
    }, ALL),
    "stow": Action("test", "in turn", {
        "bend": (0, 75, 5, -5, 0),
        "shoulder forward": (0, 60, 30, 165, 0),
        "elbow": (0, 0, 130, 10, 0),
        "knee": (0, 30, 0, 0, 0),
        "other knee": (0, 30, 0, 0, 0),
        "hip forward": (0, 15, 0, 0, 0),
        "other hip forward": (0, 15, 0, 0, 0),
    }, ALL),
    "lift": Action("test", "together", {
        "bend": (0, 65, 0, 0, 0),
        "hip forward": (0, 50, 0, 0, 0),
        "knee": (0, 80, 0, 0, 0),
        "shoulder forward": (0, 60, 35, 170, 0),
        "elbow": (0, 0, 120, 10, 0),
    }, ("reversed",)),
}  # fmt: skip


class Variant(NamedTuple):
    """A class: an action, as it is in the table, mirrored, reversed in time, or both."""

    action: str
    mirrored: bool = False
    reversed: bool = False


# "punch", "punch_mirrored", "punch_reversed", "punch_mirrored_reversed", ...
CLASSES: dict[str, Variant] = {
    "_".join([name, *change.split()]): Variant(name, "mirrored" in change, "reversed" in change)
    for name, action in ACTIONS.items()
    for change in ("", *action.variants)
}


def joint_angles(variant: Variant, u: np.ndarray, start: float = 0.0) -> dict[str, np.ndarray]:
    """
    Args:
        variant: the class.
        u: (frames,) time from 0 to 1.
        start: where in its cycle an action begins whose sides follow each other without end ("behind").

    Returns:
        (frames,) each: "left " and "right " of every one of `LIMB_JOINTS`, and `BODY_JOINTS`.
    """
    action = ACTIONS[variant.action]
    u = 1 - u if variant.reversed else u
    angles = {f"{side} {joint}": np.zeros(len(u)) for side in SIDES for joint in LIMB_JOINTS}
    angles |= {joint: np.zeros(len(u)) for joint in BODY_JOINTS}
    phase = u + start / action.times if action.pattern.endswith("behind") else u
    for sides, time in PATTERNS[action.pattern](phase, action.times):
        for joint, keys in action.stroke.items():
            moved = _between(keys, time)
            if joint in BODY_JOINTS:
                angles[joint] += moved * (SIDES[sides[0]] if joint in SIDEWAYS_JOINTS else 1)
            for side in sides if joint not in BODY_JOINTS else ():
                other = {"left": "right", "right": "left"}[side]
                angles[f"{other} {joint[6:]}" if joint.startswith("other ") else f"{side} {joint}"] += moved
    for joint, whole in action.over_clip.items():
        angles[joint] += whole * (u - 0.5)
    return _mirror(angles) if variant.mirrored else angles


def _between(keys: tuple[float, ...], time: np.ndarray) -> np.ndarray:
    """Eases from key to key: (frames,) times from 0 to 1 -> angles."""
    position = time * (len(keys) - 1)
    before = np.minimum(position.astype(int), len(keys) - 2)
    ease = 0.5 - 0.5 * np.cos(np.pi * (position - before))
    keys = np.asarray(keys, float)
    return keys[before] * (1 - ease) + keys[before + 1] * ease


def _mirror(angles: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    swapped = {"left": "right", "right": "left"}
    mirrored = {}
    for name, values in angles.items():
        side, _, joint = name.partition(" ")
        mirrored[f"{swapped[side]} {joint}" if side in swapped else name] = values
    return mirrored | {joint: -mirrored[joint] for joint in SIDEWAYS_JOINTS}
