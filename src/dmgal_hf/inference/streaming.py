"""Long and endless videos: frames in the order they are shown, and the windows that share them."""

import contextlib
import io
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import av
import torch
from av.video.reformatter import VideoReformatter

from ..model.kept_supports import DmgalSupport
from ..model.modeling_dmgal import DmgalModel
from ..model.reading_limits import VideoDecodeError, one_error
from ..model.still_pictures import video_behind_picture
from ..model.video_files import URL, ffmpeg_errors, open_video
from ..model.video_pixels import upright_rgb
from ..model.video_stream import decode_packet
from ..model.whole_files import check_whole

FRAMES_TOGETHER = 16  # in one pass through the backbone: more cost memory and are not faster


class StreamedLabel(NamedTuple):
    """
    The answer for one window: `start` and `end` in seconds from the first frame, the best label and its score.

    Example:

    ```python
    >>> from dmgal_hf import StreamedLabel

    >>> start, end, label, score = StreamedLabel(0.5, 2.5, "lift", 0.93)  # what clf.stream(...) yields
    >>> label
    'lift'
    ```
    """

    start: float
    end: float
    label: str
    score: float


@dataclass
class Frame:
    """
    A frame that windows share: pixel values (3, H, W), replaced by the backbone's maps (h, w, C) once encoded. Then
    `pooled` (C,) is what a text is compared with, `None` for a model without text.
    """

    tensor: torch.Tensor
    encoded: bool = False
    pooled: torch.Tensor | None = None


class Window(NamedTuple):
    """The T sampled frames of the video between two times."""

    start: Fraction
    end: Fraction
    frames: list[Frame]


@dataclass
class Picture:
    """A decoded frame, converted only if a window takes it."""

    source: str
    frame: av.VideoFrame
    reformatter: VideoReformatter

    def clip(self) -> torch.Tensor:
        """(1, 3, H, W) uint8, as `read_frames` gives it."""
        rgb = upright_rgb(self.frame, self.reformatter)
        return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]


def check_seconds(name: str, seconds: Any) -> Fraction:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 1e-3 <= seconds < math.inf:
        raise ValueError(f"{name} must be a number of seconds, at least 0.001, got {seconds!r}")
    return Fraction(seconds).limit_denominator(10**6)


def is_live(video: Any, format: str | None) -> bool:
    """Whether frames may have to be waited for: from a camera, a device, a pipe or the net."""
    if hasattr(video, "read"):
        return not (hasattr(video, "seekable") and video.seekable())
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        is_device = os.path.exists(path) and not os.path.isfile(path)
        return format is not None or is_device or re.match(URL, path) is not None
    return format is not None or isinstance(video, int)


def window_batches(
    video: Any,
    format: str | None,
    window: Fraction,
    stride: Fraction,
    num_frames: int,
    batch_size: int,
    read: Callable[[Picture], torch.Tensor],
) -> Generator[list[Window]]:
    """
    [`sampled_windows`] of a video, `batch_size` at a time; the last batch may have fewer. Where the video is damaged,
    what came before is yielded before the error.
    """
    windows = sampled_windows(decode_in_order(video, format), window, stride, num_frames, read)
    if not is_live(video, format):  # where a thread could wait for ever, and nothing can be read ahead
        windows = read_ahead(windows, batch_size)
    batch = []
    try:
        for complete in windows:
            batch.append(complete)
            if len(batch) == batch_size:
                yield batch
                batch = []
    except VideoDecodeError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def sampled_windows(
    decoded: Iterator[tuple[Fraction, Picture]],
    window: Fraction,
    stride: Fraction,
    num_frames: int,
    read: Callable[[Picture], torch.Tensor],
) -> Generator[Window]:
    """
    Windows of equal length, each as soon as its last frame is there. Of its segments the frame shown at the centre is
    taken; windows that take the same one share it, and `read` makes pixel values of it once.

    Args:
        decoded: what [`decode_in_order`] yields.
        window (`Fraction`): seconds.
        stride (`Fraction`): seconds from the start of a window to the next.
        num_frames (`int`): T.
        read (`Callable`): from a picture to pixel values (3, H, W).
    """
    spacing = window / num_frames
    begun, waiting, complete = 0, deque(), False
    for end, picture in decoded:
        while begun * stride + spacing / 2 < end:
            waiting.append((begun * stride, []))
            begun += 1
        frame = None
        for start, frames in waiting:
            while len(frames) < num_frames and start + (2 * len(frames) + 1) * spacing / 2 < end:
                frame = Frame(read(picture)) if frame is None else frame
                frames.append(frame)
        while waiting and len(waiting[0][1]) == num_frames:
            start, frames = waiting.popleft()
            complete = True
            yield Window(start, start + window, frames)
    if not complete:
        frames = waiting[0][1] if waiting else [Frame(read(picture))]
        yield Window(Fraction(0), end, frames + frames[-1:] * (num_frames - len(frames)))


def in_one_row(windows: list[Window]) -> tuple[list[Frame], list[int]]:
    """
    Frames in such an order that those of every window follow each other, and the place of the first of each window.
    Every frame stands there once if that can be, as where `stride` is a multiple of window / T.
    """
    frames = list({id(frame): frame for window in windows for frame in window.frames}.values())
    place = {id(frame): number for number, frame in enumerate(frames)}
    starts = [place[id(window.frames[0])] for window in windows]
    for start, window in zip(starts, windows):
        if any(place[id(frame)] != start + number for number, frame in enumerate(window.frames)):
            frames = [frame for window in windows for frame in window.frames]
            return frames, list(range(0, len(frames), len(window.frames)))
    return frames, starts


def window_scores(
    score: Callable[..., torch.Tensor],
    model: DmgalModel,
    windows: list[Window],
    support: DmgalSupport,
    text_embeds: torch.Tensor | None,
) -> torch.Tensor:
    """
    What `score`, which is [`score_queries`] or replays it, makes of W windows. Where the backbone sees one frame at a
    time, only frames that no window had before go through it; they keep their maps in place of their pixels.

    Raises `ValueError` for frames of different sizes.
    """
    device = support.features.device
    if not model.frames_are_independent:
        frames = _stack([frame for window in windows for frame in window.frames]).to(device, model.dtype)
        return score(model, support, text_embeds, frames.unflatten(0, (len(windows), -1)))
    frames, starts = in_one_row(windows)
    new = list({id(frame): frame for frame in frames if not frame.encoded}.values())
    for start in range(0, len(new), FRAMES_TOGETHER):
        part = new[start : start + FRAMES_TOGETHER]
        maps, pooled = model.encode_frames(_stack(part).to(device, model.dtype), return_pooled=True)
        for number, frame in enumerate(part):
            # As they lie in memory. Not a view: it would keep the others.
            frame.tensor, frame.encoded = maps[number].movedim(0, -1).clone(), True
            frame.pooled = None if pooled is None else pooled[number].clone()
    scores = [model.score_windows(_stack(frames).movedim(-1, 1), torch.tensor(starts), support).float()]
    if text_embeds is not None:
        pooled = torch.stack([torch.stack([frame.pooled for frame in window.frames]) for window in windows])
        scores.append(model.text_logits(model.embed_videos(pooled), text_embeds).log_softmax(-1))
    return torch.stack(scores, 1)


def _stack(frames: list[Frame]) -> torch.Tensor:
    if len({frame.tensor.shape for frame in frames}) > 1:
        raise ValueError(
            "the frames of the stream come out in different sizes: set do_center_crop=True of the processor"
        )
    return torch.stack([frame.tensor for frame in frames])


def read_ahead(windows: Generator[Window], number: int) -> Generator[Window]:
    """
    The same windows, of which a thread makes up to `number` before they are asked for. Errors come in their turn. The
    thread ends with the iterator, and closes `windows`.
    """
    end, thread = object(), ThreadPoolExecutor(1, "read_ahead")
    is_finalizing = sys.is_finalizing  # `sys` itself may be gone when it is asked
    coming = deque(thread.submit(next, windows, end) for _ in range(number))
    try:
        while (window := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, windows, end))
            yield window
    finally:
        if not is_finalizing():  # else the interpreter has ended the thread
            thread.shutdown(cancel_futures=True)
        windows.close()


def decode_in_order(video: Any, format: str | None) -> Iterator[tuple[Fraction, Picture]]:
    """
    All frames, each with the time it is shown until, in seconds after the first appeared. Of a damaged file those up
    to the damage, and then the error; what comes from a camera or the net may have gaps.
    """
    live = is_live(video, format)
    source, media, format = _stream_source(video, format)
    with one_error(source):
        truncated, media = (None, media) if live else _looked_at(source, media)
        try:
            with open_video(source, media, format) as (container, stream):
                usual = 1 / (stream.average_rate or Fraction(25))
                reformatter = VideoReformatter()
                first = time = picture = None
                for frame in _decoded(container, stream, source, live):
                    stamp = None if frame.pts is None else frame.pts * frame.time_base
                    if picture is not None:
                        # Some old files have time stamps that run back, or none.
                        later = stamp is not None and stamp - first > time
                        time = stamp - first if later else time + usual
                        yield time, picture
                    else:
                        first, time = stamp or Fraction(0), Fraction(0)
                    picture = Picture(source, frame, reformatter)
                if truncated is not None:
                    raise truncated
                if picture is None:
                    raise VideoDecodeError(source, "none of its packets decodes to a frame")
                yield time + usual, picture
        except (av.FFmpegError, VideoDecodeError, OSError) as error:
            if truncated is not None:
                raise truncated from error
            if not live:
                raise
            problem = error.problem if isinstance(error, VideoDecodeError) else f"cannot be read ({error.strerror})"
            raise VideoDecodeError(source, problem, "Check that it is there, and free.") from error


def _decoded(container: Any, stream: av.VideoStream, source: str, live: bool) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        with ffmpeg_errors() as errors:
            frames, said = decode_packet(stream.codec_context, packet, errors)
        if not live and (said is not None or packet.is_corrupt or any(frame.is_corrupt for frame in frames)):
            place = "" if packet.pts is None else f" near {float(packet.pts * packet.time_base):.2f} s"
            raise VideoDecodeError(source, f"damaged{place}: {said or 'a part of it does not decode'}")
        yield from frames


def _looked_at(source: str, media: Any) -> tuple[VideoDecodeError | None, Any]:
    """
    The error for a file that ends before its container says, which FFmpeg takes for a shorter one, or for a single
    picture; and what is to be opened, of a motion photo the video in it.
    """
    begins, behind = 0 if isinstance(media, str) else media.tell(), None
    try:
        with open(media, "rb") if isinstance(media, str) else contextlib.nullcontext(media) as file:
            if begins == 0:
                check_whole(source, file)
                behind = video_behind_picture(source, file)
    except VideoDecodeError as error:
        return error, media
    except OSError:  # av has the error for it
        return None, media
    finally:
        if not isinstance(media, str):
            media.seek(begins)
    return None, media if behind is None else io.BytesIO(behind)


def _stream_source(video: Any, format: str | None) -> tuple[str, Any, str | None]:
    """Name for messages, what av opens, and FFmpeg's format."""
    if isinstance(video, int) and not isinstance(video, bool):
        cameras = {"linux": (f"/dev/video{video}", "v4l2"), "darwin": (str(video), "avfoundation")}
        if sys.platform not in cameras:
            raise ValueError(f"cameras have no numbers on {sys.platform}: pass 'video=NAME' and format='dshow'")
        device, camera_format = cameras[sys.platform]
        return f"camera {video} ({device})", device, format or camera_format
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (bytes, bytearray, memoryview)):
        return "<bytes>", io.BytesIO(video), format
    if isinstance(video, io.TextIOBase):
        raise VideoDecodeError(str(getattr(video, "name", "<text>")), "open for text", "Open the file in mode 'rb'.")
    if hasattr(video, "read"):
        return str(getattr(video, "name", "<file object>")), video, format
    if not isinstance(video, (str, os.PathLike)):
        raise VideoDecodeError(
            "<stream>", f"a stream cannot be a {type(video).__name__}", "Give a path, a URL or the number of a camera."
        )
    path = os.fspath(video)
    if not path or "\0" in path:
        raise VideoDecodeError(repr(path), "no file has such a name", "Give the path of a video.")
    # An absolute path cannot be taken for one of FFmpeg's protocols ("concat:...").
    is_name = format is not None or re.match(URL, path)
    return path, path if is_name else os.path.abspath(path), format
