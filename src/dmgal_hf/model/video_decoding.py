"""Read chosen frames of a clip as RGB, exactly, from any container FFmpeg opens or from extracted frames.

The frames of a clip are those that decoding the whole of it yields, in the order they are shown; what a header claims
about their number is never used. Where the packets of a stream tell that order beyond doubt, only groups of pictures
that hold a wanted frame are decoded (`decoding_plan`); everywhere else the clip is decoded from its first packet to
its last.

What a picture looks like: rotated and mirrored as its display matrix says (to the nearest quarter turn), stored pixels
kept as they are (no stretching of non-square pixels, no deinterlacing, no tone mapping), alpha laid over black.

Damage is refused where FFmpeg notices it for a wanted frame, or for one that it refers to: packets and frames marked
as damaged, checksums, errors that a decoder logs, packets between which the container makes no sense, and files that
end early or hold less than half of what they declare. What nothing notices is read: changed bytes of raw or nearly raw
pictures (raw, HuffYUV, QuickTime's animation, uncoded blocks), bits that make another valid picture of the same size,
time stamps and tables that put sound pictures in another order, and a few packets that are gone.

Only wanted frames are converted, at their stored size; the processor resizes them after. Resizing in the conversion,
by FFmpeg's swscale, was slower than torch at every size tried, 340x256 to 1920x1080, and off by 1 to 3 grey levels in
the mean, up to 48.
"""

import io
import os
import zipfile
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO

import torch

from .extracted_frames import (
    ArchivedFrames,
    CachedFrames,
    FrameFiles,
    VideoInfo,
    ZippedFrames,
    frame_names,
    split_cache_path,
)
from .reading_limits import VideoDecodeError, one_error
from .remote_files import fetch, is_elsewhere, on_disk
from .still_pictures import video_behind_picture
from .video_stream import VideoStream
from .whole_files import check_whole
from .zip_archive import LOCAL_HEADER, open_zip, split_zip_path

_WEBM = b"\x42\x82\x84webm"  # in the header of such a file
_DRAW_BITS = 24  # a float32 draw in [0, 1) is a multiple of 2**-24


def segment_indices(clip_length: int, num_frames: int, generator: torch.Generator | None = None) -> list[int]:
    """One frame of each of `num_frames` equal segments (the sparse sampling of TSN, arXiv 1608.00859, section 3.1).

    Segment i covers [i * L / T, (i + 1) * L / T) for a clip of L frames. Without `generator` its centre frame
    floor((i + 0.5) * L / T) is taken, with it one drawn uniformly: one `torch.rand(T)` a clip, whatever its length.
    A clip shorter than T repeats frames.

    Returns: T indices in [0, L), non-decreasing. Raises ValueError for L < 1 or T < 1.
    """
    if clip_length < 1:
        raise ValueError(f"clip_length is {clip_length}: a clip to sample from has at least one frame.")
    return _in_segments(clip_length, _draw_offsets(num_frames, generator))


def read_frames(video: Any, num_frames: int = 8, generator: torch.Generator | None = None) -> torch.Tensor:
    """Read the frames of `video` that `segment_indices` picks.

    video: a path, an http(s) URL, bytes, a binary file object (read from its start), the {"path", "bytes"} of
    `datasets.Video(decode=False)`, a folder or .zip of JPEG or PNG frames in natural order of their names,
    "FILE.zip#/FOLDER", such a folder (or a video file) in a zip archive of many clips, or "FILE.arrow#ROW", a clip of
    a frame cache (`dmgal_hf.data.preparation`). Or a path of fsspec, as the rows of streamed datasets have:
    "hf://...", "s3://...", "zip://a.mp4::FILE.zip". A file of a single picture is no video; of a motion photo, the
    video is read.

    Returns: (T, 3, H, W) uint8 RGB, a view of channels-last memory. Frames of another size than the first of them
    (streams may change size) are scaled to it.
    Raises VideoDecodeError if the video is missing, empty, truncated, no video, or damaged where these frames lie.
    """
    offsets = _draw_offsets(num_frames, generator)
    with one_error(name_of(video)):
        return _open(video).read(lambda clip_length: _in_segments(clip_length, offsets))


def read_frames_at(video: Any, indices: list[int]) -> torch.Tensor:
    """`read_frames` for given frames: `indices` in [0, number of frames), in any order, repeats allowed.

    Returns: (len(indices), 3, H, W) uint8. Raises VideoDecodeError as `read_frames`, IndexError for an index outside
    the clip, ValueError for an empty list.
    """
    indices = [int(index) for index in indices]
    if not indices:
        raise ValueError("indices is empty: name at least one frame to read.")
    with one_error(name_of(video)):
        return _open(video).read(lambda clip_length: indices)


def probe_video(video: Any) -> VideoInfo:
    """
    Count and measure `video` (see `read_frames`), decoding its first frame only where packets can be trusted. Raises
    VideoDecodeError as `read_frames`, for damage in any frame that is decoded.
    """
    with one_error(name_of(video)):
        return _open(video).probe()


def name_of(video: Any) -> str:
    """What messages call a video: its path or URL, or "<bytes>"."""
    if isinstance(video, dict):
        video = video.get("path")
    name = getattr(video, "name", None) if hasattr(video, "read") else video
    return (os.fsdecode(name) or "''") if isinstance(name, str | os.PathLike) else "<bytes>"


def _draw_offsets(num_frames: int, generator: torch.Generator | None) -> list[int]:
    """Where in its segment each frame lies, in units of 2**-24 segments: integers, so that no machine rounds."""
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}: ask for at least one frame a clip.")
    if generator is None:
        return [1 << (_DRAW_BITS - 1)] * num_frames
    draws = torch.rand(num_frames, generator=generator, dtype=torch.float32, device=generator.device)
    return [int(draw * (1 << _DRAW_BITS)) for draw in draws.tolist()]


def _in_segments(clip_length: int, offsets: list[int]) -> list[int]:
    whole = len(offsets) << _DRAW_BITS
    return [((i << _DRAW_BITS) + offset) * clip_length // whole for i, offset in enumerate(offsets)]


def _open(video: Any) -> VideoStream | FrameFiles:
    source, media = _resolve(video)
    if isinstance(media, str) and (cached := split_cache_path(media)):
        return CachedFrames(source, *cached)
    if isinstance(media, str) and os.path.isdir(media):
        return FrameFiles(source, media, frame_names(source, os.listdir(media)))
    try:
        if isinstance(media, str) and (place := split_zip_path(media)):
            archive, inner = open_zip(place[0]), place[1]
            if inner in archive.folders:
                return ArchivedFrames(source, archive, inner)
            (media,) = archive.read(source, archive.find(inner))
        with _as_file(media) as file:
            head = file.read(64)
            if head.startswith(LOCAL_HEADER):
                return ZippedFrames(source, media)
            check_whole(source, file)
            behind = video_behind_picture(source, file)
        if behind is not None:
            return _open({"path": source, "bytes": behind})
    except (OSError, zipfile.BadZipFile) as error:
        raise VideoDecodeError(source, f"cannot be opened ({error})", "Check the path and its permissions.") from error
    return VideoStream(source, media, is_webm=_WEBM in head)


def _resolve(video: Any) -> tuple[str, str | bytes | BinaryIO]:
    """Name of a video for messages, and its path, its bytes or its file."""
    source = name_of(video)
    if isinstance(video, dict):
        path, video = video.get("path"), video.get("bytes")
        if video is None and path is None:
            raise VideoDecodeError("<bytes>", "both 'path' and 'bytes' are None", "Give one of them.")
        if video is None:
            return _resolve(path)
    if isinstance(video, str | os.PathLike):
        path = os.fspath(video)
        if not path or "\0" in path:
            raise VideoDecodeError(repr(path), "no file has such a name", "Give the path of a video.")
        # an absolute path cannot be taken for one of FFmpeg's protocols ("concat:...")
        return path, fetch(path) if is_elsewhere(path) else os.path.abspath(path)
    if isinstance(video, bytes | bytearray | memoryview):
        return source, bytes(video)
    if isinstance(video, io.BufferedReader | io.FileIO | io.BytesIO) and video.seekable():
        return source, video
    if hasattr(video, "read") and not isinstance(video, io.TextIOBase):
        if video.seekable():
            video.seek(0)
        return source, on_disk(source, iter(lambda: video.read(2**20), b""))
    raise VideoDecodeError(
        source, f"a video cannot be a {type(video).__name__}", "Give a path, a URL, bytes or a binary file object."
    )


def _as_file(media: str | bytes | BinaryIO) -> AbstractContextManager[BinaryIO]:
    """`media` at its beginning; closed only if it was opened here."""
    if isinstance(media, str):
        return open(media, "rb")
    if isinstance(media, bytes):
        return io.BytesIO(media)
    media.seek(0)
    return nullcontext(media)
