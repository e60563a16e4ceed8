"""Clips kept as one picture a frame: files in a folder, in a zip archive or in a frame cache."""

import functools
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .reading_limits import FrameIndexError, VideoDecodeError
from .zip_archive import ZipArchive, natural_key

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class VideoInfo:
    """num_frames: frames that decoding yields; fps: mean frames a second, None if unknown; height, width: pixels of
    the first frame as `read_frames` gives it, after rotation; duration: seconds, None if unknown."""

    num_frames: int
    fps: float | None
    height: int
    width: int
    duration: float | None


class FrameFiles:
    """A clip kept as one image file a frame, in a folder. `names` are those of its frames, in order."""

    def __init__(self, source: str, media: Any, names: list[str]):
        if not names:
            raise VideoDecodeError(
                source, "holds no .jpg, .jpeg or .png frame", "Give the folder that holds the frames."
            )
        self.source, self.media, self.names = source, media, names

    def read(self, choose: Callable[[int], list[int]]) -> torch.Tensor:
        indices = choose(len(self.names))
        check_range(self.source, indices, len(self.names))
        frames = None
        for index, file in self._files(sorted(set(indices))):
            image = self._decode(index, file)
            if frames is None:
                frames, first = np.empty((len(indices), *image.shape), np.uint8), self.names[index]
            elif image.shape != frames.shape[1:]:
                problem = f"(H, W) is {image.shape[:2]}, but {frames.shape[1:3]} in {first}"
                raise VideoDecodeError(f"{self.source}/{self.names[index]}", problem, "Extract a clip at one size.")
            for slot, wanted in enumerate(indices):
                if wanted == index:
                    frames[slot] = image
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def probe(self) -> VideoInfo:
        ((index, file),) = self._files([0])
        height, width = self._decode(index, file).shape[:2]
        return VideoInfo(len(self.names), None, height, width, None)

    def _files(self, indices: list[int]) -> Iterator[tuple[int, str | io.BytesIO]]:
        for index in indices:
            yield index, os.path.join(self.media, self.names[index])

    def _decode(self, index: int, file: str | io.BytesIO) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise OSError(f"{image.mode} pixels, not 8 bits a channel")
                return picture_to_rgb(image)
        except (OSError, SyntaxError, UnidentifiedImageError) as error:
            raise VideoDecodeError(f"{self.source}/{self.names[index]}", f"not a readable frame ({error})") from error


class ZippedFrames(FrameFiles):
    """A clip kept as one image file a frame, in a zip archive of its own: `media` is its path or its bytes."""

    def __init__(self, source: str, media: str | bytes):
        self.open = functools.partial(zipfile.ZipFile, media if isinstance(media, str) else io.BytesIO(media))
        with self.open() as archive:
            super().__init__(source, media, frame_names(archive.namelist()))

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        with self.open() as archive:
            for index in indices:
                try:
                    yield index, io.BytesIO(archive.read(self.names[index]))
                except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # checksum, password, method
                    raise VideoDecodeError(self.source, f"cannot be unpacked ({error})") from error


class ArchivedFrames(FrameFiles):
    """A clip kept as one image file a frame, in a folder of a zip archive of many clips."""

    def __init__(self, source: str, archive: ZipArchive, inner: str):
        names = archive.folders[inner].names  # in natural order already
        frames = [place for place, name in enumerate(names) if is_frame(name)]
        super().__init__(source, archive, [names[place] for place in frames])
        self.places = archive.folders[inner].places[frames]

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        try:
            contents = self.media.read(self.places[indices])
        except (OSError, zipfile.BadZipFile) as error:
            raise VideoDecodeError(self.source, f"cannot be unpacked ({error})") from error
        yield from zip(indices, map(io.BytesIO, contents))


class CachedFrames(FrameFiles):
    """A clip kept as one image file a frame, in a row of an Arrow file with the columns `path` and `frames`. Only the
    pages of the wanted frames are read."""

    def __init__(self, source: str, file: str, row: int):
        remedy = "Run scripts/prepare_data.py again, it makes anew what is missing."
        try:
            table = _map_arrow_file(file)
            if row >= len(table):
                raise OSError(f"it has {len(table)} rows")
            self.frames = table["frames"][row].values.field("bytes")
        except (OSError, ValueError, KeyError) as error:  # Arrow's own errors are such, too
            raise VideoDecodeError(source, f"not a cached clip ({error})", remedy) from error
        super().__init__(f"{source} ({table['path'][row]})", file, [f"frame {i}" for i in range(len(self.frames))])

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        for index in indices:
            yield index, io.BytesIO(self.frames[index].as_buffer())


@functools.lru_cache(maxsize=1024)
def _map_arrow_file(path: str) -> Any:
    """A `pyarrow.Table` on the memory-mapped file."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install datasets") from error
    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
        return reader.read_all()


def picture_to_rgb(picture: Any) -> np.ndarray:
    """A PIL image -> (H, W, 3) uint8; what is transparent lies over black."""
    from PIL import Image

    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba))[..., :3]
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def is_frame(name: str) -> bool:
    """Whether a file of this name is a picture. macOS puts a hidden "._name" beside each file."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def frame_names(names: list[str]) -> list[str]:
    """Those of `names` that are pictures, in natural order."""
    return sorted(filter(is_frame, names), key=natural_key)


def check_range(source: str, indices: list[int], clip_length: int) -> None:
    """Raises FrameIndexError unless all `indices` are in [0, clip_length)."""
    outside = [index for index in indices if not 0 <= index < clip_length]
    if outside:
        raise FrameIndexError(f"{source}: frame {outside[0]} asked for, but its frames are 0 to {clip_length - 1}.")
