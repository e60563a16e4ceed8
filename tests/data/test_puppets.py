import os
from pathlib import Path

import av
import numpy as np
import pytest

from dmgal_hf.data import load_puppets
from dmgal_hf.data.clip_looks import FRAMES, SIZE
from dmgal_hf.data.motion_shapes import MOTIONS
from dmgal_hf.data.puppet_actions import ACTIONS, BODY_JOINTS, CLASSES, LIMB_JOINTS, SIDES, joint_angles
from dmgal_hf.data.puppets import (
    JOINTS,
    LIMBS,
    PRESETS,
    _Capsules,
    _draw_main,
    _move_body,
    _paint,
    _start_clip,
    joint_positions,
    render_clip,
    render_stills,
)

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

SEGMENT_CENTRES = np.arange(3, FRAMES, 6)  # the 8 frames a model sees
SIZE_OF_BODY = {"trunk": 0.46, "shoulders": 0.19, "hips": 0.1, "arm": 0.28, "forearm": 0.25, "thigh": 0.4, "shin": 0.4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A clip of every class, made by one process: (cache folder, DatasetDict)."""
    cache_dir = tmp_path_factory.mktemp("puppets")
    return cache_dir, load_puppets("plain", clips_per_class=1, cache_dir=cache_dir, num_proc=1)


def contents(cache_dir) -> dict[str, bytes]:
    return {str(p.relative_to(cache_dir)): p.read_bytes() for p in Path(cache_dir).rglob("*") if p.is_file()}


# Files and splits


def test_splits_have_disjoint_classes_and_keep_variants_together(made):
    _, splits = made
    classes = {name: {ds.features["label"].int2str(label) for label in ds["label"]} for name, ds in splits.items()}
    assert list(classes) == ["train", "validation", "test"]
    assert sum(map(len, classes.values())) == len(set().union(*classes.values())) == len(CLASSES) >= 48
    assert len(classes["validation"]) >= 5 and len(classes["test"]) >= 5
    actions = [{CLASSES[name].action for name in names} for names in classes.values()]
    assert sum(map(len, actions)) == len(set().union(*actions)) == len(ACTIONS)
    assert not MOTIONS.keys() & CLASSES.keys()  # the two datasets may share a cache folder


def test_files_show_the_rendered_frames(made):
    _, splits = made
    for row in splits["validation"].select(range(3)):
        name = splits["validation"].features["label"].int2str(row["label"])
        with av.open(row["video"]["path"]) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert decoded.shape == (FRAMES, SIZE, SIZE, 3)
        grey_error = (decoded.astype(float) - render_clip(name, "plain", 0, 0)).mean(-1)
        assert np.sqrt((grey_error**2).mean()) < 6


def test_four_processes_make_the_same_clips_and_only_those_that_are_missing(made, tmp_path):
    reference = contents(made[0])
    load_puppets("plain", clips_per_class=1, cache_dir=tmp_path, num_proc=4)
    assert contents(tmp_path) == reference
    before = {path: os.stat(tmp_path / path).st_mtime_ns for path in reference}
    gone = sorted(reference)[7]
    (tmp_path / gone).unlink()
    load_puppets("plain", clips_per_class=1, cache_dir=tmp_path, num_proc=1)
    assert contents(tmp_path) == reference
    assert [path for path in reference if os.stat(tmp_path / path).st_mtime_ns != before[path]] == [gone]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown preset 'fancy' of puppets.*plain, textured, crowd"):
        load_puppets("fancy", cache_dir=tmp_path)
    for function in (render_clip, joint_positions):
        with pytest.raises(ValueError, match=r"unknown motion class 'pnuch' of puppets.*punch, punch_mirrored"):
            function("pnuch")


# What the classes are


def poses(name, u, start):
    """(frames, joints): the joint angles of a class."""
    angles = joint_angles(CLASSES[name], u, start)
    return np.stack([angles[joint] for joint in sorted(angles)], axis=1)


def same_set(one, other):
    return all(np.abs(other - pose).max(1).min() < 1e-6 for pose in one) and all(
        np.abs(one - pose).max(1).min() < 1e-6 for pose in other
    )


@pytest.mark.parametrize("action", ACTIONS)
def test_variants_show_the_same_poses_in_another_order(action):
    u = (np.arange(32) + 0.5) / 32
    starts = np.arange(32) / 16
    family = [name for name, variant in CLASSES.items() if variant.action == action]
    assert len(family) in (2, 4)
    plain = poses(action, u, 0.0)
    for name in family[1:]:
        assert any(same_set(plain, poses(name, u, start)) for start in starts), name
    cyclic = ACTIONS[action].pattern.endswith("behind")
    for number, name in enumerate(family):
        for other in family[number + 1 :]:
            shown = poses(name, u[::4], 0.0)  # 8 frames
            for start in starts if cyclic else (0.0,):
                assert np.abs(shown - poses(other, u[::4], start)).max() > (
                    0.2 if "sideways" in ACTIONS[action].over_clip else 15
                )


def probe_accuracy(features, labels, held_out):
    """Share of held-out rows that a linear (ridge) classifier on the other rows gets right."""
    mean, std = features[~held_out].mean(0), features[~held_out].std(0) + 1e-6
    x = np.concatenate([(features - mean) / std, np.ones((len(features), 1))], axis=1)
    seen, targets = x[~held_out], np.eye(labels.max() + 1)[labels[~held_out]]
    weights = np.linalg.solve(seen.T @ seen + 30 * np.eye(x.shape[1]), seen.T @ targets)
    return ((x[held_out] @ weights).argmax(1) == labels[held_out]).mean()


def test_only_the_order_of_the_frames_tells_the_variants_apart():
    """
    On true joint positions, seen by the camera: the same linear probe is near chance on single frames and on sets of
    frames, and nearly always right on the frames in their order.
    """
    clips, rng = 36, np.random.default_rng(0)
    held_out = np.arange(clips) >= 24
    above_chance = {"single frames": [], "sets of frames": [], "in order": []}
    for action in ACTIONS:
        family = [name for name, variant in CLASSES.items() if variant.action == action]
        seen = np.stack(
            [joint_positions(name, "plain", 5, index)[SEGMENT_CENTRES] for name in family for index in range(clips)]
        ).reshape(len(family) * clips, len(SEGMENT_CENTRES), -1)
        labels, split = np.repeat(np.arange(len(family)), clips), np.tile(held_out, len(family))
        single = np.take_along_axis(seen, rng.integers(8, size=(len(seen), 1, 1)), axis=1)[:, 0]
        # Means over the frames, also of random waves of each: a linear function of these is a rich one of the set.
        waves = np.cos(seen @ rng.normal(0, 1.5, (seen.shape[2], 64)) + 2 * np.pi * rng.random(64))
        together = np.concatenate([seen, waves], axis=2).mean(1)
        together = np.concatenate([together, seen.std(1), seen.min(1), seen.max(1)], axis=1)
        for name, features in (
            ("single frames", single),
            ("sets of frames", together),
            ("in order", seen.reshape(len(seen), -1)),
        ):
            above_chance[name].append(probe_accuracy(features, labels, split) - 1 / len(family))
    assert np.mean(above_chance["single frames"]) < 0.05
    assert np.mean(above_chance["sets of frames"]) < 0.06
    assert np.mean(above_chance["in order"]) > 0.5  # certainty would be 0.61


# Bodies


def body(**angles):
    """A still body with some joint angles: (3,) position by joint."""
    names = [*BODY_JOINTS, *(f"{side} {joint}" for side in SIDES for joint in LIMB_JOINTS)]
    values = {name: np.full(1, float(angles.pop(name.replace(" ", "_"), 0))) for name in names}
    assert not angles
    return {joint: position[0] for joint, position in _move_body(values, SIZE_OF_BODY).items()}


def test_joints_turn_the_way_they_are_called():
    x, y, z = 0, 1, 2
    standing = body()
    assert standing["left shoulder"][x] > 0 > standing["right shoulder"][x] and standing["left toe"][z] > 0.1
    reach = body(left_shoulder_forward=90)
    assert reach["left hand"][z] > 0.5 and abs(reach["left hand"][y] - reach["left shoulder"][y]) < 1e-9
    assert body(right_shoulder_out=90)["right hand"][x] < -0.7 and body(left_hip_out=60)["left ankle"][x] > 0.7
    assert body(left_elbow=90)["left hand"][z] > 0.3 and body(left_knee=90)["left ankle"][z] < -0.35
    for side in SIDES:
        raised = body(**{f"{side}_shoulder_out": 90, f"{side}_shoulder_roll": 90, f"{side}_elbow": 90})
        assert raised[f"{side} hand"][y] > raised[f"{side} elbow"][y] + 0.3
    assert body(bend=60)["head"][z] > 0.5 and body(lean=30)["head"][x] > 0.3
    assert body(turn=90)["left toe"][x] > 0.1 and body(twist=40)["left shoulder"][z] < 0
    squat = body(left_hip_forward=60, right_hip_forward=60, left_knee=100, right_knee=100)
    assert squat["pelvis"][y] < standing["pelvis"][y] - 0.2
    jump = body(jump=0.3)
    assert np.allclose(jump["left toe"][y] - standing["left toe"][y], 0.3)


def test_limbs_keep_their_length_and_feet_stay_on_the_floor():
    positions = joint_positions("lunge", "plain", 0, 3)
    for limb in LIMBS:
        offset = positions[:, JOINTS.index(limb.start)] - positions[:, JOINTS.index(limb.end)]
        length = np.linalg.norm(offset, axis=1)
        if not limb.end.endswith("toe"):  # the ankle gives
            assert np.ptp(length) < 1e-9 < length.min()


# Pictures


def paint_slowly(frames, capsules):
    """Every pixel of every frame."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    painted = frames.astype(float)
    for t in range(len(frames)):
        for k in np.argsort(capsules.nearness[t]):
            (x0, y0), (x1, y1) = capsules.ends[t, k]
            dx, dy = x1 - x0, y1 - y0
            along = np.clip(((columns - x0) * dx + (rows - y0) * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
            off = np.hypot(columns - x0 - along * dx, rows - y0 - along * dy)
            thick = capsules.radii[t, k, 0] + along * (capsules.radii[t, k, 1] - capsules.radii[t, k, 0])
            covered = np.clip(0.5 + thick - off, 0, 1)[..., None]
            shade = 1 - 0.35 * np.clip(off / thick, 0, 1)[..., None] ** 2
            painted[t] += covered * (255 * shade * capsules.colours[k, 0] - painted[t])
    return painted


def test_limbs_are_painted_where_they_are_the_nearest_on_top():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    ends = rng.uniform(-30, SIZE + 30, (5, 4, 2, 2))  # some outside the picture
    ends[:, 3, 1] = ends[:, 3, 0]  # a ball
    colours = np.repeat(rng.random((4, 1, 3)), 2, axis=1)
    capsules = _Capsules(ends, rng.uniform(2, 12, (5, 4, 2)), rng.random((5, 4)), colours, np.zeros((4, 4)))
    expected = paint_slowly(frames, capsules)
    _paint(frames, capsules)
    assert np.abs(frames - expected).max() < 4  # each of four layers is rounded


def test_the_figure_is_where_its_joints_are():
    for name in ("punch", "walk_reversed", "side_kick_mirrored", "lift"):
        frames = render_clip(name, "plain", 1, 0).astype(int)
        view, seen = _draw_main(_start_clip(name, "plain", 1, 0), name)
        pixels = np.rint(view.project(seen)[0]).astype(int)
        drawn = np.abs(frames - frames[0, 0, 0]).max(-1) > 10
        inside = ((pixels >= 0) & (pixels < SIZE)).all(-1)
        t, k = np.nonzero(inside)
        assert inside.mean() > 0.9 and drawn[t, pixels[t, k, 1], pixels[t, k, 0]].mean() > 0.98
        columns = np.flatnonzero(drawn.any((0, 1)))
        assert pixels[..., 0].min() - 10 < columns.min() and columns.max() < pixels[..., 0].max() + 10
        assert 0.01 < drawn.mean() < 0.2


def test_presets_differ_by_backdrop_and_by_what_else_moves():
    moved, unlike = {}, {}
    for preset in PRESETS:
        clips = [render_clip("row", preset, 0, index).astype(int) for index in range(6)]
        for index, frames in enumerate(clips):
            view, seen = _draw_main(_start_clip("row", preset, 0, index), "row")
            figure = view.project(seen)[0]
            aside = np.abs(np.arange(SIZE) - figure[..., 0].mean()) > np.ptp(figure[..., 0]) / 2 + 10
            steps = np.abs(np.diff(frames[::6][:, :, aside], axis=0)).max(-1)
            moved.setdefault(preset, []).append((steps > 60).mean())
            unlike.setdefault(preset, []).append(frames[0, :, aside].std((0, 1)).mean())
    assert max(moved["plain"]) == 0 and max(unlike["plain"]) == 0
    assert min(unlike["textured"]) > 3
    assert np.mean(moved["crowd"]) > max(0.01, 3 * np.mean(moved["textured"]))


def test_seeds_and_indices_give_other_clips():
    clips = {(p, s, i): render_clip("kick", p, s, i)[::12].tobytes() for p in PRESETS for s in (0, 1) for i in (0, 1)}
    assert len(set(clips.values())) == len(clips)
    assert render_clip("kick", "crowd", 1, 1)[::12].tobytes() == clips["crowd", 1, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_stills_show_a_figure_where_its_joints_are_said_to_be(preset):
    pictures, joints = render_stills(preset, seed=3, index=5, count=6)
    assert pictures.shape == (6, SIZE, SIZE, 3) and pictures.dtype == np.uint8 and joints.shape == (6, len(JOINTS), 2)
    again = render_stills(preset, seed=3, index=5, count=6)
    assert np.array_equal(pictures, again[0]) and np.array_equal(joints, again[1])
    assert not np.array_equal(pictures, render_stills(preset, seed=3, index=6, count=6)[0])
    if preset == "plain":
        drawn = np.abs(pictures.astype(int) - pictures[:1, :1, :1]).max(-1) > 10
        columns, rows = np.rint(joints).astype(int).transpose(2, 0, 1)
        picture, joint = np.nonzero((columns >= 0) & (columns < SIZE) & (rows >= 0) & (rows < SIZE))
        where = picture, rows[picture, joint], columns[picture, joint]
        assert len(picture) > 60 and drawn[where].mean() > 0.98


def test_stills_tell_an_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'loud' of puppets"):
        render_stills("loud")
