"""Decoded frames kept for a run: the same frames, without the files they came from."""

import logging
import os
import shutil

import numpy as np
import psutil
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data import ClipAugmentation, EpisodeSource, EpisodeVideos, load_motion_shapes
from dmgal_hf.data.frame_memory import FrameMemory, keep_frames
from dmgal_hf.model.video_decoding import VideoDecodeError, read_frames
from dmgal_hf.model.video_processing_dmgal import resize_short_side

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

PROCESSOR = DmgalVideoProcessor(num_frames=5, size=64, crop_size=56)  # of clips of 112 x 112
AUGMENTATIONS = ClipAugmentation.for_support(56, 64), ClipAugmentation.for_query(56, 64, horizontal_flip=True)
LARGE = 1 << 40


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    load_motion_shapes(clips_per_class=3, cache_dir=folder, num_proc=1)
    return folder


@pytest.fixture
def videos(cache_dir, tmp_path):
    """A copy of the clips, which a test may break."""
    shutil.copytree(cache_dir, tmp_path / "clips")
    return load_motion_shapes(clips_per_class=3, cache_dir=tmp_path / "clips")["train"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "frames").mkdir()
    return tmp_path / "frames"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [64, 112, 200])
def test_frames_are_the_same_and_need_no_file(videos, folder, size):
    processor = DmgalVideoProcessor(size=size, crop_size=56)
    memory, kept = FrameMemory(folder, processor, LARGE), []
    for row in range(4):
        video = videos[row]["video"]
        for generator in (None, seeded(row)):
            plain = read_frames(video, 5, seeded(row) if generator else None)
            found = memory.read(row, video, 5, generator)
            assert found.dtype == torch.uint8 and found.shape[-2:] == (min(size, 112),) * 2
            assert torch.equal(resize_short_side(found, size), resize_short_side(plain, size))
            assert generator is None or torch.equal(generator.get_state(), after_reading(video, row))
            kept.append(found)
        os.remove(video["path"])
        assert torch.equal(memory.read(row, video, 5), kept[-2])
        assert torch.equal(FrameMemory(folder, processor, LARGE).read(row, video, 5, seeded(row)), kept[-1])


def after_reading(video, seed):
    generator = seeded(seed)
    read_frames(video, 5, generator)
    return generator.get_state()


@pytest.mark.parametrize("augmentations, raw", [(None, False), (AUGMENTATIONS, False), (AUGMENTATIONS, True)])
def test_episodes_are_the_same_with_several_workers(videos, folder, augmentations, raw):
    (folder / "no.mp4").write_text("no video")
    paths = [video["path"] for video in videos["video"]]
    paths[::7] = [str(folder / "no.mp4")] * len(paths[::7])
    columns = {"video": paths, "label": videos["label"][:], "video_id": videos["video_id"][:]}
    videos = Dataset.from_dict(columns, features=videos.features)
    episodes = EpisodeSource(videos["label"], way=5, shot=1, query=1, seed=1)
    plain = EpisodeVideos(videos, episodes, PROCESSOR, augmentations, 3, replace_broken=True)
    memory = FrameMemory(folder, PROCESSOR, LARGE)
    kept = EpisodeVideos(videos, episodes, PROCESSOR, augmentations, 3, True, raw, memory)
    wanted = [plain[k] for k in range(6)]
    assert any(item["broken"] for item in wanted)
    for _ in range(2):  # kept, then from what was kept
        loader = DataLoader(kept, batch_size=None, sampler=range(6), num_workers=2)
        for one, other in zip(wanted, loader, strict=True):
            assert one["broken"] == other["broken"]
            for part in ("support", "query"):
                if raw:  # nothing is left to resize
                    assert {clip.shape for clip in other[f"{part}_clips"]} == {(5, 3, 64, 64)}
                    assert other[f"{part}_numbers"].shape == (5, 35)
                else:
                    assert torch.equal(one[f"{part}_pixel_values"], other[f"{part}_pixel_values"])
    names = {path.name for path in folder.glob("*.npy")}
    assert names and all(path.name in names | {"no.mp4"} for path in folder.iterdir())  # nothing half written


def test_a_clip_that_takes_too_much_is_read_as_ever(videos, folder):
    video, size = videos[0]["video"], 48 * 64 * 64 * 3
    for limit, kept in ((size - 1, False), (size, True)):
        memory = FrameMemory(folder, PROCESSOR, limit)
        found = memory.read(0, video, 5)
        assert torch.equal(resize_short_side(found, 64), resize_short_side(read_frames(video, 5), 64))
        assert (folder / "0.npy").exists() is kept


def test_frames_are_kept_where_the_clips_fit_together(cache_dir, tmp_path):
    splits = load_motion_shapes(clips_per_class=3, cache_dir=cache_dir)
    splits = {name: splits[name] for name in ("train", "validation")}
    number = sum(map(len, splits.values()))
    needed = number * 48 * 64 * 64 * 3 / psutil.virtual_memory().total
    memories = keep_frames(splits, PROCESSOR, min(1.0, 100 * needed), tmp_path / "frames")
    assert memories.keys() == splits.keys()
    memories["train"].read(0, splits["train"][0]["video"], 5)
    memories["validation"].read(0, splits["validation"][0]["video"], 5)
    one, other = (np.load(tmp_path / "frames" / name / "0.npy") for name in splits)
    assert one.shape == other.shape == (48, 64, 64, 3) and not np.array_equal(one, other)
    for part in (0, needed * 1e-3):
        assert keep_frames(splits, PROCESSOR, part, tmp_path / "none") == {}
    assert not (tmp_path / "none").exists()


def test_a_clip_damaged_elsewhere_is_read_as_ever(tmp_path, folder):
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(9):
        Image.fromarray(np.full((70, 70, 3), 20 * number, np.uint8)).save(clip / f"{number}.png")
    (clip / "8.png").write_bytes(b"no picture")
    memory = FrameMemory(folder, PROCESSOR, LARGE)
    assert torch.equal(memory.read(0, str(clip), 1), read_frames(str(clip), 1))
    assert not list(folder.iterdir())
    with pytest.raises(VideoDecodeError, match=r"8\.png"):
        memory.read(0, str(clip), 9)


def test_what_cannot_be_written_is_said_once_and_changes_nothing(videos, folder, caplog):
    memory = FrameMemory(folder, PROCESSOR, LARGE)
    folder.rmdir()
    with caplog.at_level(logging.WARNING):
        for row in range(3):
            video = videos[row]["video"]
            assert torch.equal(memory.read(row, video, 5, seeded(0)), read_frames(video, 5, seeded(0)))
    (record,) = caplog.records
    assert "decoded anew" in record.message and str(folder) in record.message


def test_frames_of_another_size_than_the_augmentation_are_refused(videos, folder):
    memory = FrameMemory(folder, DmgalVideoProcessor(size=60, crop_size=56), LARGE)
    episodes = EpisodeSource(videos["label"], way=2, shot=1, query=1)
    with pytest.raises(ValueError, match=r"resize to 64 with resample 2, `memory` to 60 with 2"):
        EpisodeVideos(videos, episodes, PROCESSOR, AUGMENTATIONS, memory=memory)
