"""Whether a file is whole: as long as its container says, with tables of a size that can be, and no play list."""

import os
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from .reading_limits import LIMITS, VideoDecodeError

_PLAY_LISTS = re.compile(
    rb"\s*(?:\xef\xbb\xbf)?\s*"
    rb"(?:(?P<HLS>#EXTM3U)|(?P<concat>ffconcat)|(?P<DASH>(?:<\?xml.{,1000})?<MPD\b)|(?P<SDP>v=0\r?\n))",
    re.DOTALL,
)
_BOXES = set(b"LIST RIFF JUNK idx1 ftyp styp moov moof mdat mfra free skip wide uuid udta meta sidx pdin".split())
_TABLES_IN = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}  # MP4 boxes that hold boxes
_ASF_HEADER, _ASF_DATA = (bytes.fromhex(id) for id in ("3026b2758e66cf11a6d900aa0062ce6c",
                                                       "3626b2758e66cf11a6d900aa0062ce6c"))  # fmt: skip
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"
_PNG = b"\x89PNG\r\n\x1a\n"


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
    if found := _PLAY_LISTS.match(head):
        problem = f"a play list ({found.lastgroup}), which names other files or addresses; none of them was opened"
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
