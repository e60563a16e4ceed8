"""Files of one picture, which FFmpeg reads as a clip of one frame. Behind that of a motion photo lies a video."""

import io
import os
import re
from typing import BinaryIO

from .reading_limits import VideoDecodeError

_STILLS = re.compile(
    rb"(?P<PNG>\x89PNG\r\n\x1a\n(?!.{,4000}acTL))"  # animated ones have a mark before their pictures
    rb"|(?P<WebP>RIFF....WEBP(?!.{,4000}ANIM))"
    rb"|(?P<BMP>BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)"
    rb"|(?P<TIFF>II\*\0|MM\0\*)"
    rb"|(?P<HEIF>....ftyp(?:hei[cxms]|mif1))|(?P<AVIF>....ftypavif)"  # sequences have other brands
    rb"|(?P<JPEG>\xff\xd8\xff)",
    re.DOTALL,
)
_REMEDY = "Give a video; for a clip of one frame a list, [picture], or a folder that holds the picture."


def video_behind_picture(source: str, file: BinaryIO) -> bytes | None:
    """
    The MP4 behind the still of a motion photo; `None` for a file that is no still picture. (GIF, which may hold one
    frame as a video may, is none.)

    Raises:
        VideoDecodeError: a still picture and nothing else.
    """
    file.seek(0)
    head = file.read(4096)
    still = _STILLS.match(head)
    if still is None:
        return None
    end, many = _end_of_jpeg(file) if still["JPEG"] else (len(still[0]), True)
    file.seek(end)
    behind = file.read(2)
    if behind == b"\xff\xd8" and not many:  # a stream of JPEGs
        return None
    behind += file.read()
    found = re.search(rb"\0\0\0[\x10-\x40]ftyp[ -~]{4}", behind)
    if found is None:
        raise VideoDecodeError(source, f"a single picture ({still.lastgroup}), no video", _REMEDY)
    return behind[found.start() :]


def _end_of_jpeg(file: BinaryIO) -> tuple[int, bool]:
    """Where the first picture ends, and whether it says that others follow it (as previews and gain maps do)."""
    position, many, marker = 2, False, b""
    while marker != b"\xff\xda":  # of the compressed picture
        file.seek(position)
        head = file.read(8)
        marker, length = head[:2], int.from_bytes(head[2:4], "big")
        if len(head) < 8 or length < 2:
            return file.seek(0, os.SEEK_END), many
        many = many or (marker == b"\xff\xe2" and head[4:] == b"MPF\0")
        position += 2 + length
    file.seek(position)
    before = b""
    while part := file.read(io.DEFAULT_BUFFER_SIZE * 8):
        at = (before + part).find(b"\xff\xd9")
        if at >= 0:
            return position - len(before) + at + 2, many
        position, before = position + len(part), part[-1:]
    return position, many
