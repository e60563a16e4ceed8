"""Episodes as tensors: reads the videos that an episode names."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..model.video_decoding import VideoDecodeError, read_frames
from ..model.video_processing_dmgal import DmgalVideoProcessor, resize_short_side
from .batched_transforms import as_numbers
from .episodes import EpisodeSource
from .frame_memory import FrameMemory
from .transforms import ClipAugmentation


class EpisodeVideos(torch.utils.data.Dataset):
    """
    Map-style dataset of episodes for a `DataLoader`. Item i is a pure function of (videos, episodes, seed, i):
    whichever worker or process asks for it gets the same tensors.

    In evaluation all clips are sampled at segment centres, resized and centre-cropped by the processor. In training
    (`augmentations` given) supports are sampled at random within the segments, queries at the centres (method: "The
    task"), and both are augmented.

    Args:
        videos (`datasets.Dataset`): columns `video` and `label`.
        episodes ([`EpisodeSource`] or `datasets.Dataset`): which rows make an episode.
        processor ([`DmgalVideoProcessor`]): number of frames, and the size of what is not augmented.
        augmentations (pair of [`ClipAugmentation`], *optional*): for the supports and for the queries.
        seed (`int`): of all random draws.
        replace_broken (`bool`): a video that cannot be read is replaced by another clip of its class, drawn from the
            clip's own random stream, and named in the item's `broken`. Otherwise it is an error.
        raw (`bool`): leaves the augmentation to the device that trains ([`pack_episodes`]): items hold the clips as
            they were read, and what was drawn for them.
        memory ([`FrameMemory`], *optional*): where the frames of `videos` are kept; nothing else changes by it.

    Raises:
        `ValueError`: the frames are kept at another size than they are augmented at.

    Example:

    ```python
    >>> from datasets import ClassLabel, Dataset, Features, Video
    >>> from dmgal_hf import DmgalVideoProcessor
    >>> from dmgal_hf.data import EpisodeVideos, sample_episodes

    >>> features = Features({"video": Video(decode=False), "label": ClassLabel(names=["push", "lift"])})
    >>> rows = {"video": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"], "label": [0, 0, 1, 1]}
    >>> videos = Dataset.from_dict(rows, features=features)
    >>> episodes = sample_episodes(videos["label"], way=2, shot=1, query=1, num_episodes=3)
    >>> processor = DmgalVideoProcessor(num_frames=4, size=40, crop_size=32)
    >>> EpisodeVideos(videos, episodes, processor)[0]["support_pixel_values"].shape
    torch.Size([2, 4, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        videos: Dataset,
        episodes: EpisodeSource | Dataset,
        processor: DmgalVideoProcessor,
        augmentations: tuple[ClipAugmentation, ClipAugmentation] | None = None,
        seed: int = 0,
        replace_broken: bool = False,
        raw: bool = False,
        memory: FrameMemory | None = None,
    ):
        for augmentation in augmentations or () if memory is not None else ():
            if (augmentation.resize, augmentation.resample) != (memory.short_side, memory.resample):
                raise ValueError(
                    f"`augmentations` resize to {augmentation.resize} with resample {augmentation.resample}, `memory` "
                    f"to {memory.short_side} with {memory.resample}: make it with a processor like them"
                )
        self.classes = np.asarray(videos["label"])
        self.videos = videos.select_columns("video")
        self.episodes = episodes
        self.processor = processor
        self.augmentations = augmentations
        self.seed = seed
        self.replace_broken = replace_broken
        self.raw = raw
        self.memory = memory

    def __len__(self) -> int:
        return len(self.episodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Returns:
            `dict` with `support_pixel_values` (S, T, 3, H, W) and `query_pixel_values` (Q, T, 3, H, W), uint8;
            `support_labels` (S,) and `labels` (Q,), int64 classes of the episode; `support_classes` and
            `query_classes`, int64 classes of the dataset; `episode`, the index; `broken`, paths of unreadable videos.
            With `raw`, in place of the pixel values, `support_clips` and `query_clips`, lists of (T, 3, H, W) uint8 of
            any sizes, and `support_numbers` (S, 35) and `query_numbers` (Q, 35) of [`as_numbers`].

        Raises:
            VideoDecodeError: a video cannot be read and is not replaced.
        """
        episode = self.episodes[index]
        used = {*episode["support"], *episode["query"]}
        broken: list[str] = []
        item = {
            "support_labels": torch.tensor(episode["support_labels"]),
            "labels": torch.tensor(episode["query_labels"]),
            "support_classes": torch.from_numpy(self.classes[episode["support"]]),
            "query_classes": torch.from_numpy(self.classes[episode["query"]]),
            "episode": index,
            "broken": broken,
        }
        for part in ("support", "query"):
            clips = [self._clip(row, part, f"{index}/{part}/{k}", used, broken) for k, row in enumerate(episode[part])]
            if self.raw:
                frames, numbers = zip(*clips)
                item |= {f"{part}_clips": list(frames), f"{part}_numbers": torch.stack(numbers)}
            else:
                item[f"{part}_pixel_values"] = torch.stack(clips)
        return item

    def _clip(self, row: int, part: str, name: str, used: set[int], broken: list[str]) -> Any:
        generator = torch.Generator().manual_seed(seed_from(self.seed, name))
        sampling = generator if part == "support" and self.augmentations else None
        frames = None
        while frames is None:
            try:
                frames = self._read(row, sampling)
            except VideoDecodeError as error:
                if not self.replace_broken:
                    raise
                broken.append(error.source)
                row = self._other_clip(row, used, generator, error)
        if self.augmentations is None:
            return self.processor.resize_and_crop(frames)
        augmentation = self.augmentations[part == "query"]
        if not self.raw:
            return augmentation(frames, generator)
        if min(frames.shape[-2:]) > 2 * augmentation.resize:  # to resize here costs less than to send all of it
            frames = resize_short_side(frames, augmentation.resize, augmentation.resample)
        height, width = frames.shape[-2:]
        return frames, as_numbers(augmentation.draw(height, width, generator), height, width, augmentation)

    def _read(self, row: int, sampling: torch.Generator | None) -> torch.Tensor:
        video, num_frames = self.videos[row]["video"], self.processor.num_frames
        if self.memory is None:
            return read_frames(video, num_frames, sampling)
        return self.memory.read(row, video, num_frames, sampling)

    def _other_clip(self, row: int, used: set[int], generator: torch.Generator, error: VideoDecodeError) -> int:
        candidates = [
            other for other in np.flatnonzero(self.classes == self.classes[row]).tolist() if other not in used
        ]
        if not candidates:
            raise VideoDecodeError(error.source, "cannot be read, and its class has no other clip to take instead")
        choice = candidates[int(torch.randint(len(candidates), (), generator=generator))]
        used.add(choice)
        return choice


def collate_episodes(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks items of [`EpisodeVideos`] of equal size: (B, ...) tensors, `broken` as one list, `way` as a number."""
    batch = {
        name: torch.stack([item[name] for item in items]) for name in items[0] if name not in ("episode", "broken")
    }
    batch["episode"] = torch.tensor([item["episode"] for item in items])
    batch["way"] = int(batch["support_labels"].max()) + 1  # here, where no device has to be waited for
    batch["broken"] = [path for item in items for path in item["broken"]]
    return batch


class EpisodeCollator:
    """
    The `data_collator` of a transformers.Trainer: items of [`EpisodeVideos`] of equal size -> what the model is called
    with, normalised. It picks from an item what the model needs: `TrainingArguments(remove_unused_columns=False)`.

    Args:
        processor ([`DmgalVideoProcessor`]): of the model.

    Example:

    ```python
    >>> from datasets import ClassLabel, Dataset, Features, Video
    >>> from dmgal_hf import DmgalVideoProcessor
    >>> from dmgal_hf.data import EpisodeCollator, EpisodeVideos, sample_episodes

    >>> features = Features({"video": Video(decode=False), "label": ClassLabel(names=["push", "lift"])})
    >>> rows = {"video": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"], "label": [0, 0, 1, 1]}
    >>> videos = Dataset.from_dict(rows, features=features)
    >>> processor = DmgalVideoProcessor(num_frames=4, size=40, crop_size=32)
    >>> episodes = EpisodeVideos(videos, sample_episodes(videos["label"], 2, 1, 1, num_episodes=3), processor)
    >>> EpisodeCollator(processor)([episodes[0], episodes[1]])["support_pixel_values"].shape
    torch.Size([2, 2, 4, 3, 32, 32])
    ```
    """

    def __init__(self, processor: DmgalVideoProcessor):
        self.processor = processor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = ("support_pixel_values", "support_labels", "query_pixel_values", "labels")
        if missing := [name for name in names if name not in items[0]]:
            raise ValueError(
                f"the episodes come without {', '.join(missing)}: set remove_unused_columns=False in "
                "TrainingArguments, the collator itself picks what the model needs."
            )
        batch = {name: torch.stack([item[name] for item in items]) for name in names}
        return {
            name: self.processor.normalize(tensor) if name.endswith("pixel_values") else tensor
            for name, tensor in batch.items()
        }


def seed_from(seed: int, name: str) -> int:
    """A seed for `torch.Generator`, from a seed and the name of what is drawn."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big") >> 1
