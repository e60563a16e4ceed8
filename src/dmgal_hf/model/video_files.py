"""Opening a video file with FFmpeg: only here, and only files that hold their pictures themselves and are whole."""

import functools
import io
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
from av.container import InputContainer
from av.format import ContainerFormat
from av.stream import Disposition

from .reading_limits import LIMITS, VideoDecodeError

URL = r"(https?|rtsps?|rtmps?|rtp|udp|tcp|srt)://"
_NETWORK = "http,https,httpproxy,tcp,tls,udp,rtp,srtp,rtsp,rtsps,rtmp,rtmps,rtmpt,ffrtmphttp,srt,crypto"
_NAMED_BY_URL = {"rtsp": "rtsp", "rtsps": "rtsp", "rtp": "rtp"}  # what has a demuxer of its own
# They open what they list: files, addresses, ports, scripts. So do devices and others that FFmpeg says need no file.
_NAME_OTHERS = {"concat", "dash", "hls", "imf", "sdp", "vapoursynth", "vobsub", "webm_dash_manifest"}
_PLAY_LISTS = {"HLS": rb"#EXTM3U", "concat": rb"ffconcat", "DASH": rb"(<\?xml.{,1000})?<MPD\b", "SDP": rb"v=0\r?\n"}
_NO_CLIP = Disposition.attached_pic | Disposition.timed_thumbnails  # covers of songs, previews
_BOXES = set(b"LIST RIFF JUNK idx1 ftyp styp moov moof mdat mfra free skip wide uuid udta meta sidx pdin".split())
_TABLES_IN = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}  # MP4 boxes that hold boxes
_ASF_HEADER, _ASF_DATA = (bytes.fromhex(id) for id in ("3026b2758e66cf11a6d900aa0062ce6c",
                                                       "3626b2758e66cf11a6d900aa0062ce6c"))  # fmt: skip
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
_PNG = b"\x89PNG\r\n\x1a\n"


@functools.cache
def _formats() -> str:
    """The demuxers that are let at a file. `image2` opens a picture by its path; patterns are switched off for it."""
    names = [name for name in av.formats_available if ContainerFormat(name).is_input and name not in _NAME_OTHERS]
    return ",".join(name for name in names if name == "image2" or not ContainerFormat(name, "r").no_file)


@contextmanager
def open_video(
    source: str, media: str | bytes | BinaryIO, format: str | None = None
) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """
    Opens a container, and takes the video track that a player would show. It is decoded on one thread.

    What is opened is `media` alone: of a path the file, of a URL the network, of bytes and file objects nothing else.
    Play lists, patterns of names and devices are refused unless `format` names them.

    Raises:
        VideoDecodeError: nothing opens, there is no video track, or it has larger frames than LIMITS allows.
    """
    url = re.match(URL, media) if isinstance(media, str) else None
    protocols = _NETWORK if url else "file" if isinstance(media, str) else "none"
    more = {_NAMED_BY_URL.get(url[1]) if url else None, format} - {None}
    pixels = {"max_pixels": str(2 * LIMITS.pixels)}  # FFmpeg counts those of its buffers, whose sides are rounded up
    options = {"protocol_whitelist": protocols, "format_whitelist": ",".join([_formats(), *more]), **pixels}
    if format is None:
        options["pattern_type"] = "none"
    try:
        file = io.BytesIO(media) if isinstance(media, bytes) else media
        container = av.open(file, format=format, options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoDecodeError(source, f"not a readable video ({error.strerror})") from error
    with container:
        stream = _choose_track(source, container)
        LIMITS.check(source, "pixels", stream.codec_context.width * stream.codec_context.height)
        stream.codec_context.thread_count = 1
        # crccheck: checksums inside the stream are compared; what differs is logged, see `ffmpeg_errors`
        stream.codec_context.options = {"err_detect": "crccheck", **pixels}
        yield container, stream


def _choose_track(source: str, container: InputContainer) -> av.VideoStream:
    """Of the video tracks that decode, the default one, then the longest, then the first."""
    streams = [stream for stream in container.streams.video if not stream.disposition & _NO_CLIP]
    if not streams or container.format.name == "tty":  # FFmpeg draws text files
        raise VideoDecodeError(source, f"no video stream ({container.format.name} file)")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise VideoDecodeError(source, "FFmpeg has no decoder for its video stream", "Transcode it.")
    return max(decodable, key=lambda stream: (bool(stream.disposition & Disposition.default), _length(stream)))


def _length(stream: av.VideoStream) -> float:
    """Seconds that the container declares for a track, as far as it does; a still picture has none."""
    if stream.frames == 1:
        return 0.0
    if (tagged := _tagged_length(stream)) is not None:  # in its place FFmpeg may give the length of the file
        return tagged
    return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0


def _tagged_length(stream: av.VideoStream) -> float | None:
    """Seconds, where Matroska's tags tell them."""
    clock = re.match(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 3600.0 * int(clock[1]) + 60.0 * int(clock[2]) + float(clock[3]) if clock else None


def declared_seconds(container: InputContainer, stream: av.VideoStream) -> float | None:
    """
    How long the container says that the track is, where that is written once all of it is there: Matroska and WebM.
    MP4's own length comes from the table that its packets come from, and others' from a guess.
    """
    if container.format.name != "matroska,webm" or not container.duration:
        return None
    whole = container.duration / av.time_base
    if len(container.streams) == 1:
        return whole
    tagged = _tagged_length(stream)  # the length of the file may be that of its sound
    return None if tagged is None else min(tagged, whole)


# FFmpeg's log

_log_lock, _log_readers, _log_before = threading.Lock(), 0, (None, True)


@contextmanager
def ffmpeg_errors() -> Iterator[list[tuple[int, str, str]]]:
    """
    The errors that FFmpeg logs in this thread meanwhile: (level, part of FFmpeg, message) each. Of some damage, as
    checksums that differ, it tells nowhere else. PyAV's level is set for the whole process, and set back by the last
    reader. FFmpeg decodes on one thread here, so none of its threads waits for Python to log.
    """
    global _log_readers, _log_before
    with _log_lock:
        if _log_readers == 0:
            _log_before = av.logging.get_level(), av.logging.get_skip_repeated()
            av.logging.set_skip_repeated(False)  # of a file that is read twice, the errors come twice
            if _log_before[0] is None or _log_before[0] < av.logging.ERROR:
                av.logging.set_level(av.logging.ERROR)
        _log_readers += 1
    try:
        with av.logging.Capture() as errors:
            yield errors
    finally:
        with _log_lock:
            _log_readers -= 1
            if _log_readers == 0:
                av.logging.set_level(_log_before[0])
                av.logging.set_skip_repeated(_log_before[1])


def taken(errors: list[tuple[int, str, str]], part: str | None = None) -> str | None:
    """The first message since the last call, if given from that part of FFmpeg; all are taken off the list."""
    said = [text.strip() for level, name, text in errors if level <= av.logging.ERROR and part in (None, name)]
    errors.clear()
    return said[0] if said else None


def _after_fork() -> None:
    global _log_lock, _log_readers
    _log_lock, _log_readers = threading.Lock(), 0  # the threads that held them are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Whole files


def check_whole(source: str, file: BinaryIO) -> None:
    """
    Raises VideoDecodeError for a file that ends before its container says, which FFmpeg reads as a shorter clip; for
    one whose tables claim more packets than LIMITS allows; and for a play list. Bytes behind the end are no fault.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise VideoDecodeError(source, "the file is empty")
    file.seek(0)
    head = file.read(1100)
    for kind, beginning in _PLAY_LISTS.items():
        if re.match(rb"\s*(\xef\xbb\xbf)?\s*" + beginning, head, re.DOTALL):
            problem = f"a play list ({kind}), which names other files or addresses; none of them was opened"
            raise VideoDecodeError(source, problem, "Give the video itself.")
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        ends = _chunk_ends(file, size, "<4sI", 12)
    elif head[4:8] in _BOXES:
        ends = _chunk_ends(file, size, ">I4s", 0)
        LIMITS.check(source, "packets", _claimed_samples(file, 0, size))
    elif head[:4] == _EBML:
        ends = _ebml_ends(file, size)
    elif head[:16] == _ASF_HEADER:
        ends = _asf_ends(file, size, head)
    elif head[:8] == _PNG:
        ends = _png_ends(file, size)
    elif head[:4] == b"GIF8":
        ends = _gif_ends(file, size)
    else:
        return
    missing = max(ends, default=0) - size
    if missing > 0:
        raise VideoDecodeError(
            source, f"truncated: the file has {size} bytes, and at least {missing} more are missing"
        )


def _chunk_ends(file: BinaryIO, size: int, header: str, position: int) -> Iterator[int]:
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


def _claimed_samples(file: BinaryIO, position: int, end: int, sound: bool = False) -> int:
    """
    The most samples that a table of an MP4 file claims, those of all fragments together. FFmpeg makes an entry of
    each before anything is read, also where all have one size, and the table takes no bytes. Sound that is not packed
    is left out: it has one for each of the 44,100 a second, and FFmpeg takes them together.
    """
    most, fragments, one_each = 0, 0, False
    while position + 8 <= end:
        file.seek(position)
        length, kind, data = struct.unpack(">I4s20s", file.read(28).ljust(28, b"\0"))
        begin = position + 8
        if length == 1:
            length, begin = struct.unpack(">Q", data[:8])[0], position + 16
        stop = end if length < 8 else min(position + length, end)
        if kind in _TABLES_IN:
            claimed = _claimed_samples(file, begin, stop, sound)
            if kind in (b"moof", b"traf"):
                fragments += claimed
            most = max(most, claimed)
        elif kind == b"hdlr":
            sound = data[8:12] == b"soun"
        elif kind == b"stts":
            one_each = struct.unpack(">I4xI", data[4:16]) == (1, 1)
        elif kind in (b"stsz", b"stz2") and not (sound and one_each):
            most = max(most, struct.unpack(">I", data[8:12])[0])
        elif kind == b"trun":
            fragments += struct.unpack(">I", data[4:8])[0]
        position = stop if stop > position else end
    return max(most, fragments)


def _ebml_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Where the EBML header and the segment of a Matroska or WebM file end; a live one does not say."""
    position = 0
    while position < size:
        file.seek(position)
        head = file.read(12)
        id_length = 9 - head[0].bit_length()
        if head[:id_length] not in (_EBML, _SEGMENT) or len(head) <= id_length or not head[id_length]:
            return
        length = 9 - head[id_length].bit_length()
        value = int.from_bytes(head[id_length : id_length + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:
            return
        position += id_length + length + value
        yield position


def _asf_ends(file: BinaryIO, size: int, head: bytes) -> Iterator[int]:
    """Where the header and the packets of an ASF (WMV) file end; a live one does not say."""
    (length,) = struct.unpack("<Q", head[16:24])
    yield length
    file.seek(min(length, size))
    data = file.read(24)
    if len(data) == 24 and data[:16] == _ASF_DATA and (packets := struct.unpack("<Q", data[16:])[0]) >= 50:
        yield length + packets


def _png_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """Where each chunk of a PNG or APNG file ends, up to the one that closes it."""
    position, kind = len(_PNG), b""
    while kind != b"IEND":
        yield position + 12
        if position + 12 > size:
            return
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        position += 12 + length
        yield position


def _gif_ends(file: BinaryIO, size: int) -> Iterator[int]:
    """The end of the file if the mark that closes a GIF stands there, else where each of its blocks ends."""
    file.seek(-min(size, 64), os.SEEK_END)
    if file.read().rstrip(b"\x00").endswith(b";"):  # some writers pad it
        yield size
        return
    file.seek(10)
    position = 13 + _colours(file.read(1))
    while True:
        yield position + 1
        file.seek(position)
        kind = file.read(1)
        if kind == b",":  # a picture: its place, its colours, the size of its codes
            file.seek(position + 9)
            position += 11 + _colours(file.read(1))
        elif kind == b"!":
            position += 2
        else:  # the mark, or nothing of a GIF
            return
        length = 1
        while length:
            yield position + 1
            file.seek(position)
            length = int.from_bytes(file.read(1), "big")
            position += 1 + length


def _colours(flags: bytes) -> int:
    """Bytes of the table of colours that the flags of a GIF announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0
