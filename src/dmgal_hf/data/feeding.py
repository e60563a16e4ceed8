"""
The way of training episodes to a GPU.

Workers decode and draw; the frames travel as they are, in one buffer a batch, pinned, one copy; on the device they
are augmented ([`augment_clips`]). Where there is no GPU, workers augment ([`EpisodeVideos`] without `raw`) and none of
this is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .batched_transforms import augment_clips
from .episode_videos import collate_episodes
from .transforms import ClipAugmentation


@dataclass
class PackedEpisodes:
    """Items of [`EpisodeVideos`] with `raw=True` in one buffer."""

    buffer: torch.Tensor  # (bytes,) uint8: all tensors one after the other, frames last
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]  # their names, dtypes and shapes
    episode: torch.Tensor  # (B,) int64, index of every episode; it stays on the host, who asks for it
    broken: list[str]  # paths of unreadable videos
    way: int  # classes of an episode

    def pin_memory(self) -> "PackedEpisodes":
        return replace(self, buffer=self.buffer.pin_memory())

    def augment(
        self, augmentations: tuple[ClipAugmentation, ClipAugmentation], device: torch.device
    ) -> dict[str, Any]:
        """What [`collate_episodes`] makes of the augmented items, on `device`."""
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.layout]
        pieces = self.buffer.to(device, non_blocking=True).split(sizes)
        batch = {"episode": self.episode, "broken": self.broken, "way": self.way}
        clips = {"support_clips": [], "query_clips": []}
        for (name, dtype, shape), piece in zip(self.layout, pieces, strict=True):
            if name in clips:
                clips[name].append(piece.view(shape))
            else:
                batch[name] = piece.view(dtype).view(shape)
        for part, augmentation in zip(("support", "query"), augmentations, strict=True):
            numbers, stacked = batch.pop(f"{part}_numbers"), _stack(clips[f"{part}_clips"])
            augmented = augment_clips(stacked, numbers.flatten(0, 1), augmentation)
            batch[f"{part}_pixel_values"] = augmented.unflatten(0, numbers.shape[:2])
        return batch


def pack_episodes(items: Sequence[dict[str, Any]]) -> PackedEpisodes:
    """Items of [`EpisodeVideos`] with `raw=True`, of equal size -> one buffer."""
    names = ("support_clips", "query_clips")
    batch = collate_episodes([{name: item[name] for name in item if name not in names} for item in items])
    episode, broken, way = (batch.pop(name) for name in ("episode", "broken", "way"))
    # Numbers of 8 bytes first: a view of them has to begin at a multiple of 8.
    layout = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()]
    pieces = [tensor.flatten().view(torch.uint8) for tensor in batch.values()]
    for name in names:
        for clip in (clip for item in items for clip in item[name]):
            frames = clip.permute(0, 2, 3, 1)  # as decoders leave them, so that this is no copy
            layout.append((name, torch.uint8, tuple(frames.shape)))
            pieces.append(frames.flatten())
    return PackedEpisodes(torch.cat(pieces), layout, episode, broken, way)


def _stack(clips: list[torch.Tensor]) -> torch.Tensor:
    """Clips (T, H, W, 3) of any sizes -> (V, T, 3, H', W'), filled up with black at the bottom and at the right."""
    height, width = (max(clip.shape[side] for clip in clips) for side in (1, 2))
    if all(clip.shape[1:3] == (height, width) for clip in clips):
        return torch.stack(clips).permute(0, 1, 4, 2, 3)
    stacked = clips[0].new_zeros(len(clips), len(clips[0]), height, width, 3)
    for clip, target in zip(clips, stacked, strict=True):
        target[:, : clip.shape[1], : clip.shape[2]] = clip
    return stacked.permute(0, 1, 4, 2, 3)


def augment_ahead(
    batches: Iterable[PackedEpisodes],
    augmentations: tuple[ClipAugmentation, ClipAugmentation],
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """
    Batches on `device`, augmented. On a GPU one ahead, on a stream of its own: a batch is copied and augmented while
    the step of the one before it computes.
    """
    if device.type != "cuda":
        yield from (packed.augment(augmentations, device) for packed in batches)
        return
    stream, waiting = torch.cuda.Stream(device), None
    for packed in batches:
        with torch.cuda.stream(stream):
            batch, ready = packed.augment(augmentations, device), stream.record_event()
        if waiting is not None:
            yield _handed_over(*waiting)
        waiting = batch, ready
    if waiting is not None:
        yield _handed_over(*waiting)


def _handed_over(batch: dict[str, Any], ready: torch.cuda.Event) -> dict[str, Any]:
    """The batch for the current stream, which waits for it; its memory is not used anew before that stream is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(ready)
    for value in batch.values():
        if torch.is_tensor(value) and value.is_cuda:
            value.record_stream(stream)
    return batch
