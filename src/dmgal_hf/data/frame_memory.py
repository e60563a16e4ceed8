"""
Decoded frames kept for a run, so that small sets of clips are decoded once and not once an episode.

A clip is one file, mapped by all workers and processes of a machine: the system keeps what was written and read in
memory as long as there is room, and nothing is lost but time where there is not. The frames are those of
[`read_frames`], with and without.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from datasets import Dataset

from ..model.extracted_frames import VideoInfo
from ..model.video_decoding import VideoDecodeError, probe_video, read_frames, read_frames_at, segment_indices
from ..model.video_processing_dmgal import DmgalVideoProcessor, resize_short_side, short_side_size
from .written_aside import written_aside

logger = logging.getLogger(__name__)

_PROBED = 16  # clips that are measured to see whether a set fits
_DECODED_AT_ONCE = 1 << 28  # bytes; most clips are below


class FrameMemory:
    """
    The kept frames of one dataset. A clip is kept whole, its short side resized to the processor's where it is larger,
    if it then takes at most `bytes_a_clip`; other clips are read as ever.

    Args:
        folder (`Path`): where the files are, one a clip.
        processor ([`DmgalVideoProcessor`]): size and resampling of the frames.
        bytes_a_clip (`int`): the most that a clip may take.
    """

    def __init__(self, folder: Path, processor: DmgalVideoProcessor, bytes_a_clip: int):
        self.folder, self.bytes_a_clip = folder, bytes_a_clip
        self.short_side = processor.size.get("shortest_edge") if processor.do_resize else None
        self.resample = processor.resample
        self.not_kept: set[int] = set()

    def read(self, row: int, video: Any, num_frames: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """
        What [`read_frames`] reads, after its short side was resized where it was larger: to resize the result to that
        side again changes nothing. (Of a stream that changes its size, all frames are scaled to the first.)

        Args:
            row (`int`): row of the clip in the dataset.
            video, num_frames, generator: as in [`read_frames`], which also tells what is raised.

        Returns:
            `torch.ByteTensor` of shape `(num_frames, 3, H, W)`.
        """
        path = self.folder / f"{row}.npy"
        if row not in self.not_kept and not path.exists() and not self._keep(path, video):
            self.not_kept.add(row)
        if row in self.not_kept:
            return read_frames(video, num_frames, generator)
        frames = np.load(path, mmap_mode="r")
        frames = np.asarray(frames)[segment_indices(len(frames), num_frames, generator)]
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def fits(self, info: VideoInfo) -> bool:
        """Whether a clip is small enough to be kept."""
        height, width = self._kept_size(info.height, info.width)
        return 3 * info.num_frames * height * width <= self.bytes_a_clip

    def _kept_size(self, height: int, width: int) -> tuple[int, int]:
        larger = self.short_side is not None and min(height, width) > self.short_side
        return short_side_size(height, width, self.short_side) if larger else (height, width)

    def _keep(self, path: Path, video: Any) -> bool:
        """Decodes a clip into its file; another process may do the same meanwhile."""
        try:
            info = probe_video(video)
            if not self.fits(info):
                return False
            frames = self._decode(video, info)
        except (VideoDecodeError, IndexError):  # not whole: the frames that are asked for may be readable all the same
            return False
        try:
            with written_aside(path) as aside, open(aside, "wb") as file:
                np.save(file, frames)
        except OSError as error:
            logger.warning("Frames are decoded anew from now on: %s cannot be written (%s).", path, error)
            self.bytes_a_clip = 0
            return False
        return True

    def _decode(self, video: Any, info: VideoInfo) -> np.ndarray:
        """All frames of a clip, (N, H, W, 3) uint8."""
        parts = []
        for frames in read_in_parts(video, info, range(info.num_frames)):
            if min(frames.shape[-2:]) > (self.short_side or math.inf):
                frames = resize_short_side(frames, self.short_side, self.resample)
            parts.append(frames.permute(0, 2, 3, 1))
        return torch.cat(parts).numpy()


def read_in_parts(video: Any, info: VideoInfo, numbers: Sequence[int]) -> Iterator[torch.Tensor]:
    """The frames of these numbers, (n, 3, H, W) uint8, as many at a time as take a quarter of a GB."""
    at_once = max(1, _DECODED_AT_ONCE // (3 * info.height * info.width))
    for start in range(0, len(numbers), at_once):
        yield read_frames_at(video, list(numbers[start : start + at_once]))


def keep_frames(
    datasets: Mapping[str, Dataset], processor: DmgalVideoProcessor, part: float, folder: Path
) -> dict[str, FrameMemory]:
    """
    A [`FrameMemory`] for every dataset where they fit together, else none.

    Every clip may take the same: the stated part of the memory by the number of clips. A few clips, spread over the
    datasets, are measured: most have to stay below that.

    Args:
        datasets (mapping of `str` to `datasets.Dataset`): by name, each with a column `video`.
        part (`float`): of the memory of the machine, or of the container; 0 keeps nothing.
        folder (`Path`): where a folder for each goes.

    Returns:
        `dict` of the names of `datasets` to their memories, empty where they do not fit.
    """
    places = [(name, row) for name, dataset in datasets.items() for row in range(len(dataset))]
    bytes_a_clip = int(part * _memory_of_the_machine() / max(len(places), 1))
    memories = {name: FrameMemory(folder / name, processor, bytes_a_clip) for name in datasets}
    fitting = []
    for name, row in places[:: math.ceil(len(places) / _PROBED)] if part > 0 else ():
        try:
            fitting.append(memories[name].fits(probe_video(datasets[name][row]["video"])))
        except VideoDecodeError:
            continue  # whoever needs it will say so
    if 2 * sum(fitting) <= len(fitting):
        return {}
    try:
        for memory in memories.values():
            memory.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("Decoded frames are not kept: %s cannot be made (%s).", folder, error)
        return {}
    return memories


def _memory_of_the_machine() -> int:
    """Bytes; those of the container where one is limited."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return min(total, int(text)) if text.isdigit() else total
