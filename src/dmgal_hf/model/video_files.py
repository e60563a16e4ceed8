"""Opening a video with FFmpeg: only here, and only files that hold their pictures themselves. And what FFmpeg logs."""

import functools
import io
import os
import re
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
# The decoders that FFmpeg tries as it opens a WebM file. VP9's would spend as long on the first key frame as on ten
# other frames, and tell nothing that reading needs. (H.264's tells how far frames are reordered.)
_TRIED_IN_WEBM = "vp8,libvpx,libdav1d,av1,h264,hevc,opus,libopus,vorbis,libvorbis"
_NO_CLIP = Disposition.attached_pic | Disposition.timed_thumbnails  # covers of songs, previews


@functools.cache
def _formats() -> str:
    """The demuxers that are let at a file. `image2` opens a picture by its path; patterns are switched off for it."""
    names = [name for name in av.formats_available if ContainerFormat(name).is_input and name not in _NAME_OTHERS]
    return ",".join(name for name in names if name == "image2" or not ContainerFormat(name, "r").no_file)


@contextmanager
def open_video(
    source: str, media: str | bytes | BinaryIO, format: str | None = None, is_webm: bool = False
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
    if is_webm:
        options["codec_whitelist"] = _TRIED_IN_WEBM
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
    if len(decodable) == 1:
        return decodable[0]
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
