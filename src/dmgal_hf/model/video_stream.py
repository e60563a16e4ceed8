"""A clip in a container: its wanted frames decoded by the plan of its packets, or all of them in order."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from itertools import chain, islice
from math import isfinite
from typing import BinaryIO

import av
import numpy as np
import torch

from .decoding_plan import Plan, plan_decoding, runs_of
from .extracted_frames import VideoInfo, check_range
from .reading_limits import LIMITS, VideoDecodeError
from .video_files import declared_seconds, ffmpeg_errors, open_video, taken
from .video_packets import SHOWN, PacketIndex, facts_of, index_packets, unpacked
from .video_pixels import WantedFrames, orientation_of

_SKIPS_EXACTLY = {"h264", "hevc", "mpeg4", "vp8"}  # decoders that leave out unreferenced frames packet by packet


class VideoStream:
    """A clip in a container."""

    def __init__(self, source: str, media: str | bytes | BinaryIO, is_webm: bool = False):
        self.source, self.media, self.is_webm = source, media, is_webm

    def read(self, choose: Callable[[int], list[int]]) -> torch.Tensor:
        with ffmpeg_errors() as self.errors:
            with self._indexed() as (stream, index):
                plan = plan_decoding(stream.codec_context, index)
                if plan is not None:
                    indices = choose(len(plan.shown))
                    check_range(self.source, indices, len(plan.shown))
                    frames = WantedFrames(indices)
                    again = self._packets(index.unpack) if index.kept is None else nullcontext((stream, index.kept))
                    with again as (stream, packets):
                        if self._decode_planned(stream.codec_context, packets, plan, frames):
                            return frames.stack()
            return self._read_in_order(choose, int(np.count_nonzero(index.facts & SHOWN)))

    def _read_in_order(self, choose: Callable[[int], list[int]], guess: int) -> torch.Tensor:
        """Decode everything; a second time if the clip is not as long as it has packets."""
        frames, clip_length = WantedFrames(choose(max(guess, 1))), 0
        for frame, doubt in self._decode_all():
            self._put(frames, clip_length, frame, doubt)
            clip_length += 1
        indices = choose(clip_length)
        check_range(self.source, indices, clip_length)
        if indices != frames.indices:
            frames = WantedFrames(indices)
            for index, (frame, doubt) in enumerate(self._decode_all()):
                self._put(frames, index, frame, doubt)
        return frames.stack()

    def _put(self, frames: WantedFrames, index: int, frame: av.VideoFrame, doubt: str | None) -> None:
        if index in frames.missing:
            self._check_sound(frame, doubt)
        LIMITS.check(self.source, "pixels", frame.width * frame.height)
        frames.put(index, frame)

    def _check_sound(self, frame: av.VideoFrame, doubt: str | None) -> None:
        if doubt is not None:
            raise VideoDecodeError(self.source, f"damaged near {_seconds(frame)}: {doubt}")

    def probe(self) -> VideoInfo:
        with (
            ffmpeg_errors() as self.errors,
            self._indexed() as (stream, index),
            closing(self._decode_all()) as decoded,
        ):
            first, doubt = next(decoded)
            self._check_sound(first, doubt)
            plan = None if _has_fields(stream.codec_context, first) else plan_decoding(stream.codec_context, index)
            num_frames = len(plan.shown) if plan else 1
            for frame, doubt in decoded if plan is None else ():
                self._check_sound(frame, doubt)
                num_frames += 1
            fps = float(stream.average_rate) if stream.average_rate else None
            duration = float(stream.duration * stream.time_base) if stream.duration else None
            if duration is None and stream.container.duration:
                duration = stream.container.duration / av.time_base
        transposed = orientation_of(first)[0]
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
        self, context: av.VideoCodecContext, packets: Iterable[av.Packet], plan: Plan, frames: WantedFrames
    ) -> bool:
        """Put the wanted frames, decoding only what they need. False if what comes out is not what was promised."""
        wanted = {int(plan.pts[plan.shown[index]]): index for index in frames.missing}
        needed = {int(plan.shown[index]) for index in frames.missing}
        stamps = plan.pts.tolist() if plan.restamped else None
        skips, whole = context.name in _SKIPS_EXACTLY, True
        packets, done = iter(packets), 0
        for run in runs_of(plan, frames.missing):
            if done:
                context.flush_buffers()
            together = chain(islice(packets, run.begin - done, run.end - done), [None])
            for position, packet in enumerate(together, run.begin):
                if packet is not None and stamps:
                    packet.pts, packet.dts = stamps[position], None
                if skips and packet is not None and (position in needed) is not whole:
                    whole = not whole
                    context.skip_frame = "DEFAULT" if whole else "NONREF"
                # the frames get no name: kept until the next are there, they would take more of the processor's cache
                if not _put_planned(context, decode_packet(context, packet, self.errors), run.first, wanted, frames):
                    return False
            done = run.end
        return not frames.missing

    @contextmanager
    def _packets(self, unpack: bool = False) -> Iterator[tuple[av.VideoStream, Iterator[av.Packet]]]:
        """The opened track, and its packets in decoding order, once."""
        if not isinstance(self.media, str | bytes):
            self.media.seek(0)
        try:
            with open_video(self.source, self.media, is_webm=self.is_webm) as (container, stream):
                packets = self._demux(container, stream)
                yield stream, unpacked(stream, packets) if unpack else packets
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

    def _check_length(self, stream: av.VideoStream, index: PacketIndex) -> None:
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
    def _indexed(self) -> Iterator[tuple[av.VideoStream, PacketIndex]]:
        """The opened track, and what there is to know of its packets."""
        with self._packets() as (stream, packets):
            index = index_packets(self.source, stream.codec_context, packets)
            self._check_length(stream, index)
            if index.unpack and index.kept is not None:
                index = index_packets(self.source, stream.codec_context, unpacked(stream, index.kept), unpack=True)
            if not index.unpack or index.kept is not None:
                yield stream, index
                return
        with self._packets(unpack=True) as (stream, packets):
            yield stream, index_packets(self.source, stream.codec_context, packets, unpack=True)


def decode_packet(
    context: av.VideoCodecContext, packet: av.Packet | None, errors: list[tuple[int, str, str]]
) -> tuple[list[av.VideoFrame], str | None]:
    """The frames that come out, and the first error that FFmpeg logs. A packet without a picture may well fail."""
    try:
        decoded = context.decode(packet)
    except av.error.InvalidDataError:
        if packet is None or facts_of(context)(packet):
            raise
        decoded = []
    said = taken(errors) if errors else None
    return decoded, said if said is not None and (packet is None or facts_of(context)(packet)) else None


def _put_planned(
    context: av.VideoCodecContext,
    came: tuple[list[av.VideoFrame], str | None],
    first: int,
    wanted: dict[int, int],
    frames: WantedFrames,
) -> bool:
    decoded, said = came
    if said is not None:
        return False
    for frame in decoded:
        pts = frame.pts
        if pts is None or _has_fields(context, frame):
            return False
        if pts < first:  # an open group of pictures: refers to the group before it, and is not wanted here
            continue
        if frame.is_corrupt or (pts == first and not frame.key_frame):
            return False
        if pts in wanted:
            frames.put(wanted[pts], frame)
    return True


def _seconds(frame: av.VideoFrame) -> str:
    return "an unknown time" if frame.time is None or not isfinite(frame.time) else f"{frame.time:.2f} s"


def _has_fields(context: av.VideoCodecContext, frame: av.VideoFrame) -> bool:
    """Whether a frame may have come as two packets, one a field."""
    return frame.interlaced_frame and context.name in ("h264", "hevc")
