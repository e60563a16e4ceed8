"""Prepared folders of real videos: what they hold, and that reading from them is reading from the files."""

import io
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk
from huggingface_hub.utils import WeakFileLock
from PIL import Image as PilImage
from torch.utils.data import DataLoader

from dmgal_hf.data import (
    ClipAugmentation,
    EpisodeSource,
    EpisodeVideos,
    check_episodes,
    collate_episodes,
    load_video_folder,
    sample_episodes,
)
from dmgal_hf.data.preparation import (
    PrepareArguments,
    describe_report,
    describe_source,
    load_prepared,
    prepare_videos,
    read_records,
)
from dmgal_hf.model.video_decoding import VideoDecodeError, probe_video, read_frames, read_frames_at, segment_indices
from dmgal_hf.model.video_processing_dmgal import DmgalVideoProcessor, resize_short_side
from dmgal_hf.training.arguments import DataArguments
from dmgal_hf.training.loading import load_videos

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
SPLITS = {"train": ("bend", "climb"), "val": ("dive", "fall"), "test": ("jump", "kick")}
SIZES = {"bend": (72, 96), "climb": (96, 72), "dive": (48, 64)}  # the last is smaller than SHORT_SIDE
SHORT_SIDE = 56


def write_clip(path, seed, num_frames=20, size=(64, 96), codec="libx264", **options):
    """Smooth colours that drift: every frame differs from every other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    phase = np.random.default_rng(seed).random((3, 1, 1)) * 6
    y, x = np.mgrid[: size[0], : size[1]] / 20
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for k in range(num_frames):
            picture = 128 + 100 * np.sin(phase + x + y * np.array([[[1]], [[-1]], [[0.5]]]) + 0.3 * k)
            picture = np.ascontiguousarray(picture.transpose(1, 2, 0).astype(np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return path


def make_videos(root, clips=3, num_frames=20):
    for split, names in SPLITS.items():
        for name in names:
            for k in range(clips):
                suffix, codec = (".avi", "mpeg4") if k == 1 else (".mp4", "libx264")
                path = root / split / name / f"{name} {k}{suffix}"
                write_clip(path, [len(name), k], num_frames + k, SIZES.get(name, (64, 96)), codec)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


def prepare(root, output, videos=None, **fields):
    arguments = PrepareArguments(output=str(output), **{"num_proc": 1, "short_side": SHORT_SIDE, **fields})
    source = describe_source(DataArguments(dataset="folder", videos=str(root)))
    return prepare_videos(load_video_folder(root) if videos is None else videos, arguments, source)


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    """One folder for each kind of cache, read only."""
    folders = {}
    for frames in ("none", "raw", "jpeg"):
        folders[frames] = tmp_path_factory.mktemp(frames) / "out"
        prepare(root, folders[frames], frames=frames)
    return folders


def decode_everything(path):
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def shards(output):
    return {path.name: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}


@pytest.mark.slow
def test_index_tells_what_the_files_are(root, prepared):
    original, index = load_video_folder(root), load_from_disk(str(prepared["none"] / "index"))
    assert list(index) == list(original) == ["train", "validation", "test"]
    for split, rows in index.items():
        assert rows["path"][:] == [video["path"] for video in original[split]["video"]]
        assert rows["video_id"][:] == original[split]["video_id"][:]
        assert rows["label"][:] == original[split]["label"][:]
        assert rows.features["label"] == original[split].features["label"]
        assert rows["error"][:] == [None] * len(rows)
        for row in rows:
            frames = decode_everything(row["path"])
            info = probe_video(row["path"])
            assert (row["num_frames"], row["height"], row["width"]) == (len(frames), *frames.shape[-2:])
            assert (row["fps"], row["duration"]) == (25, pytest.approx(info.duration))
    stored = sum(path.stat().st_size for path in (prepared["none"] / "index").rglob("*.arrow"))
    assert stored < min(Path(row["path"]).stat().st_size for row in index["train"]) * len(original["train"])


@pytest.mark.slow
@pytest.mark.parametrize("frames", ["none", "raw", "jpeg"])
def test_prepared_dataset_is_the_original_to_all_who_draw_from_it(root, prepared, frames):
    original, dataset = load_video_folder(root), load_prepared(prepared[frames], resize=SHORT_SIDE)
    assert list(dataset) == list(original)
    for split in original:
        assert dataset[split].features == original[split].features
        assert dataset[split]["label"][:] == original[split]["label"][:]
        assert dataset[split]["video_id"][:] == original[split]["video_id"][:]
        check_episodes(sample_episodes(original[split]["label"], 2, 1, 1, 5), dataset[split]["label"])


def test_raw_cache_holds_every_frame_resized(root, prepared):
    dataset = load_prepared(prepared["raw"])
    for split, original in load_video_folder(root).items():
        for row in range(len(original)):
            everything = decode_everything(original[row]["video"]["path"])
            indices = segment_indices(len(everything), 5, torch.Generator().manual_seed(row))
            wanted = everything[indices]
            if min(wanted.shape[-2:]) > SHORT_SIDE:
                wanted = resize_short_side(wanted.contiguous(memory_format=torch.channels_last), SHORT_SIDE)
            found = read_frames(dataset[split][row]["video"], 5, torch.Generator().manual_seed(row))
            assert torch.equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("frames, difference", [("raw", 0), ("jpeg", 32)])
@pytest.mark.parametrize("training", [False, True])
def test_episodes_from_the_cache_are_those_from_the_files(root, prepared, frames, difference, training):
    original, dataset = load_video_folder(root)["train"], load_prepared(prepared[frames])["train"]
    processor = DmgalVideoProcessor(num_frames=4, size=SHORT_SIDE, crop_size=48)
    augmentations = None
    if training:  # what changes colours would change the tolerance
        augmentations = (ClipAugmentation.for_support(48, SHORT_SIDE), ClipAugmentation(48, SHORT_SIDE, True))
    items = []
    for videos in (original, dataset):
        episodes = EpisodeSource(videos["label"], way=2, shot=1, query=2, seed=3)
        items.append([EpisodeVideos(videos, episodes, processor, augmentations, seed=5)[k] for k in range(4)])
    for from_files, from_cache in zip(*items, strict=True):
        assert from_files.keys() == from_cache.keys()
        assert from_files["broken"] == from_cache["broken"] == []
        for name in ("support_labels", "labels", "support_classes", "query_classes"):
            assert torch.equal(from_files[name], from_cache[name])
        for name in ("support_pixel_values", "query_pixel_values"):
            error = (from_files[name].int() - from_cache[name].int()).abs()
            assert error.max() <= difference
            assert error.float().mean() < 2
    first, second = read_frames_at(original[0]["video"], [0, 1]).int()
    assert (first - second).abs().float().mean() > 10  # so a frame is not taken for its neighbour


def test_processor_reads_the_cache_like_any_video(root, prepared):
    original, dataset = load_video_folder(root)["test"], load_prepared(prepared["raw"])["test"]
    processor = DmgalVideoProcessor(num_frames=4, size=SHORT_SIDE, crop_size=48)
    from_cache = processor([dataset[0]["video"], dataset[1]["video"]["path"]])["pixel_values"]
    assert torch.equal(from_cache, processor([original[0]["video"], original[1]["video"]])["pixel_values"])
    info = probe_video(dataset[0]["video"])
    assert (info.num_frames, info.height, info.width) == (20, SHORT_SIDE, SHORT_SIDE * 96 // 64)


def test_a_shard_is_a_dataset_of_images(prepared):
    for path in sorted((prepared["jpeg"] / "shards").iterdir())[:1]:
        shard = Dataset.from_file(str(path))
        assert len(shard[0]["frames"]) == shard[0]["num_frames"] >= 20
        assert shard[0]["frames"][0]["bytes"].startswith(b"\xff\xd8")


@pytest.mark.slow
def test_max_frames_keeps_an_even_choice(root, tmp_path):
    prepare(root, tmp_path / "out", frames="raw", max_frames=6, resample=3)
    dataset, original = load_prepared(tmp_path / "out")["train"], load_video_folder(root)["train"]
    for row in (0, 1, 4):
        everything = decode_everything(original[row]["video"]["path"])
        wanted = everything[segment_indices(len(everything), 6)].contiguous(memory_format=torch.channels_last)
        assert torch.equal(read_frames(dataset[row]["video"], 6), resize_short_side(wanted, SHORT_SIDE, 3))
        assert probe_video(dataset[row]["video"]).num_frames == 6


@pytest.mark.slow
def test_moved_folder_still_loads(root, prepared, tmp_path):
    prepare(root, tmp_path / "here", frames="jpeg")
    (tmp_path / "here").rename(tmp_path / "there")
    moved, expected = load_prepared(tmp_path / "there")["test"][0], load_prepared(prepared["jpeg"])["test"][0]
    assert torch.equal(read_frames(moved["video"], 3), read_frames(expected["video"], 3))


def break_clips(root):
    """One file of text, one cut short, one with a hole in its middle that neither its ends nor its packets show."""
    text, cut, hole = (root / "train" / "bend" / f"bend {k}" for k in ("0.mp4", "1.avi", "2.mp4"))
    text.write_text("no video")
    cut.write_bytes(cut.read_bytes()[:-900])
    write_clip(hole, 0, 40, g="10", bf="0")
    with av.open(str(hole)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][15]
    data = bytearray(hole.read_bytes())
    data[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
    hole.write_bytes(data)
    assert probe_video(hole).num_frames == 40
    return [str(path) for path in (text, cut, hole)]


@pytest.mark.slow
def test_broken_videos_are_reported_and_left_out(tmp_path, caplog):
    root, output = make_videos(tmp_path / "videos", clips=5, num_frames=6), tmp_path / "out"
    broken = break_clips(root)
    original = load_video_folder(root)
    report = prepare(root, output)
    assert [one["path"] for one in report["broken"]] == broken
    assert {(one["split"], one["class"]) for one in report["broken"]} == {("train", "bend")}
    assert "not a readable video" in report["broken"][0]["error"] and "truncated" in report["broken"][1]["error"]
    assert json.loads((output / "report.json").read_text()) == report
    assert "30 videos: 30 read now, 0 known, 3 broken" in describe_report(report)
    assert all(path in describe_report(report) for path in broken)

    dataset = load_prepared(output)
    assert "3 of 10 videos of the split train are left out" in caplog.text
    expected = [row["video_id"] for row in original["train"] if row["video"]["path"] not in broken]
    assert dataset["train"]["video_id"][:] == expected and len(expected) == 7
    assert dataset["test"]["video_id"][:] == original["test"]["video_id"][:]
    with pytest.raises(ValueError, match="drawn from another dataset"):
        check_episodes(sample_episodes(original["train"]["label"], 2, 1, 1, 10), dataset["train"]["label"])
    check_episodes(sample_episodes(original["test"]["label"], 2, 1, 1, 10), dataset["test"]["label"])

    episodes = sample_episodes(dataset["train"]["label"], 2, 1, 1, 8)
    items = EpisodeVideos(dataset["train"], episodes, DmgalVideoProcessor(num_frames=40, size=32, crop_size=32))
    assert sum(len(items[k]["broken"]) for k in range(8)) == 0


def test_split_without_a_readable_video(tmp_path):
    root = tmp_path / "videos"
    write_clip(root / "train" / "bend" / "0.mp4", 0, 4)
    (root / "test" / "jump").mkdir(parents=True)
    (root / "test" / "jump" / "0.mp4").write_text("no video")
    prepare(root, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no video of the split 'test' in .*out can be read"):
        load_prepared(tmp_path / "out")


@pytest.mark.slow
def test_only_new_and_changed_videos_are_read(tmp_path):
    root, output = make_videos(tmp_path / "videos", clips=2, num_frames=6), tmp_path / "out"
    assert prepare(root, output, frames="raw")["read_now"] == 12
    first = shards(output)
    assert {key: prepare(root, output, frames="raw")[key] for key in ("read_now", "kept")} == {
        "read_now": 0,
        "kept": 12,
    }
    assert shards(output) == first

    write_clip(root / "train" / "bend" / "bend 9.mp4", 9, 5)  # new, between old ones in the order of rows
    changed = write_clip(root / "test" / "jump" / "jump 0.mp4", 77, 9)
    report = prepare(root, output, frames="raw")
    assert (report["read_now"], report["kept"]) == (2, 11)
    assert first.items() <= shards(output).items()
    dataset = load_prepared(output)
    assert dataset["train"]["video_id"][:] == load_video_folder(root)["train"]["video_id"][:]
    assert torch.equal(
        read_frames(dataset["test"][0]["video"], 9), resize_short_side(read_frames(changed, 9), SHORT_SIDE)
    )

    stamp = changed.stat().st_mtime_ns + 10**9
    os.utime(changed, ns=(stamp, stamp))
    assert prepare(root, output, frames="raw")["read_now"] == 1
    changed.unlink()
    assert prepare(root, output, frames="raw") == {"videos": 12, "read_now": 0, "kept": 12, "broken": []}


def test_folder_of_frames_is_a_video(tmp_path):
    clip = tmp_path / "videos" / "train" / "bend" / "extracted"
    clip.mkdir(parents=True)
    source = write_clip(tmp_path / "source.mp4", 1, 4)
    for k, frame in enumerate(av.open(str(source)).decode(video=0)):
        frame.to_image().save(clip / f"{k}.png")
    assert prepare(tmp_path / "videos", tmp_path / "out", frames="raw")["broken"] == []
    found = read_frames(load_prepared(tmp_path / "out")["train"][0]["video"], 4)
    assert torch.equal(found, resize_short_side(read_frames(clip, 4), SHORT_SIDE))
    (clip / "3.png").unlink()
    assert prepare(tmp_path / "videos", tmp_path / "out", frames="raw")["read_now"] == 1


@pytest.mark.slow
def test_archive_of_frames_is_prepared_and_added_to(tmp_path):
    clips = {}
    for split, name in (("train", "bend"), ("test", "kick")):
        for k in range(2):
            decoded = av.open(str(write_clip(tmp_path / "source.mp4", k, 4))).decode(video=0)
            clips[f"{split}/{name}/{k}"] = [frame.to_ndarray(format="rgb24") for frame in decoded]

    def pack(names):
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
            for name in names:
                for number, frame in enumerate(clips[name]):
                    file = io.BytesIO()
                    PilImage.fromarray(frame).save(file, "PNG")
                    archive.writestr(f"{name}/{number}.png", file.getvalue())

    pack(list(clips)[:3])
    root = tmp_path / "all.zip"
    assert prepare(root, tmp_path / "out", frames="raw")["read_now"] == 3
    pack(clips)  # the file is new as a whole, of its clips one is
    report = prepare(root, tmp_path / "out", frames="raw", num_proc=2)
    assert (report["read_now"], report["kept"], report["broken"]) == (1, 3, [])
    original, dataset = load_video_folder(root), load_prepared(tmp_path / "out")
    for split in original:
        for one, cached in zip(original[split], dataset[split], strict=True):
            name = f"{split}/{one['video_id']}"
            assert torch.equal(
                read_frames(one["video"], 4), torch.from_numpy(np.stack(clips[name])).permute(0, 3, 1, 2)
            )
            assert torch.equal(
                read_frames(cached["video"], 4), resize_short_side(read_frames(one["video"], 4), SHORT_SIDE)
            )
    episodes = sample_episodes([0, 0, 1, 1], 2, 1, 1, 3)
    videos = concatenate_datasets([original["train"], original["test"]])
    loader = DataLoader(
        EpisodeVideos(videos, episodes, DmgalVideoProcessor(num_frames=4, size=48, crop_size=48)),
        batch_size=1, num_workers=2, collate_fn=collate_episodes,
    )  # fmt: skip
    assert [batch["query_pixel_values"].shape for batch in loader] == [(1, 2, 4, 3, 48, 48)] * 3


def without_places(output):
    return {
        split: rows.remove_columns(["cache_file", "cache_row"]).to_list()
        for split, rows in load_from_disk(str(output / "index")).items()
    }


@pytest.mark.slow
def test_killed_run_goes_on_where_it_stopped(tmp_path):
    root, output = make_videos(tmp_path / "videos", num_frames=6), tmp_path / "out"
    long = write_clip(root / "test" / "kick" / "long 0.avi", 5, 400, codec="mpeg4")
    for k in (1, 2):  # slow enough that the run is at work when it is killed
        shutil.copy(long, long.with_name(f"long {k}.avi"))
    fields = {"frames": "raw", "num_proc": 2}
    process = multiprocessing.get_context("forkserver").Process(target=prepare, args=(root, output), kwargs=fields)
    process.start()
    while process.is_alive() and not list(output.glob("shards/*.arrow")):
        time.sleep(0.001)
    readers = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    gone, left = psutil.wait_procs(readers, timeout=60)
    assert gone and not left
    kept = {name: stamp for name, stamp in shards(output).items() if name.endswith(".arrow")}
    done = len(read_records(output))
    assert 0 < done < 21
    with pytest.raises(FileNotFoundError, match=r"out is not finished: run scripts/prepare_data.py again"):
        load_prepared(output)

    (output / "shards" / ".half.arrow.aside").write_bytes(b"half a shard")
    report = prepare(root, output, frames="raw", num_proc=2)
    assert (report["read_now"], report["kept"]) == (21 - done, done)
    assert kept.items() <= shards(output).items()
    assert not list(output.glob("shards/.*"))
    assert sum(len(Dataset.from_file(str(path))) for path in output.glob("shards/*.arrow")) == 21

    prepare(root, tmp_path / "at once", frames="raw")
    assert without_places(output) == without_places(tmp_path / "at once")
    resumed, at_once = load_prepared(output), load_prepared(tmp_path / "at once")
    for split in at_once:
        for one, other in zip(resumed[split], at_once[split], strict=True):
            assert torch.equal(read_frames(one["video"], 3), read_frames(other["video"], 3))


@pytest.mark.slow
def test_script_and_the_one_field_of_training(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    command = [SCRIPT, "--dataset", "folder", "--videos", root, "--output", output, "--num_proc", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "18 videos: 18 read now, 0 known, 0 broken" in capsys.readouterr().out
    videos, original = load_videos(DataArguments(prepared=str(output))), load_video_folder(root)
    for split in original:
        assert videos[split].to_list() == original[split].to_list()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--prepared", str(output), "--output", str(output)])
    with pytest.raises(ValueError, match=r"prepared=.*out is made already"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_cache_of_small_frames_is_not_enlarged(prepared):
    with pytest.raises(ValueError, match=r"have a short side of 56, and resize=64 would enlarge them"):
        load_videos(DataArguments(prepared=str(prepared["jpeg"]), resize=64))
    load_videos(DataArguments(prepared=str(prepared["none"]), resize=64))


def test_other_dataset_or_settings_are_named(root, prepared, tmp_path):
    with pytest.raises(
        ValueError, match=r"frames was 'none' and is 'raw'; max_frames was None and is 4; resample was"
    ):
        prepare(root, prepared["none"], frames="raw", max_frames=4)
    with pytest.raises(ValueError, match=r"prepared otherwise: short_side was 56 and is 48\. Restore"):
        prepare(root, prepared["jpeg"], frames="jpeg", short_side=48)
    other = make_videos(tmp_path / "others", clips=1, num_frames=2)
    with pytest.raises(ValueError, match=rf"prepared otherwise: videos was '{root}' and is '{other}'\."):
        prepare(other, prepared["none"])


def test_folder_that_is_no_prepared_one(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no prepared folder, it holds 'notes.txt': give an empty folder"):
        prepare(root, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no prepared folder: write one with scripts/prepare_data.py"):
        load_prepared(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*notes.txt/out .*: give a writable folder"):
        prepare(root, tmp_path / "notes.txt" / "out")


def test_nothing_to_prepare(root, tmp_path):
    videos = load_video_folder(root)
    with pytest.raises(ValueError, match="the dataset has no videos"):
        prepare(root, tmp_path / "out", DatasetDict({split: rows.select([]) for split, rows in videos.items()}))
    embedded = videos["train"].map(lambda row: {"video": {"path": None, "bytes": b"1"}})
    with pytest.raises(ValueError, match="row 0 of train holds the bytes of its video"):
        prepare(root, tmp_path / "out", DatasetDict({"train": embedded}))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"output": None}, "output is not given"),
        ({"frames": "png"}, "frames must be one of none, jpeg, raw, got 'png'"),
        ({"resample": 1}, "resample must be 2"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
        ({"max_frames": -1}, "max_frames must be at least 1, got -1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        PrepareArguments(**{"output": "out", **fields})


def test_full_disk_names_the_file_and_keeps_what_is_finished(tmp_path):
    root, output = tmp_path / "videos", tmp_path / "out"
    for k in range(8):  # four shards of two; the last is larger than a file may grow
        write_clip(root / "train" / "bend" / f"{k}.mp4", k, 30 if k == 7 else 3, (56, 56))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"cannot write {output}/shards/\w+\.arrow .*room; what is finished stays"):
            prepare(root, output, frames="raw")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(name.endswith(".arrow") for name in shards(output))
    report = prepare(root, output, frames="raw")
    assert (report["read_now"], report["kept"]) == (2, 6)


@pytest.mark.slow
def test_two_runs_at_once(root, tmp_path):
    prepare(root, tmp_path / "out")
    lock = tmp_path / "out" / ".lock"
    with WeakFileLock(lock), pytest.raises(OSError, match=r"another run is at work on .*out: wait for its end"):
        prepare(root, tmp_path / "out")


@pytest.mark.slow
def test_lost_and_damaged_shards(root, tmp_path):
    output = tmp_path / "out"
    prepare(root, output, frames="jpeg")
    dataset = load_prepared(output)
    path, row = dataset["train"][0]["video"]["path"].split("#")
    with pytest.raises(VideoDecodeError, match=r"not a cached clip \(it has \d rows\)\. Run scripts/prepare_data.py"):
        read_frames(f"{path}#{int(row) + 90}")
    Path(path).rename(output / "elsewhere.arrow")
    with pytest.raises(FileNotFoundError, match=rf"1 files are missing in {output}/shards \({Path(path).name}"):
        load_prepared(output)
    (output / "elsewhere.arrow").unlink()
    assert 0 < prepare(root, output, frames="jpeg")["read_now"] < 18

    other = Path(load_prepared(output)["test"][0]["video"]["path"].split("#")[0])
    other.write_bytes(b"nothing")
    with pytest.raises(VideoDecodeError, match=r"not a cached clip"):
        read_frames(f"{other}#0")
    with pytest.raises(ValueError, match=rf"{other} is damaged .*: remove it and run"):
        prepare(root, output, frames="jpeg")
