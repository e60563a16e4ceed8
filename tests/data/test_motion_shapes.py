import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import av
import numpy as np
import pytest
from datasets import ClassLabel, Value, Video
from huggingface_hub import constants

from dmgal_hf.data import clip_looks, motion_shapes
from dmgal_hf.data.motion_shapes import FRAMES, MOTIONS, PRESETS, SHAPES, SIZE, load_motion_shapes, render_clip

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

SEGMENT_CENTRES = np.arange(3, FRAMES, 6)  # the 8 frames a model sees


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two clips of every class, made by two processes: (cache folder, DatasetDict)."""
    cache_dir = tmp_path_factory.mktemp("motion_shapes")
    return cache_dir, load_motion_shapes("plain", clips_per_class=2, cache_dir=cache_dir, num_proc=2)


def generate_in_own_group(arguments):
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell starts background jobs without
    load_motion_shapes(**arguments)


@pytest.fixture
def start_program():
    """Starts a program that makes clips, in a process group of its own; what is left of it ends with the test."""
    started = []

    def start(**arguments):
        process = multiprocessing.get_context("fork").Process(target=generate_in_own_group, args=(arguments,))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def contents(cache_dir) -> dict[str, bytes]:
    return {str(p.relative_to(cache_dir)): p.read_bytes() for p in Path(cache_dir).rglob("*") if p.is_file()}


def written_at(cache_dir) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in Path(cache_dir).rglob("*")}


def test_splits_have_disjoint_classes_and_shared_features(made):
    _, splits = made
    classes = {name: {ds.features["label"].int2str(label) for label in ds["label"]} for name, ds in splits.items()}
    assert list(classes) == ["train", "validation", "test"]
    assert sum(map(len, classes.values())) == len(set().union(*classes.values())) == len(MOTIONS) >= 24
    assert len(classes["validation"]) >= 5 and len(classes["test"]) >= 5
    for name, ds in splits.items():
        assert ds.features == splits["train"].features
        assert len(ds) == 2 * len(classes[name])
    assert splits["train"].features["video"] == Video(decode=False)
    assert splits["train"].features["label"] == ClassLabel(names=list(MOTIONS))
    assert splits["train"].features["video_id"] == Value("string")
    ids = [video_id for ds in splits.values() for video_id in ds["video_id"]]
    assert len(ids) == len(set(ids))


def test_files_are_small_h264_clips_that_show_the_rendered_frames(made):
    _, splits = made
    for row in splits["test"]:
        name, index = row["video_id"].rsplit("_", 1)
        assert splits["test"].features["label"].int2str(row["label"]) == name
        with av.open(row["video"]["path"]) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
            assert stream.average_rate == 24 and stream.frames == FRAMES
            frames = list(container.decode(stream))
        assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 12, 24, 36]
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in frames]).astype(float)
        grey_error = (decoded - render_clip(name, "plain", 0, int(index))).mean(-1)
        assert np.sqrt((grey_error**2).mean()) < 6
        assert os.path.getsize(row["video"]["path"]) < 60_000


def test_number_of_processes_changes_nothing_but_the_wait(made, tmp_path):
    load_motion_shapes("plain", clips_per_class=1, cache_dir=tmp_path, num_proc=1)
    alone, reference = contents(tmp_path), contents(made[0])
    assert len(alone) == len(MOTIONS)
    assert alone == {name: reference[name] for name in alone}


def test_complete_cache_is_only_read_and_more_clips_only_add_files(tmp_path):
    load_motion_shapes("textured", clips_per_class=1, seed=7, cache_dir=tmp_path, num_proc=2)
    before = written_at(tmp_path)
    again = load_motion_shapes("textured", clips_per_class=1, seed=7, cache_dir=tmp_path, num_proc=2)
    assert written_at(tmp_path) == before

    gone = again["test"][3]["video"]["path"]
    content = Path(gone).read_bytes()
    os.unlink(gone)
    load_motion_shapes("textured", clips_per_class=1, seed=7, cache_dir=tmp_path, num_proc=1)
    after = written_at(tmp_path)
    assert after.keys() == before.keys() and Path(gone).read_bytes() == content
    assert {path for path in after if after[path] != before[path]} == {gone, os.path.dirname(gone)}


def test_presets_and_seeds_give_other_clips_of_the_same_classes():
    clips = {
        (preset, seed, index): render_clip("circle_cw", preset, seed, index).tobytes()
        for preset in PRESETS
        for seed in (0, 1)
        for index in (0, 1)
    }
    assert len(set(clips.values())) == len(clips)
    assert render_clip("circle_cw", "plain", 1, 1).tobytes() == clips["plain", 1, 1]


@pytest.mark.skipif(os.name != "posix", reason="forks, and sends POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_generation_leaves_whole_clips_and_resumes(made, tmp_path, start_program, how):
    process = start_program(clips_per_class=60, cache_dir=tmp_path, num_proc=2)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("[0-9]*.mp4"))) < 30:
        assert process.is_alive() and time.monotonic() < deadline, "generation did not get going"
        time.sleep(0.02)
    os.killpg(process.pid, how)
    process.join(timeout=30)

    assert process.exitcode not in (0, None)
    left = [str(path) for path in tmp_path.rglob("[0-9]*.mp4")]
    assert 30 <= len(left) < 60 * len(MOTIONS)
    for path in left:
        with av.open(path) as container:
            assert sum(1 for _ in container.decode(video=0)) == FRAMES
    if how == signal.SIGINT:  # Ctrl-C also cleans up
        assert {str(tmp_path / path) for path in contents(tmp_path)} == set(left)

    before = written_at(tmp_path)
    load_motion_shapes("plain", clips_per_class=2, cache_dir=tmp_path, num_proc=1)
    resumed, reference = contents(tmp_path), contents(made[0])
    assert {name: resumed[name] for name in reference} == reference
    after = written_at(tmp_path)
    assert {path: after[path] for path in left} == {path: before[path] for path in left}


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_programs_fill_one_folder_at_once(made, tmp_path, start_program):
    programs = [start_program(clips_per_class=2, cache_dir=tmp_path, num_proc=n) for n in (1, 2)]
    for process in programs:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert contents(tmp_path) == contents(made[0])


def test_processes_that_are_not_forked_from_this_one_make_the_same_clips(made, tmp_path):
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        load_motion_shapes("plain", clips_per_class=1, cache_dir=tmp_path, num_proc=2)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    found, reference = contents(tmp_path), contents(made[0])
    assert len(found) == len(MOTIONS)
    assert found == {name: reference[name] for name in found}


def test_default_folder_is_under_hf_home(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    splits = load_motion_shapes(clips_per_class=1)
    paths = [row["video"]["path"] for ds in splits.values() for row in ds]
    assert all(path.startswith(str(tmp_path / "dmgal_hf" / "motion_shapes" / "plain-seed0-v")) for path in paths)
    assert all(os.path.getsize(path) for path in paths)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown preset 'fancy'.*plain, textured"):
        load_motion_shapes("fancy", cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"unknown preset 'fancy'.*plain, textured"):
        render_clip("right", "fancy")
    with pytest.raises(ValueError, match=r"unknown motion class 'rihgt'.*right, left"):
        render_clip("rihgt")
    with pytest.raises(ValueError, match="clips_per_class is 0"):
        load_motion_shapes(clips_per_class=0, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="num_proc is 0"):
        load_motion_shapes(num_proc=0, cache_dir=tmp_path)
    with pytest.raises(TypeError):
        load_motion_shapes(seed=0.5, cache_dir=tmp_path)
    assert contents(tmp_path) == {}
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file/cache.*writable folder.*cache_dir"):
        load_motion_shapes(cache_dir=tmp_path / "file" / "cache")


# --- the picture, against slow plain versions ------------------------------------------------------------------------


def paint_slowly(frames, centre, radius, angle, shape, texture, colours):
    """Every pixel of every frame, at its distance on the torus."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    painted = frames.astype(float)
    for t in range(len(frames)):
        dx = np.mod(columns - centre[0, t] + SIZE / 2, SIZE) - SIZE / 2
        dy = np.mod(rows - centre[1, t] + SIZE / 2, SIZE) - SIZE / 2
        p = (math.cos(angle[t]) * dx + math.sin(angle[t]) * dy) / radius[t]
        q = (math.cos(angle[t]) * dy - math.sin(angle[t]) * dx) / radius[t]
        inside = np.clip(0.5 - radius[t] * shape(p, q), 0, 1)[..., None]
        mix = np.maximum(texture(p, q), np.clip(0.5 + radius[t] * (p - 0.35), 0, 1))[..., None]
        painted[t] += inside * (255 * ((1 - mix) * colours[0] + mix * colours[1]) - painted[t])
    return painted


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_wrap_around_the_edges(shape):
    rng = np.random.default_rng(0)
    n = 6
    frames = rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)
    # Sizes up to the largest that can occur; centres on both sides of the picture, as fast clips leave it.
    facts = (rng.uniform(-SIZE, 2 * SIZE, (2, n)), np.geomspace(6, 26 * np.exp(0.5625), n), rng.uniform(-9, 9, n))
    look = (SHAPES[shape], lambda p, q: np.clip(0.5 - 0.5 * q, 0, 1), rng.random((2, 3)))
    expected = paint_slowly(frames, *facts, *look)
    motion_shapes._paint(frames, *facts, *look)
    assert np.abs(frames - expected).max() < 1


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_shows_on_every_shape_without_texture(shape):
    n = 8
    frames = np.zeros((n, SIZE, SIZE, 3), np.uint8)
    centre, angle, radius = np.full((2, n), 56.0), 2 * np.pi * np.arange(n) / n, np.full(n, 20.0)
    colours = np.array([[0.5] * 3, [0.8] * 3])
    motion_shapes._paint(frames, centre, radius, angle, SHAPES[shape], lambda p, q: np.zeros_like(p), colours)
    for t in range(1, n):  # no two of the eight orientations look alike
        assert np.abs(frames[t].astype(float) - frames[0]).sum() / (frames[0] > 0).sum() > 10


@pytest.mark.parametrize("name", ["noise", "stripes", "checker"])
def test_backgrounds_move_with_the_camera_and_wrap(name):
    shift = np.array([[0.0, 3, -2, 1.5, SIZE, -1e-17], [0.0, 0, 5, 0, -SIZE, 2.25]])
    picture = clip_looks.draw_background(np.random.default_rng(0), name, shift)
    still = picture[0]
    assert still.min() >= 0 and still.max() <= 1 and still.std() > 0.1
    right = (np.roll(still, 1, 1) + np.roll(still, 2, 1)) / 2
    below = 0.75 * np.roll(still, 2, 0) + 0.25 * np.roll(still, 3, 0)
    expected = [still, np.roll(still, 3, 1), np.roll(still, (5, -2), (0, 1)), right, still, below]
    np.testing.assert_allclose(picture, np.stack(expected), atol=1e-5)


# --- what a frame tells, and what motion tells -----------------------------------------------------------------------


def grey(clip):
    return clip @ np.array([0.299, 0.587, 0.114])


def sampled(preset, name, index):
    """(8, SIZE, SIZE) grey levels of the frames that a model sees."""
    return grey(render_clip(name, preset, 3, index)[SEGMENT_CENTRES])


def object_mass(frames, preset):
    """(8, SIZE, SIZE): how far each frame is from the clip's usual grey, as a rough mask of the object."""
    return np.abs(frames - (np.median(frames) if preset == "plain" else np.median(frames, axis=0)))


def track(mass):
    """(7, 2): steps (x, y) in pixels between neighbouring frames, by cross-correlation on the torus."""
    spectrum = np.fft.fft2(mass)
    correlation = np.fft.ifft2(spectrum[1:] * spectrum[:-1].conj()).real.reshape(len(mass) - 1, -1)
    steps = np.stack(np.unravel_index(correlation.argmax(1), (SIZE, SIZE))[::-1], axis=1)
    return np.mod(steps + SIZE // 2, SIZE) - SIZE // 2


def ridge_accuracy(features, labels, held_out):
    """Share of held-out rows that a ridge classifier on the other rows gets right."""
    mean, std = features[~held_out].mean(0), features[~held_out].std(0) + 1e-6
    x = np.concatenate([(features - mean) / std, np.ones((len(features), 1))], axis=1)
    seen, targets = x[~held_out], np.eye(labels.max() + 1)[labels[~held_out]]
    weights = np.linalg.solve(seen.T @ seen + 30 * np.eye(x.shape[1]), seen.T @ targets)
    return ((x[held_out] @ weights).argmax(1) == labels[held_out]).mean()


@pytest.mark.parametrize("preset", PRESETS)
def test_single_frames_say_nothing_while_motion_tells_the_novel_classes(preset):
    names, clips = [name for name, motion in MOTIONS.items() if motion.split == "test"], 32
    clip_frames = [sampled(preset, name, index) for name in names for index in range(clips)]
    mass = np.stack([object_mass(frames, preset) for frames in clip_frames])
    labels = np.repeat(np.arange(len(names)), clips)
    held_out = np.tile(np.arange(clips) >= 22, len(names))

    picked = np.random.default_rng(0).permuted(np.tile(np.arange(8), (len(mass), 1)), axis=1)[:, :3]
    chosen = np.take_along_axis(mass, picked[:, :, None, None], 1).reshape(-1, SIZE, SIZE)
    small = chosen.reshape(-1, 14, 8, 14, 8).mean((2, 4)).reshape(len(chosen), -1)
    areas = np.sqrt((chosen > 8).mean((1, 2)))[:, None]
    levels = np.repeat([[frames.mean(), frames.std()] for frames in clip_frames], 3, axis=0)
    looks = np.concatenate([small, areas, levels], axis=1)
    from_one_frame = ridge_accuracy(looks, np.repeat(labels, 3), np.repeat(held_out, 3))

    steps = np.stack([track(clip) for clip in mass]).reshape(len(mass), -1)
    sizes = np.diff(np.log(mass.sum((2, 3)) + 1), axis=1)
    from_motion = ridge_accuracy(np.concatenate([steps, 10 * sizes], axis=1), labels, held_out)

    assert from_one_frame < 1 / len(names) + 0.1
    assert from_motion > 0.9


def test_displacement_between_two_frames_recovers_the_direction():
    heading = {"right": 0, "down_right": 45, "down": 90, "down_left": 135}
    heading |= {"left": 180, "up_left": 225, "up": 270, "up_right": 315}
    for name, degrees in heading.items():
        for index in range(4):
            x, y = track(object_mass(sampled("plain", name, index), "plain")[[2, 5]])[0]
            difference = np.mod(math.degrees(math.atan2(y, x)) - degrees + 180, 360) - 180
            assert abs(difference) < 22.5, (name, index)


def largest_gap(values, others):
    """Two-sample Kolmogorov-Smirnov distance: the largest gap between the two cumulative distributions."""
    points = np.concatenate([values, others])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (values, others)]
    return np.abs(shares[0] - shares[1]).max()


def test_where_and_how_large_an_object_is_does_not_depend_on_the_class():
    """At a random moment: uniform position and angle, and one distribution of sizes, in every class."""
    clips, camera = 1000, np.zeros((2, FRAMES))
    drawn = {}
    for number, (name, motion) in enumerate(MOTIONS.items()):
        rng = np.random.default_rng(number)
        facts = [np.vstack(motion_shapes._draw_track(rng, motion, camera)) for _ in range(clips)]
        drawn[name] = np.stack([fact[:, rng.integers(FRAMES)] for fact in facts], axis=1)  # x, y, radius, angle
    rest = {name: np.concatenate([drawn[n] for n in drawn if n != name], axis=1) for name in drawn}
    even = (np.arange(clips) + 0.5) / clips
    allowed = 2 / math.sqrt(clips)  # 1 in 1,500 draws of one distribution would be further apart
    for name, (x, y, radius, angle) in drawn.items():
        assert largest_gap(np.mod(x / SIZE, 1), even) < allowed, name
        assert largest_gap(np.mod(y / SIZE, 1), even) < allowed, name
        assert largest_gap(np.mod(angle / (2 * np.pi), 1), even) < allowed, name
        assert largest_gap(radius, rest[name][2]) < allowed, name
        assert radius.min() > 5 and radius.max() < SIZE / 2 - 5, name
