"""Clips kept as one picture a frame: files in a folder, in a zip archive or in a frame cache."""

import functools
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .reading_limits import LIMITS, FrameIndexError, VideoDecodeError
from .zip_archive import ZipArchive, natural_key

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
_WITHOUT_DIGITS = str.maketrans("", "", "0123456789")
_OF_COLOUR = re.compile(r"(?<![a-z])(img|image|frame|rgb|colou?r)s?(?![a-z])")


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
    """
    A clip kept as one image file a frame, in a folder. `names` are those of its frames, in order. Pixels are taken as
    they are stored: an orientation in EXIF is not followed, which programs that extract frames do not write.
    """

    formats = ("JPEG", "PNG")  # whatever a file is called, it is opened as one of these

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
        source = f"{self.source}/{self.names[index]}"
        try:
            with Image.open(file, formats=self.formats) as image:
                LIMITS.check(source, "pixels", image.width * image.height)
                if image.mode.startswith(("I", "F")):
                    raise OSError(f"{image.mode} pixels, not 8 bits a channel")
                return picture_to_rgb(image)
        except VideoDecodeError:
            raise
        except UnidentifiedImageError as error:  # whose message has the address of an object
            raise VideoDecodeError(source, f"no {' or '.join(self.formats)} picture") from error
        except Exception as error:  # a damaged picture raises nearly every exception there is
            raise VideoDecodeError(source, f"not a readable frame ({error})") from error


class ZippedFrames(FrameFiles):
    """A clip kept as one image file a frame, in a zip archive of its own: `media` is its path, bytes or file."""

    def __init__(self, source: str, media: str | bytes | BinaryIO):
        archive = zipfile.ZipFile(io.BytesIO(media) if isinstance(media, bytes) else media)
        super().__init__(source, archive, frame_names(source, archive.namelist()))

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        with self.media as archive:
            for index in indices:
                member = archive.getinfo(self.names[index])
                LIMITS.check(f"{self.source}/{member.filename}", "unpacked_bytes", member.file_size)
                try:
                    content = archive.read(member)  # at most so many bytes as it says
                except Exception as error:  # checksum, password, method, and all that unpackers raise
                    raise VideoDecodeError(self.source, f"cannot be unpacked ({error})") from error
                yield index, io.BytesIO(content)


class ArchivedFrames(FrameFiles):
    """A clip kept as one image file a frame, in a folder of a zip archive of many clips."""

    def __init__(self, source: str, archive: ZipArchive, inner: str):
        folder = archive.folders[inner]
        names = folder.names  # in natural order already
        super().__init__(source, archive, one_series(source, list(filter(is_frame, names))))
        place = {name: number for number, name in enumerate(names)}
        self.places = folder.places[[place[name] for name in self.names]]

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        contents = self.media.read(self.source, self.places[indices])
        for index in indices:
            try:
                content = next(contents)
            except (OSError, zipfile.BadZipFile) as error:
                raise VideoDecodeError(self.source, f"cannot be unpacked ({error})") from error
            yield index, io.BytesIO(content)


class CachedFrames(FrameFiles):
    """
    A clip kept as one image file a frame, in a row of an Arrow file with the columns `path` and `frames`, in a folder
    that `dmgal_hf.data.preparation` has written. Only the pages of the wanted frames are read.
    """

    formats = ("JPEG", "PPM")

    def __init__(self, source: str, file: str, row: int):
        remedy = "Run scripts/prepare_data.py again, it makes anew what is missing."
        shards = os.path.dirname(file)
        if os.path.basename(shards) != "shards" or not os.path.isfile(os.path.join(shards, "..", "settings.json")):
            raise VideoDecodeError(source, "not in the shards of a prepared folder", "Give a video, or prepare it.")
        try:
            state = os.stat(file)
            table = _mapped_once(file, state.st_size, state.st_mtime_ns)
            if row >= len(table):
                raise OSError(f"it has {len(table)} rows")
            self.frames = table["frames"][row].values.field("bytes")
        except Exception as error:
            raise VideoDecodeError(source, f"not a cached clip ({error})", remedy) from error
        super().__init__(f"{source} ({table['path'][row]})", file, [f"frame {i}" for i in range(len(self.frames))])

    def _files(self, indices: list[int]) -> Iterator[tuple[int, io.BytesIO]]:
        for index in indices:
            yield index, io.BytesIO(self.frames[index].as_buffer())


def split_cache_path(path: str) -> tuple[str, int] | None:
    """`FILE.arrow#ROW` as (`FILE.arrow`, row); `None` for any other path, and for a file that is called so."""
    match = re.fullmatch(r"(.*\.arrow)#(\d+)", path, re.DOTALL)
    return (match[1], int(match[2])) if match and not os.path.lexists(path) else None


def map_arrow_file(path: str) -> Any:
    """
    A `pyarrow.Table` on the memory-mapped file, all of whose offsets are checked once: those of a damaged file would
    end the process. Raises one of Arrow's own errors, an OSError, or a ValueError where pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError("it needs pyarrow: pip install datasets") from error
    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
        table = reader.read_all()
    table.validate(full=True)
    return table


@functools.lru_cache(maxsize=1024)
def _mapped_once(path: str, size: int, mtime_ns: int) -> Any:
    return map_arrow_file(path)


def picture_to_rgb(picture: Image.Image) -> np.ndarray:
    """A PIL image -> (H, W, 3) uint8; what is transparent lies over black."""
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba))[..., :3]
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def is_frame(name: str) -> bool:
    """Whether a file of this name is a picture. macOS puts a hidden "._name" beside each file."""
    return name.lower().endswith(FRAME_SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def frame_names(source: str, names: list[str]) -> list[str]:
    """Those of `names` that are the pictures of a clip, in natural order. Raises as [`one_series`]."""
    return one_series(source, sorted(filter(is_frame, names), key=natural_key))


def one_series(source: str, frames: list[str]) -> list[str]:
    """
    The frames of one clip. Names that differ in more than numbers are several series (`img_00001.jpg`,
    `flow_x_00001.jpg`): the one whose names tell that it is in colour is taken.

    Raises VideoDecodeError where none or several do.
    """
    if len({name.translate(_WITHOUT_DIGITS) for name in frames}) < 2 and "/" not in "".join(frames[:1]):
        return frames  # nearly every clip, in a tenth of the time
    stems = [name.lower().rpartition(".")[0] for name in frames]
    if len(set(stems)) < len(stems):  # 1.jpg beside 1.png
        stems = [name.lower() for name in frames]
    kinds = [_series(stem) for stem in stems]
    series = sorted(set(kinds))
    if len(series) < 2:
        return frames
    of_colour = [kind for kind in series if _OF_COLOUR.search(kind.rpartition("/")[2])]
    of_colour = of_colour or [kind for kind in series if _OF_COLOUR.search(kind)]
    if len(of_colour) != 1:
        shown = ", ".join(map(repr, series[:5])) + ", ..." * (len(series) > 5)
        problem = f"holds {len(series)} series of pictures, {shown} (# is a number), and no name tells the clip"
        raise VideoDecodeError(source, problem, "Keep each series in a folder of its own.")
    return [name for name, kind in zip(frames, kinds) if kind == of_colour[0]]


def _series(stem: str) -> str:
    """What the names of one series have in common; those without any number are one."""
    folder, slash, name = stem.rpartition("/")
    kind = re.sub(r"\d+", "#", name)
    return folder + slash + (kind if "#" in kind else "")


def check_range(source: str, indices: list[int], clip_length: int) -> None:
    """Raises FrameIndexError unless all `indices` are in [0, clip_length)."""
    outside = [index for index in indices if not 0 <= index < clip_length]
    if outside:
        raise FrameIndexError(f"{source}: frame {outside[0]} asked for, but its frames are 0 to {clip_length - 1}.")
