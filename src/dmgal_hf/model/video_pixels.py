"""From decoded frames to RGB as they are shown: colours, transparency, rotation, and one size a clip."""

import functools
import re
import struct
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

_WAITING_PIXELS = 2**22  # of the frames that are converted together: two of 1080p, fifty of 340x256


class WantedFrames:
    """
    Gathers the wanted frames of a clip as one (T, H, W, 3) array.

    Frames wait for each other, and are converted together: right after a packet is decoded, the processor's caches
    hold nothing of the conversion, and a frame takes up to three times as long.
    """

    def __init__(self, indices: list[int]):
        self.indices = indices
        self.missing = set(indices)
        self.waiting: list[tuple[int, av.VideoFrame]] = []
        self.array: np.ndarray | None = None
        self.reformatter = VideoReformatter()  # one for all frames: it keeps swscale set up

    def put(self, index: int, frame: av.VideoFrame) -> None:
        """Take `frame` if it is wanted."""
        if index not in self.missing:
            return
        self.missing.remove(index)
        self.waiting.append((index, frame))
        if len(self.waiting) * frame.width * frame.height > _WAITING_PIXELS:
            self._convert()

    def _convert(self) -> None:
        for index, frame in self.waiting:
            rgb = upright_rgb(frame, self.reformatter)
            if self.array is None:
                self.array = np.empty((len(self.indices), *rgb.shape), np.uint8)
            elif rgb.shape != self.array.shape[1:]:
                rgb = _scaled(rgb, *self.array.shape[1:3])
            for slot, wanted in enumerate(self.indices):
                if wanted == index:
                    self.array[slot] = rgb
        self.waiting.clear()

    def stack(self) -> torch.Tensor:
        self._convert()
        return torch.from_numpy(self.array).permute(0, 3, 1, 2)


def upright_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8, as it is shown."""
    transpose, mirror, upside_down = orientation_of(frame)
    rgb = _to_rgb(frame, reformatter)
    rgb = rgb.swapaxes(0, 1) if transpose else rgb
    return rgb[:: -1 if upside_down else 1, :: -1 if mirror else 1]


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8 in stored orientation; transparent parts come out black."""
    alpha = _has_alpha(frame.format.name)
    converted = reformatter.reformat(frame, format="rgba" if alpha else "rgb24", threads=1)
    plane = converted.planes[0]
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    if not alpha:
        return pixels[:, : plane.width * 3].reshape(plane.height, plane.width, 3)
    pixels = pixels[:, : plane.width * 4].reshape(plane.height, plane.width, 4).astype(np.uint16)
    return ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)


@functools.cache
def _has_alpha(format: str) -> bool:
    format = av.VideoFormat(format)
    return format.has_palette or any(component.is_alpha for component in format.components)


def orientation_of(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """The display matrix of a frame as (transpose, then mirror left to right, then top to bottom)."""
    side_data = _display_matrix(frame)
    if side_data is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(side_data)[:20])  # (x, y) is shown at (a x + c y, b x + d y)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _display_matrix(frame: av.VideoFrame) -> Any:
    """PyAV lists the side data of a frame only if it knows all types: those that it does not know are taken off."""
    try:
        return frame.side_data.get("DISPLAYMATRIX")
    except ValueError as error:
        unknown = re.match(r"(\d+) is not a valid Type", str(error))
        if unknown is None:
            raise
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    remove, sink = graph.add("sidedata", f"mode=delete:type={unknown[1]}"), graph.add("buffersink")
    source.link_to(remove)
    remove.link_to(sink)
    graph.configure()
    graph.push(frame)
    return _display_matrix(graph.pull())


def _scaled(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
    return frame.reformat(width=width, height=height, threads=1).to_ndarray()
