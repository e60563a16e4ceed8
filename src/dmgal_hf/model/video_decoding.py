"""Read chosen frames of a clip as RGB, exactly, from any container FFmpeg opens or from extracted frames.

The frames of a clip are those that decoding the whole of it yields, in the order they are shown; what a header claims
about their number is never used. Where the packets of a stream tell that order beyond doubt (`_plan`), only groups of
pictures that hold a wanted frame are decoded; everywhere else the clip is decoded from its first packet to its last.

What a picture looks like: rotated and mirrored as its display matrix says (to the nearest quarter turn), stored pixels
kept as they are (no stretching of non-square pixels, no deinterlacing, no tone mapping), alpha laid over black.

Only wanted frames are converted, at their stored size; the processor resizes them after. Resizing in the conversion,
by FFmpeg's swscale, was slower than torch at every size tried, 340x256 to 1920x1080, and off by 1 to 3 grey levels in
the mean, up to 48.
"""

import io
import os
import re
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import av
import numpy as np
import torch
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition
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
from .zip_archive import LOCAL_HEADER, open_zip, split_zip_path

DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
_NOT_A_VIDEO = {
    "tty",
    "hls",
    "concat",
    "dash",
    "webm_dash_manifest",
}  # FFmpeg draws text files, and follows play lists
_PLANNED = {"h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1", "mjpeg", "prores"}
_SKIPS_EXACTLY = {"h264", "hevc", "mpeg4", "vp8"}  # decoders that leave out unreferenced frames packet by packet
_BOXES = set(b"LIST RIFF JUNK idx1 ftyp styp moov moof mdat mfra free skip wide uuid udta meta sidx pdin".split())
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
        with open(media, "rb") if isinstance(media, str) else io.BytesIO(media) as file:
            if file.read(4) == LOCAL_HEADER:
                return ZippedFrames(source, media)
            check_whole(source, file)
            behind = video_behind_picture(source, file)
        if behind is not None:
            return _open({"path": source, "bytes": behind})
    except (OSError, zipfile.BadZipFile) as error:
        raise VideoDecodeError(source, f"cannot be opened ({error})", "Check the path and its permissions.") from error
    return _Stream(source, media)


def _resolve(video: Any) -> tuple[str, str | bytes]:
    """Name of a video for messages, and its path or its bytes."""
    if isinstance(video, dict):
        path, data = video.get("path"), video.get("bytes")
        if data is None and path is None:
            raise VideoDecodeError("<bytes>", "both 'path' and 'bytes' are None", "Give one of them.")
        return _resolve(path) if data is None else (str(path or "<bytes>"), data)
    if isinstance(video, str | os.PathLike):
        path = os.fspath(video)
        if not path or "\0" in path:
            raise VideoDecodeError(repr(path), "no file has such a name", "Give the path of a video.")
        if is_elsewhere(path):
            return path, fetch(path)
        # an absolute path cannot be taken for one of FFmpeg's protocols ("concat:...")
        return (path, _download(path)) if re.match("https?://", path) else (path, os.path.abspath(path))
    if hasattr(video, "read"):
        if video.seekable():
            video.seek(0)
        name = getattr(video, "name", None)
        source, video = name if isinstance(name, str) else "<bytes>", video.read()
    else:
        source = "<bytes>"
    if isinstance(video, bytes | bytearray | memoryview):
        return source, bytes(video)
    raise VideoDecodeError(
        source, f"a video cannot be a {type(video).__name__}", "Give a path, a URL, bytes or a binary file object."
    )


def _download(url: str) -> bytes:
    from huggingface_hub import get_session

    try:
        response = get_session().get(url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True)
        response.raise_for_status()
    except Exception as error:  # the client's exceptions have another root in each major version of the hub
        raise VideoDecodeError(url, f"download failed ({error})", "Check the address and the connection.") from error
    return response.content


def check_whole(source: str, file: io.BufferedIOBase) -> None:
    """Raise for a file that ends before its container says: FFmpeg reads such a one as a shorter clip."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise VideoDecodeError(source, "the file is empty")
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"AVI ":
        ends = _chunk_ends(file, size, "<4sI", 12)
    elif head[4:8] in _BOXES:
        ends = _chunk_ends(file, size, ">I4s", 0)
    elif head[:4] == b"\x1aE\xdf\xa3":
        ends = _ebml_ends(file, size)
    elif head[:4] == b"GIF8":
        file.seek(-min(size, 64), os.SEEK_END)
        ends = [size if file.read().rstrip(b"\x00").endswith(b";") else size + 1]  # some writers pad the trailer
    else:
        return
    missing = max(ends, default=0) - size
    if missing > 0:
        raise VideoDecodeError(
            source, f"truncated: the file has {size} bytes, and at least {missing} more are missing"
        )


def _chunk_ends(file: io.BufferedIOBase, size: int, header: str, position: int) -> Iterator[int]:
    """Where each RIFF chunk or MP4 box of the top level ends."""
    riff = header[0] == "<"
    while position + 8 <= size:
        file.seek(position)
        first, second = struct.unpack(header, file.read(8))
        kind, length = (first, second + 8) if riff else (second, first)
        if kind not in _BOXES:  # bytes after the end that belong to nothing
            return
        if not riff and length == 1 and position + 16 <= size:  # a 64-bit length follows
            length = struct.unpack(">Q", file.read(8))[0]
        if length < 8:  # "to the end of the file"
            return
        yield position + length
        position += length + (length & 1 if riff else 0)


def _ebml_ends(file: io.BufferedIOBase, size: int) -> Iterator[int]:
    """Where the EBML header and the segment of a Matroska or WebM file end; a live one does not say."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        id_length = 9 - head[0].bit_length()
        if id_length > 4 or len(head) <= id_length or not head[id_length]:
            return
        length = 9 - head[id_length].bit_length()
        value = int.from_bytes(head[id_length : id_length + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:
            return
        position += id_length + length + value
        yield position


class _Stream:
    """A clip in a container: its first video stream that is no cover picture."""

    def __init__(self, source: str, media: str | bytes):
        self.source, self.media = source, media

    def read(self, choose: Callable[[int], list[int]]) -> torch.Tensor:
        with self._demuxed() as (stream, packets):
            plan = _plan(stream, packets)
            if plan is not None:
                indices = choose(len(plan.shown))
                check_range(self.source, indices, len(plan.shown))
                frames = _Frames(indices)
                if _decode_planned(stream.codec_context, plan, frames):
                    return frames.stack()
        return self._read_in_order(choose, len(packets))

    def _read_in_order(self, choose: Callable[[int], list[int]], guess: int) -> torch.Tensor:
        """Decode everything; a second time if the clip is not as long as it has packets."""
        frames, clip_length = _Frames(choose(guess)), 0
        for frame in self._decode_all():
            frames.put(clip_length, frame)
            clip_length += 1
        indices = choose(clip_length)
        check_range(self.source, indices, clip_length)
        if indices != frames.indices:
            frames = _Frames(indices)
            for index, frame in enumerate(self._decode_all()):
                frames.put(index, frame)
        return frames.stack()

    def probe(self) -> VideoInfo:
        with self._demuxed() as (stream, packets), closing(self._decode_all()) as decoded:
            first = next(decoded)
            plan = None if _has_fields(stream.codec_context, first) else _plan(stream, packets)
            num_frames = len(plan.shown) if plan else 1 + sum(1 for _ in decoded)
            fps = float(stream.average_rate) if stream.average_rate else None
            duration = float(stream.duration * stream.time_base) if stream.duration else None
            if duration is None and stream.container.duration:
                duration = stream.container.duration / av.time_base
        transposed = _orientation(first)[0]
        height, width = (first.width, first.height) if transposed else (first.height, first.width)
        return VideoInfo(num_frames, fps, height, width, duration or (num_frames / fps if fps else None))

    def _decode_all(self) -> Iterator[av.VideoFrame]:
        """Every frame, in the order the decoder gives them. Raises VideoDecodeError for a damaged or empty stream."""
        empty = True
        with self._demuxed() as (stream, packets):
            for packet in [*packets, None]:
                for frame in stream.codec_context.decode(packet):
                    if frame.is_corrupt:
                        raise VideoDecodeError(self.source, f"damaged: the frame at {_seconds(frame)} does not decode")
                    empty = False
                    yield frame
        if empty:
            raise VideoDecodeError(self.source, "none of its packets decodes to a frame")

    @contextmanager
    def _demuxed(self) -> Iterator[tuple[av.VideoStream, list[av.Packet]]]:
        """The open stream, decoding on one thread, and all its packets in decoding order."""
        media = self.media if isinstance(self.media, str) else io.BytesIO(self.media)
        try:
            with av.open(media, metadata_errors="replace") as container:
                streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
                if not streams or container.format.name in _NOT_A_VIDEO:
                    raise VideoDecodeError(self.source, f"no video stream ({container.format.name} file)")
                stream = streams[0]
                if stream.codec_context is None:
                    raise VideoDecodeError(self.source, "FFmpeg has no decoder for its video stream", "Transcode it.")
                LIMITS.check(self.source, "pixels", stream.codec_context.width * stream.codec_context.height)
                stream.codec_context.thread_count = 1
                packets = [packet for packet in container.demux(stream) if packet.size]
                if not packets or any(packet.is_corrupt for packet in packets):
                    raise VideoDecodeError(
                        self.source, "truncated or damaged: a packet of the video stream is incomplete"
                    )
                yield stream, packets
        except av.FFmpegError as error:
            raise VideoDecodeError(self.source, f"not a readable video ({error.strerror})") from error


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
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(side_data)[:20])  # (x, y) is shown at (a x + c y, b x + d y)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def _oriented(rgb: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, mirror, upside_down = orientation
    rgb = rgb.swapaxes(0, 1) if transpose else rgb
    return rgb[:: -1 if upside_down else 1, :: -1 if mirror else 1]


def _scaled(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
    return frame.reformat(width=width, height=height, threads=1).to_ndarray()


def _seconds(frame: av.VideoFrame) -> str:
    return "an unknown time" if frame.time is None else f"{frame.time:.2f} s"


@dataclass
class _Plan:
    """packets in decoding order; for each frame in the order shown, the position of its packet and of the packet to
    start decoding at; the time stamps of the packets are unique, and decoded frames carry them."""

    packets: list[av.Packet]
    shown: list[int]
    starts: list[int]


def _plan(stream: av.VideoStream, packets: list[av.Packet]) -> _Plan | None:
    """What the packets tell about the order of frames, or None where they cannot be trusted."""
    context = stream.codec_context
    if context.name not in _PLANNED:
        return None
    if context.name == "mpeg4":
        packets = _in_vop_order(stream, packets)
    elif context.name in ("h264", "hevc"):
        reordered = any(a.pts > b.pts for a, b in pairwise(packets) if a.pts is not None and b.pts is not None)
        if context.has_b_frames and not reordered:  # AVI has time stamps of decoding only
            return None
    shown = [k for k, packet in enumerate(packets) if not packet.is_discard and _is_shown(context.name, packet)]
    stamps = [packets[k].pts for k in shown]
    if not shown or None in stamps or len(set(stamps)) < len(stamps):
        return None
    keys = [k for k, packet in enumerate(packets) if packet.is_keyframe and _is_random_access(context, packet)]
    if not keys or keys[0] != 0 or any(packets[k].pts is None for k in keys):
        return None
    shown.sort(key=lambda k: packets[k].pts)
    keys.sort(key=lambda k: packets[k].pts)
    key_stamps = [packets[k].pts for k in keys]
    starts = [bisect_right(key_stamps, packets[k].pts) - 1 for k in shown]
    if starts[0] < 0:  # shown before the first picture that can be decoded
        return None
    return _Plan(packets, shown, [keys[start] for start in starts])


def _in_vop_order(stream: av.VideoStream, packets: list[av.Packet]) -> list[av.Packet]:
    """MPEG-4 part 2, one picture (VOP) a packet, stamped with its place in the order shown, which the VOP types tell.

    AVI keeps no time stamps of presentation, and old Xvid files pack a P-frame with the B-frame that follows it.
    Nothing is returned where pictures are missing, as the decoder then shows fewer frames than there are packets.
    """
    owners, types = _find_vops(packets)
    if len(owners) > len(set(owners)):
        unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
        packets = [single for packet in [*packets, None] for single in unpack.filter(packet)]
        owners, types = _find_vops(packets)
    one_each = owners == list(range(len(packets))) and -1 not in types
    if not one_each or any(packet.size <= _MAX_NOT_CODED_VOP for packet in packets):
        return []
    place, anchor = 0, None
    for packet, vop_type in zip(packets, types, strict=True):
        shown = anchor  # a picture that is no B-frame is shown when the next such one comes
        if vop_type == _B_VOP:
            shown = packet
        else:
            anchor = packet
        if shown is not None:
            shown.pts, place = place, place + 1
        packet.dts = None
    anchor.pts = place
    return packets


def _find_vops(packets: list[av.Packet]) -> tuple[list[int], list[int]]:
    """The number of the packet that holds it, and the type, of each VOP in order; -1 where the packet ends before.

    All packets are searched at once: one by one it takes as long as decoding two frames.
    """
    ends = np.cumsum([packet.size for packet in packets])
    data = np.frombuffer(b"".join([*packets, _VOP]), np.uint8)
    starts = np.flatnonzero(data[3 : ends[-1]] == _VOP[3])
    starts = starts[(data[starts + 2] == _VOP[2]) & (data[starts + 1] == 0) & (data[starts] == 0)]
    owners, after = np.searchsorted(ends, starts, "right"), starts + len(_VOP)
    inside = after <= ends[owners]  # not half in the packet that follows
    types = np.where(after < ends[owners], data[after].astype(int) >> 6, -1)
    return owners[inside].tolist(), types[inside].tolist()


def _is_shown(codec: str, packet: av.Packet) -> bool:
    """Whether a packet yields a frame: VP8 and VP9 have pictures that are only referred to."""
    if codec not in ("vp8", "vp9"):
        return True
    data = memoryview(packet)
    if codec == "vp8":
        return bool(data[0] & 0x10)
    flags = data[0] << 1 if data[0] & 0x30 == 0x30 else data[0]  # profile 3 has one more bit before them
    return bool(flags & 0x08 or flags & 0x02 or data[-1] & 0xE0 == 0xC0)  # shows an old one, is shown, or a superframe


def _is_random_access(context: av.VideoCodecContext, packet: av.Packet) -> bool:
    """Whether decoding may start at a packet marked as key frame. In H.264 recovery points are marked so too, and what
    follows them may still refer to what came before."""
    if context.name == "h264":
        return any(header & 0x1F == 5 for header in _nal_headers(context, packet, 4))
    if context.name == "hevc":
        return any(16 <= header >> 1 & 0x3F <= 23 for header in _nal_headers(context, packet, 21))
    return True


def _nal_headers(context: av.VideoCodecContext, packet: av.Packet, length_at: int) -> Iterator[int]:
    """First byte of each unit of an H.264 or HEVC packet, whose units follow start codes or their lengths."""
    data, extradata = bytes(packet), context.extradata or b""
    if extradata[:1] != b"\x01":
        yield from (match[1][0] for match in re.finditer(b"\x00\x00\x01(.)", data, re.DOTALL))
        return
    width, position = (extradata[length_at] & 3) + 1, 0
    while position + width < len(data):
        yield data[position + width]
        position += width + int.from_bytes(data[position : position + width], "big")


def _has_fields(context: av.VideoCodecContext, frame: av.VideoFrame) -> bool:
    """Whether a frame may have come as two packets, one a field."""
    return frame.interlaced_frame and context.name in ("h264", "hevc")


def _decode_planned(context: av.VideoCodecContext, plan: _Plan, frames: _Frames) -> bool:
    """Put the wanted frames, decoding only what they need. False if what comes out is not what the plan promised."""
    packets, wanted = plan.packets, {plan.packets[plan.shown[index]].pts: index for index in frames.missing}

    def put(decoded: list[av.VideoFrame], first: int) -> bool:
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

    needed = {plan.shown[index] for index in frames.missing}
    position, first = 0, packets[0].pts
    for index in sorted(frames.missing):
        if plan.starts[index] > position:
            if position and not put(context.decode(None), first):
                return False
            if position:
                context.flush_buffers()
            position = plan.starts[index]
            first = packets[position].pts
        while position <= plan.shown[index]:
            if context.name in _SKIPS_EXACTLY:
                context.skip_frame = "DEFAULT" if position in needed else "NONREF"
            if not put(context.decode(packets[position]), first):
                return False
            position += 1
    return put(context.decode(None), first) and not frames.missing
