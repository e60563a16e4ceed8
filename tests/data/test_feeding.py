"""Augmenting many clips at once, as a GPU does it, against doing it clip by clip, as workers do it."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_transforms import largest_difference, random_clip, seeded
from torch.utils.data import DataLoader

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data import (
    EpisodeSource,
    EpisodeVideos,
    augment_ahead,
    collate_episodes,
    load_motion_shapes,
    pack_episodes,
)
from dmgal_hf.data.batched_transforms import as_numbers, augment_clips
from dmgal_hf.data.transforms import ClipAugmentation

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

ON_GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")
)
DEVICES = pytest.mark.parametrize("device", ["cpu", ON_GPU])


def smooth_clip(height, width, seed=0):
    """Waves of colour, so that neighbouring pixels resemble each other: (2, 3, height, width) uint8."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    phases = generator.uniform(0, 6, (2, 3, 1, 1))
    waves = 128 + 80 * np.sin(x * generator.uniform(1, 3) + phases) + 45 * np.cos(y * 2 - phases)
    return torch.from_numpy(waves.clip(0, 255).astype(np.uint8))


def augment_both_ways(clips, augmentation, device, seed=0):
    """Clip by clip, and all at once: (V, T, 3, h, w) uint8 each."""
    drawn = [augmentation.draw(*clip.shape[-2:], seeded(seed + n)) for n, clip in enumerate(clips)]
    one_by_one = torch.stack([augmentation.apply(clip, what) for clip, what in zip(clips, drawn, strict=True)])
    height, width = (max(clip.shape[side] for clip in clips) for side in (-2, -1))
    padded = torch.full((len(clips), len(clips[0]), 3, height, width), 77, dtype=torch.uint8)
    for clip, target in zip(clips, padded, strict=True):
        target[..., : clip.shape[-2], : clip.shape[-1]] = clip
    numbers = [as_numbers(what, *clip.shape[-2:], augmentation) for clip, what in zip(clips, drawn, strict=True)]
    at_once = augment_clips(padded.to(device), torch.stack(numbers).to(device), augmentation)
    assert at_once.dtype == torch.uint8
    return one_by_one, at_once.cpu()


AUGMENTATIONS = {
    "all": ClipAugmentation(24, 32, True, 0.3, (0.5, 0.5, 0.5, 0.25), 0.5),
    "all, high crop": ClipAugmentation((30, 20), 32, True, 0.3, (0.5, 0.5, 0.5, 0.25), 0.5),
    "support": ClipAugmentation.for_support(24, 32),
    "flip": ClipAugmentation(24, 32, True),
    "gray": ClipAugmentation(24, 32, grayscale=0.5),
    "hue": ClipAugmentation(24, 32, color_jitter=(0, 0, 0, 0.5)),
    "no hue": ClipAugmentation(24, 32, color_jitter=(0.9, 0.9, 0.9, 0)),
    "erasing": ClipAugmentation(24, 32, random_erasing=1.0),
}


@DEVICES
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_all_at_once_is_clip_by_clip_to_the_bit(name, device):
    """Clips of their final size, wide and high ones together."""
    shapes = [(32, 44), (44, 32), (32, 32), (40, 32)] * 10
    clips = [random_clip(2, *shape, seed=n) for n, shape in enumerate(shapes)]
    one_by_one, at_once = augment_both_ways(clips, AUGMENTATIONS[name], device)
    assert torch.equal(one_by_one, at_once)


@DEVICES
@pytest.mark.parametrize("resample", [2, 3])
def test_resizing_stays_a_rounding(resample, device):
    shapes = [(60, 90), (90, 61), (25, 31), (32, 50), (33, 77), (128, 64)] * 4
    clips = [random_clip(2, *shape, seed=n) for n, shape in enumerate(shapes)]
    clips += [smooth_clip(*shape, seed=n) for n, shape in enumerate(shapes)]
    augmentation = ClipAugmentation(24, 32, True, random_erasing=0.5, resample=resample)
    one_by_one, at_once = augment_both_ways(clips, augmentation, device)
    assert largest_difference(one_by_one, at_once) <= (1 if resample == 2 else 2)
    assert (one_by_one != at_once).float().mean() < 0.02


@DEVICES
def test_resizing_before_the_colours_stays_a_rounding(device):
    clips = [smooth_clip(60 + n, 90 - n, seed=n) for n in range(24)]
    one_by_one, at_once = augment_both_ways(clips, AUGMENTATIONS["all"], device)
    difference = (one_by_one.int() - at_once.int()).abs()
    assert difference.max() <= 6 and difference.float().mean() < 0.1  # a level, times factors of up to 1.5


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return load_motion_shapes(clips_per_class=5, cache_dir=tmp_path_factory.mktemp("shapes"), num_proc=1)["train"]


def loaded(videos, raw, num_workers=0, resize=112, device="cpu"):
    augmentations = (
        ClipAugmentation.for_support(96, resize), ClipAugmentation.for_query(96, resize, horizontal_flip=True),
    )  # fmt: skip
    episodes = EpisodeSource(videos["label"], way=3, shot=1, query=2, seed=3)
    processor = DmgalVideoProcessor(num_frames=4, size=resize, crop_size=96)
    data = EpisodeVideos(videos, episodes, processor, augmentations, seed=5, replace_broken=True, raw=raw)
    loader = DataLoader(
        data, batch_size=2, sampler=range(1, 6), num_workers=num_workers, pin_memory=device == "cuda",
        collate_fn=pack_episodes if raw else collate_episodes,
    )  # fmt: skip
    return list(augment_ahead(loader, augmentations, torch.device(device)) if raw else loader)


@pytest.mark.parametrize(
    "num_workers, device", [(0, "cpu"), (2, "cpu"), pytest.param(2, *ON_GPU.values, marks=ON_GPU.marks)]
)
def test_episodes_for_a_gpu_are_those_of_the_workers(videos, num_workers, device):
    plain, raw = loaded(videos, False), loaded(videos, True, num_workers, device=device)
    assert len(plain) == len(raw) == 3 and plain[-1]["labels"].shape == (1, 6)
    for one, other in zip(plain, raw, strict=True):
        assert one.keys() == other.keys() and one["broken"] == other["broken"] == []
        assert other["episode"].device.type == "cpu"  # read on the host at every step
        assert one["way"] == other["way"] == 3
        for name in one.keys() - {"broken", "way"}:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name].cpu())


def test_broken_and_large_videos_on_the_way_to_a_gpu(videos, tmp_path):
    """A broken clip is replaced by the same one, and clips far larger than needed are resized before they are sent."""
    (tmp_path / "broken.mp4").write_text("no video")
    paths = [video["path"] for video in videos["video"]]
    paths[::5] = [str(tmp_path / "broken.mp4")] * len(paths[::5])
    columns = {"video": paths, "label": videos["label"][:], "video_id": videos["video_id"][:]}
    table = Dataset.from_dict(columns, features=videos.features)
    plain, raw = loaded(table, False, resize=96), loaded(table, True, resize=96)
    assert any(batch["broken"] for batch in plain)
    for one, other in zip(plain, raw, strict=True):
        assert one["broken"] == other["broken"]
        difference = (one["query_pixel_values"].int() - other["query_pixel_values"].int()).abs().float()
        assert difference.mean() < 1
        assert largest_difference(one["support_pixel_values"], other["support_pixel_values"]) <= 1
    augmentations = (ClipAugmentation(40, 48), ClipAugmentation(40, 48))
    episodes = EpisodeSource(videos["label"], way=2, shot=1, query=1, seed=3)
    processor = DmgalVideoProcessor(num_frames=4, size=48, crop_size=40)
    item = EpisodeVideos(videos, episodes, processor, augmentations, raw=True)[0]
    assert {clip.shape for clip in item["support_clips"] + item["query_clips"]} == {(4, 3, 48, 48)}
    assert item["support_numbers"].shape == (2, 35)
