"""Read chosen frames of a clip as RGB, exactly, from any container FFmpeg opens or from extracted frames.

The frames of a clip are those that decoding the whole of it yields, in the order they are shown; what a header claims
about their number is never used. Where the packets of a stream tell that order beyond doubt (`_plan`), only groups of
pictures that hold a wanted frame are decoded; everywhere else the clip is decoded from its first packet to its last.

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
import re
import struct
import tempfile
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from math import isfinite
from typing import Any, BinaryIO

import av
import av.filter
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.video.reformatter import VideoReformatter

from .extracted_frames import (
    ArchivedFrames,
    CachedFrames,
    FrameFiles,
    VideoInfo,
    ZippedFrames,
    check_range,
    frame_names,
    split_cache_path,
)
from .reading_limits import LIMITS, VideoDecodeError, one_error
from .remote_files import fetch, is_elsewhere
from .still_pictures import video_behind_picture
from .video_files import check_whole, declared_seconds, ffmpeg_errors, open_video, taken
from .zip_archive import LOCAL_HEADER, open_zip, split_zip_path

DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
_KEPT_BYTES = 2**25  # packets of a clip of more are read again where they are decoded
_PLANNED = {"h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1", "mjpeg", "prores"}
_SKIPS_EXACTLY = {"h264", "hevc", "mpeg4", "vp8"}  # decoders that leave out unreferenced frames packet by packet
_NO_STAMP = -(2**63)
_PICTURE, _SHOWN, _KEY = 1, 2, 4  # what a packet is: holds a picture, yields a frame, can be begun at
_VOP, _B_VOP = b"\x00\x00\x01\xb6", 2
_MAX_NOT_CODED_VOP = 19  # bytes; FFmpeg takes no longer one for the placeholder of a packed B-frame
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
    """Count and measure `video` (see `read_frames`), decoding its first frame only where packets can be trusted."""
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


def _open(video: Any) -> "_Stream | FrameFiles":
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
            if file.read(4) == LOCAL_HEADER:
                return ZippedFrames(source, media)
            check_whole(source, file)
            behind = video_behind_picture(source, file)
        if behind is not None:
            return _open({"path": source, "bytes": behind})
    except (OSError, zipfile.BadZipFile) as error:
        raise VideoDecodeError(source, f"cannot be opened ({error})", "Check the path and its permissions.") from error
    return _Stream(source, media)


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
        if is_elsewhere(path):
            return path, _on_disk(path, fetch(path))
        # an absolute path cannot be taken for one of FFmpeg's protocols ("concat:...")
        return (path, _download(path)) if re.match("https?://", path) else (path, os.path.abspath(path))
    if isinstance(video, bytes | bytearray | memoryview):
        return source, bytes(video)
    if isinstance(video, io.BufferedReader | io.FileIO | io.BytesIO) and video.seekable():
        return source, video
    if hasattr(video, "read") and not isinstance(video, io.TextIOBase):
        if video.seekable():
            video.seek(0)
        return source, _on_disk(source, iter(lambda: video.read(2**20), b""))
    raise VideoDecodeError(
        source, f"a video cannot be a {type(video).__name__}", "Give a path, a URL, bytes or a binary file object."
    )


def _download(url: str) -> BinaryIO:
    from huggingface_hub import get_session

    try:
        with get_session().stream("GET", url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
            response.raise_for_status()
            return _on_disk(url, response.iter_bytes(2**20))
    except VideoDecodeError:
        raise
    except Exception as error:  # the client's exceptions have another root in each major version of the hub
        raise VideoDecodeError(url, f"download failed ({error})", "Check the address and the connection.") from error


def _on_disk(source: str, parts: Iterable[bytes]) -> BinaryIO:
    """A file without a name, which goes with the last reference to it."""
    file, size = tempfile.TemporaryFile(), 0  # noqa: SIM115
    for part in parts:
        size += file.write(part)
        LIMITS.check(source, "downloaded_bytes", size)
    return file


@contextmanager
def _as_file(media: str | bytes | BinaryIO) -> Iterator[BinaryIO]:
    """`media` at its beginning; closed only if it was opened here."""
    if isinstance(media, str | bytes):
        with open(media, "rb") if isinstance(media, str) else io.BytesIO(media) as file:
            yield file
    else:
        media.seek(0)
        yield media


class _Stream:
    """A clip in a container."""

    def __init__(self, source: str, media: str | bytes | BinaryIO):
        self.source, self.media = source, media

    def read(self, choose: Callable[[int], list[int]]) -> torch.Tensor:
        with ffmpeg_errors() as self.errors:
            with self._indexed() as (stream, index):
                plan = _plan(stream.codec_context, index)
                if plan is not None:
                    indices = choose(len(plan.shown))
                    check_range(self.source, indices, len(plan.shown))
                    frames = _Frames(indices)
                    again = self._packets(index.unpack) if index.kept is None else nullcontext((stream, index.kept))
                    with again as (stream, packets):
                        if self._decode_planned(stream.codec_context, packets, plan, frames):
                            return frames.stack()
            return self._read_in_order(choose, int(np.count_nonzero(index.facts & _SHOWN)))

    def _read_in_order(self, choose: Callable[[int], list[int]], guess: int) -> torch.Tensor:
        """Decode everything; a second time if the clip is not as long as it has packets."""
        frames, clip_length = _Frames(choose(max(guess, 1))), 0
        for frame, doubt in self._decode_all():
            self._put(frames, clip_length, frame, doubt)
            clip_length += 1
        indices = choose(clip_length)
        check_range(self.source, indices, clip_length)
        if indices != frames.indices:
            frames = _Frames(indices)
            for index, (frame, doubt) in enumerate(self._decode_all()):
                self._put(frames, index, frame, doubt)
        return frames.stack()

    def _put(self, frames: "_Frames", index: int, frame: av.VideoFrame, doubt: str | None) -> None:
        if doubt is not None and index in frames.missing:
            raise VideoDecodeError(self.source, f"damaged near {_seconds(frame)}: {doubt}")
        LIMITS.check(self.source, "pixels", frame.width * frame.height)
        frames.put(index, frame)

    def probe(self) -> VideoInfo:
        with (
            ffmpeg_errors() as self.errors,
            self._indexed() as (stream, index),
            closing(self._decode_all()) as decoded,
        ):
            first, _ = next(decoded)
            plan = None if _has_fields(stream.codec_context, first) else _plan(stream.codec_context, index)
            num_frames = len(plan.shown) if plan else 1 + sum(1 for _ in decoded)
            fps = float(stream.average_rate) if stream.average_rate else None
            duration = float(stream.duration * stream.time_base) if stream.duration else None
            if duration is None and stream.container.duration:
                duration = stream.container.duration / av.time_base
        transposed = _orientation(first)[0]
        height, width = (first.width, first.height) if transposed else (first.height, first.width)
        return VideoInfo(num_frames, fps, height, width, duration or (num_frames / fps if fps else None))

    def _decode_all(self) -> Iterator[tuple[av.VideoFrame, str | None]]:
        """
        Every frame, in the order the decoder gives them, and what FFmpeg said of a packet that it may come from: the
        packet itself, or one before it since the last key frame. Raises VideoDecodeError for a damaged stream.
        """
        empty, doubt, doubtful = True, None, set()
        with self._packets() as (stream, packets):
            for packet in chain(packets, [None]):
                decoded, said = decode_packet(stream.codec_context, packet, self.errors)
                if said is not None:
                    doubt = said
                    doubtful.add(packet and packet.pts)
                for frame in decoded:
                    if frame.is_corrupt:
                        raise VideoDecodeError(self.source, f"damaged: the frame at {_seconds(frame)} does not decode")
                    if frame.key_frame and said is None and frame.pts not in doubtful:
                        doubt = None
                    empty = False
                    yield frame, doubt
        if empty:
            raise VideoDecodeError(self.source, "none of its packets decodes to a frame")

    def _decode_planned(
        self, context: av.VideoCodecContext, packets: Iterable[av.Packet], plan: "_Plan", frames: "_Frames"
    ) -> bool:
        """Put the wanted frames, decoding only what they need. False if what comes out is not what was promised."""
        wanted = {int(plan.pts[plan.shown[index]]): index for index in frames.missing}
        needed = {int(plan.shown[index]) for index in frames.missing}
        skips, whole = context.name in _SKIPS_EXACTLY, True
        runs = iter(_runs(plan, frames.missing))
        run = next(runs)
        for position, packet in enumerate(packets):
            if position < run.begin:
                continue
            if plan.restamped:
                packet.pts, packet.dts = int(plan.pts[position]), None
            if skips and (position in needed) is not whole:
                whole = not whole
                context.skip_frame = "DEFAULT" if whole else "NONREF"
            last = position + 1 == run.end
            for part in (packet, None) if last else (packet,):
                decoded, said = decode_packet(context, part, self.errors)
                if said is not None or not _put_planned(context, decoded, run.first, wanted, frames):
                    return False
            if last:
                run = next(runs, None)
                if run is None:
                    break
                context.flush_buffers()
        return not frames.missing

    @contextmanager
    def _packets(self, unpack: bool = False) -> Iterator[tuple[av.VideoStream, Iterator[av.Packet]]]:
        """The opened track, and its packets in decoding order, once."""
        if not isinstance(self.media, str | bytes):
            self.media.seek(0)
        try:
            with open_video(self.source, self.media) as (container, stream):
                packets = self._demux(container, stream)
                yield stream, _unpacked(stream, packets) if unpack else packets
        except av.FFmpegError as error:
            raise VideoDecodeError(self.source, f"not a readable video ({error.strerror})") from error

    def _demux(self, container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
        self.errors.clear()  # of opening: headers may be odd and the packets sound
        name = container.format.name
        for packet in container.demux(stream):
            if packet.size:
                said = taken(self.errors, name) if self.errors else None
                if said is not None or packet.is_corrupt:
                    what = said or "a packet of the video stream is incomplete"
                    raise VideoDecodeError(self.source, f"truncated or damaged: {what}")
                yield packet
        self.errors.clear()  # of bytes behind the last packet

    def _check_length(self, stream: av.VideoStream, index: "_Index") -> None:
        """Raises VideoDecodeError where far less is there than the container declares: it was lost in between."""
        number, container = len(index.pts), stream.container
        if number == 0:
            raise VideoDecodeError(self.source, "truncated or damaged: the video stream has no packet")
        if container.format.name == "avi" and 2 * number < stream.frames:
            raise VideoDecodeError(self.source, f"damaged: of {stream.frames} frames {number} are there")
        declared = declared_seconds(container, stream)
        if declared is not None and index.duration:
            seconds = float((int(index.pts.max()) + index.duration) * stream.time_base)
            if 2 * seconds < declared:
                raise VideoDecodeError(self.source, f"damaged: of {declared:.2f} s {seconds:.2f} s are there")

    @contextmanager
    def _indexed(self) -> Iterator[tuple[av.VideoStream, "_Index"]]:
        """The opened track, and what there is to know of its packets."""
        with self._packets() as (stream, packets):
            index = _scan(self.source, stream.codec_context, packets)
            self._check_length(stream, index)
            if index.unpack and index.kept is not None:
                index = _scan(self.source, stream.codec_context, _unpacked(stream, index.kept), unpack=True)
            if not index.unpack or index.kept is not None:
                yield stream, index
                return
        with self._packets(unpack=True) as (stream, packets):
            yield stream, _scan(self.source, stream.codec_context, packets, unpack=True)


def decode_packet(
    context: av.VideoCodecContext, packet: av.Packet | None, errors: list[tuple[int, str, str]]
) -> tuple[list[av.VideoFrame], str | None]:
    """The frames that come out, and the first error that FFmpeg logs. A packet without a picture may well fail."""
    try:
        decoded = context.decode(packet)
    except av.error.InvalidDataError:
        if packet is None or _facts(context)(packet):
            raise
        decoded = []
    said = taken(errors) if errors else None
    return decoded, said if said is not None and (packet is None or _facts(context)(packet)) else None


class _Frames:
    """Gathers the wanted frames of a clip as one (T, H, W, 3) array."""

    def __init__(self, indices: list[int]):
        self.indices = indices
        self.missing = set(indices)
        self.array: np.ndarray | None = None
        self.reformatter = VideoReformatter()  # one for all frames: it keeps swscale set up

    def put(self, index: int, frame: av.VideoFrame) -> None:
        """Convert `frame` if it is wanted."""
        if index not in self.missing:
            return
        self.missing.remove(index)
        rgb = _oriented(_to_rgb(frame, self.reformatter), _orientation(frame))
        if self.array is None:
            self.array = np.empty((len(self.indices), *rgb.shape), np.uint8)
        elif rgb.shape != self.array.shape[1:]:
            rgb = _scaled(rgb, *self.array.shape[1:3])
        for slot, wanted in enumerate(self.indices):
            if wanted == index:
                self.array[slot] = rgb

    def stack(self) -> torch.Tensor:
        return torch.from_numpy(self.array).permute(0, 3, 1, 2)


def _to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8 in stored orientation; transparent parts come out black."""
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    converted = reformatter.reformat(frame, format="rgba" if alpha else "rgb24", threads=1)
    plane = converted.planes[0]
    pixels = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    if not alpha:
        return pixels[:, : plane.width * 3].reshape(plane.height, plane.width, 3)
    pixels = pixels[:, : plane.width * 4].reshape(plane.height, plane.width, 4).astype(np.uint16)
    return ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
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


def _oriented(rgb: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, mirror, upside_down = orientation
    rgb = rgb.swapaxes(0, 1) if transpose else rgb
    return rgb[:: -1 if upside_down else 1, :: -1 if mirror else 1]


def _scaled(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
    return frame.reformat(width=width, height=height, threads=1).to_ndarray()


def _seconds(frame: av.VideoFrame) -> str:
    return "an unknown time" if frame.time is None or not isfinite(frame.time) else f"{frame.time:.2f} s"


@dataclass
class _Index:
    """
    What there is to know of the packets of a clip, in decoding order.

    pts: (packets,) int64, _NO_STAMP where there is none; facts: (packets,) uint8, _PICTURE | _SHOWN | _KEY; vops:
    (packets,) int8, types of MPEG-4 pictures, -1 where not exactly one is there; unpack: the packets are, or are to
    be, those of `_unpacked`; duration: of the last packet, in units of pts; kept: the packets, None where they take
    more than _KEPT_BYTES.
    """

    pts: np.ndarray
    facts: np.ndarray
    vops: np.ndarray
    unpack: bool
    duration: int | None
    kept: list[av.Packet] | None


def _scan(source: str, context: av.VideoCodecContext, packets: Iterable[av.Packet], unpack: bool = False) -> _Index:
    facts_of, find_vops = _facts(context), context.name == "mpeg4"
    pts, facts, vops = array("q"), bytearray(), []
    kept, size, complete, packet = [], 0, True, None
    for packet in packets:
        stamp = packet.pts
        pts.append(_NO_STAMP if stamp is None else stamp)
        facts.append(facts_of(packet))
        kept.append(packet)
        size += packet.size
        if size > _KEPT_BYTES:
            LIMITS.check(source, "packets", len(pts))
            vops += [_find_vops(kept)] if find_vops else []
            kept, size, complete = [], 0, False
    LIMITS.check(source, "packets", len(pts))
    vops += [_find_vops(kept)] if find_vops and kept else []
    packed = any((counts > 1).any() for counts, _ in vops)
    return _Index(
        np.array(pts, np.int64),
        np.array(facts, np.uint8),
        np.concatenate([types for _, types in vops]) if vops else np.empty(0, np.int8),
        packed or unpack,
        packet and packet.duration,
        kept if complete else None,
    )


@dataclass
class _Plan:
    """
    pts: (packets,) int64, unique among those of frames, which decoded frames carry; shown: (frames,) for each frame
    in the order shown the position of its packet, starts: and of the packet to start decoding at; begins: (packets,)
    for each packet the first of those without a picture right before it; restamped: the packets carry other stamps.
    """

    pts: np.ndarray
    shown: np.ndarray
    starts: np.ndarray
    begins: np.ndarray
    restamped: bool


def _plan(context: av.VideoCodecContext, index: _Index) -> _Plan | None:
    """What the packets tell about the order of frames, or None where they cannot be trusted."""
    pts, facts, number = index.pts, index.facts, len(index.pts)
    if context.name not in _PLANNED or number == 0:
        return None
    if context.name == "mpeg4":
        pts = _in_vop_order(index.vops)
    elif context.name in ("h264", "hevc"):
        known = pts != _NO_STAMP
        reordered = bool(((pts[:-1] > pts[1:]) & known[:-1] & known[1:]).any())
        if context.has_b_frames and not reordered:  # AVI has time stamps of decoding only
            return None
    shown, keys = np.flatnonzero(facts & _SHOWN), np.flatnonzero(facts & _KEY)
    if pts is None or not len(shown) or not len(keys):
        return None
    pictures = np.where(facts & _PICTURE, np.arange(number), -1)
    begins = np.concatenate([[0], np.maximum.accumulate(pictures)[:-1] + 1])
    stamps, key_stamps = pts[shown], pts[keys]
    if (stamps == _NO_STAMP).any() or (key_stamps == _NO_STAMP).any() or len(np.unique(stamps)) < len(stamps):
        return None
    if begins[keys[0]] != 0:
        return None
    shown, keys = shown[np.argsort(stamps)], keys[np.argsort(key_stamps, kind="stable")]
    starts = np.searchsorted(pts[keys], pts[shown], "right") - 1
    if starts[0] < 0:  # shown before the first picture that can be decoded
        return None
    return _Plan(pts, shown, keys[starts], begins, pts is not index.pts)


@dataclass
class _Run:
    """Packets begin to end - 1 are decoded together; frames before the stamp `first` refer to what came before."""

    begin: int
    end: int
    first: int


def _runs(plan: _Plan, indices: Iterable[int]) -> list[_Run]:
    runs: list[_Run] = []
    for index in sorted(indices):
        key, end = int(plan.starts[index]), int(plan.shown[index]) + 1
        begin = int(plan.begins[key])
        if not runs or begin > runs[-1].end:
            runs.append(_Run(begin, end, int(plan.pts[key])))
        else:
            runs[-1].end = max(runs[-1].end, end)
    return runs


def _put_planned(
    context: av.VideoCodecContext,
    decoded: list[av.VideoFrame],
    first: int,
    wanted: dict[int, int],
    frames: _Frames,
) -> bool:
    for frame in decoded:
        if frame.pts is None or _has_fields(context, frame):
            return False
        if frame.pts < first:  # an open group of pictures: refers to the group before it, and is not wanted here
            continue
        if frame.is_corrupt or (frame.pts == first and not frame.key_frame):
            return False
        if frame.pts in wanted:
            frames.put(wanted[frame.pts], frame)
    return True


def _unpacked(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """MPEG-4 part 2 with one picture (VOP) a packet: old Xvid files pack a P-frame with the B-frame that follows."""
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    for packet in chain(packets, [None]):
        yield from unpack.filter(packet)


def _in_vop_order(types: np.ndarray) -> np.ndarray | None:
    """
    Time stamps of MPEG-4 part 2 pictures, their places in the order shown, which the types tell: AVI keeps none of
    presentation. None where a packet holds no picture, as the decoder then shows fewer frames than there are packets.
    """
    if (types == -1).any():
        return None
    stamps, place, anchor = np.empty(len(types), np.int64), 0, None
    for k, vop_type in enumerate(types.tolist()):
        shown = anchor  # a picture that is no B-frame is shown when the next such one comes
        if vop_type == _B_VOP:
            shown = k
        else:
            anchor = k
        if shown is not None:
            stamps[shown], place = place, place + 1
    if anchor is None:
        return None
    stamps[anchor] = place
    return stamps


def _find_vops(packets: list[av.Packet]) -> tuple[np.ndarray, np.ndarray]:
    """
    How many VOPs begin in each packet, and the type of the one; -1 where there are none or several, where the packet
    ends before it is told, and where no picture is coded.

    All packets are searched at once: one by one it takes as long as decoding two frames.
    """
    sizes = np.array([packet.size for packet in packets])
    ends = np.cumsum(sizes)
    data = np.frombuffer(b"".join([*packets, _VOP]), np.uint8)
    starts = np.flatnonzero(data[3 : ends[-1]] == _VOP[3])
    starts = starts[(data[starts + 2] == _VOP[2]) & (data[starts + 1] == 0) & (data[starts] == 0)]
    owners, after = np.searchsorted(ends, starts, "right"), starts + len(_VOP)
    inside = after <= ends[owners]  # not half in the packet that follows
    owners, after = owners[inside], after[inside]
    counts, types = np.bincount(owners, minlength=len(packets)), np.full(len(packets), -1, np.int8)
    types[owners] = np.where(after < ends[owners], data[after] >> 6, -1)
    types[(counts != 1) | (sizes <= _MAX_NOT_CODED_VOP)] = -1
    return counts, types


def _facts(context: av.VideoCodecContext) -> Callable[[av.Packet], int]:
    """From a packet of this codec to _PICTURE | _SHOWN | _KEY."""
    if context.name in ("h264", "hevc"):
        return _UnitFacts(context.name, context.extradata or b"")
    if context.name in ("vp8", "vp9"):
        return _vp8_facts if context.name == "vp8" else _vp9_facts
    return _plain_facts


def _plain_facts(packet: av.Packet, shown: bool = True) -> int:
    return _PICTURE | _SHOWN * (shown and not packet.is_discard) | _KEY * packet.is_keyframe


def _vp8_facts(packet: av.Packet) -> int:
    """VP8 and VP9 have pictures that are only referred to."""
    return _plain_facts(packet, bool(memoryview(packet)[0] & 0x10))


def _vp9_facts(packet: av.Packet) -> int:
    data = memoryview(packet)
    flags = data[0] << 1 if data[0] & 0x30 == 0x30 else data[0]  # profile 3 has one more bit before them
    # shows an old one, is shown, or a superframe
    return _plain_facts(packet, bool(flags & 0x08 or flags & 0x02 or data[-1] & 0xE0 == 0xC0))


class _UnitFacts:
    """
    Of an H.264 or HEVC packet, whose units follow start codes or their lengths. What holds parameters, filler and
    notes alone is no picture. In H.264 recovery points are marked as key frames too, and what follows them may still
    refer to what came before: only IDR pictures are keys.
    """

    def __init__(self, codec: str, extradata: bytes):
        self.shift, self.mask, length_at = (0, 0x1F, 4) if codec == "h264" else (1, 0x3F, 21)
        self.slices, self.keys = (range(1, 6), (5,)) if codec == "h264" else (range(32), range(16, 24))
        self.others = range(6, 16) if codec == "h264" else range(32, 41)
        self.width = 0  # bytes of the length before a unit; 0: start codes
        if extradata[:1] == b"\x01" and len(extradata) > length_at:
            self.width = (extradata[length_at] & 3) + 1

    def __call__(self, packet: av.Packet) -> int:
        picture, found = _PICTURE | _SHOWN * (not packet.is_discard), 0
        for header in self._headers(memoryview(packet)):
            unit = header >> self.shift & self.mask
            if unit in self.slices and packet.is_keyframe and unit not in self.keys:
                found = picture
            elif unit in self.slices:
                return picture | _KEY * packet.is_keyframe
            elif unit not in self.others or header & 0x80:  # damaged: whatever it was, it counts
                return picture
        return found

    def _headers(self, data: memoryview) -> Iterator[int]:
        """First byte of each unit; 0x80, which none has, where the packet is not made of units."""
        width, position = self.width, 0
        if not width:
            for match in re.finditer(b"\x00\x00\x01(?=.)", data, re.DOTALL):
                yield data[match.end()]
                position = len(data)
        while width and position + width < len(data):
            yield data[position + width]
            position += width + int.from_bytes(data[position : position + width], "big")
        if position != len(data):
            yield 0x80


def _has_fields(context: av.VideoCodecContext, frame: av.VideoFrame) -> bool:
    """Whether a frame may have come as two packets, one a field."""
    return context.name in ("h264", "hevc") and frame.interlaced_frame
