"""What the packets of a track hold, which tells how many frames there are and where decoding may begin."""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

from .reading_limits import LIMITS

NO_STAMP = -(2**63)
PICTURE, SHOWN, KEY = 1, 2, 4  # what a packet is: holds a picture, yields a frame, can be begun at
_KEPT_BYTES = 2**25  # packets of a clip of more are read again where they are decoded
_VOP = b"\x00\x00\x01\xb6"
_MAX_NOT_CODED_VOP = 19  # bytes; FFmpeg takes no longer one for the placeholder of a packed B-frame


@dataclass
class PacketIndex:
    """
    What there is to know of the packets of a clip, in decoding order.

    pts: (packets,) int64, NO_STAMP where there is none; facts: (packets,) uint8, PICTURE | SHOWN | KEY; vops:
    (packets,) int8, types of MPEG-4 pictures, -1 where not exactly one is there; unpack: the packets are, or are to
    be, those of `unpacked`; duration: of the last packet, in units of pts; kept: the packets, None where they take
    more than _KEPT_BYTES.
    """

    pts: np.ndarray
    facts: np.ndarray
    vops: np.ndarray
    unpack: bool
    duration: int | None
    kept: list[av.Packet] | None


def index_packets(
    source: str, context: av.VideoCodecContext, packets: Iterable[av.Packet], unpack: bool = False
) -> PacketIndex:
    facts_in, find_vops = facts_of(context), context.name == "mpeg4"
    pts, facts, vops, last = array("q"), bytearray(), [], None
    kept, size = [], 0

    def note() -> None:
        pts.extend([NO_STAMP if (stamp := packet.pts) is None else stamp for packet in kept])
        LIMITS.check(source, "packets", len(pts))
        facts.extend(map(facts_in, kept))
        if find_vops and kept:
            vops.append(_find_vops(kept))

    for last in packets:
        kept.append(last)
        size += last.size
        if size > _KEPT_BYTES:
            note()
            kept, size = [], 0
    note()
    packed = any((counts > 1).any() for counts, _ in vops)
    return PacketIndex(
        np.frombuffer(pts, np.int64),
        np.frombuffer(facts, np.uint8),
        np.concatenate([types for _, types in vops]) if vops else np.empty(0, np.int8),
        packed or unpack,
        last and last.duration,
        kept if len(kept) == len(pts) else None,
    )


def unpacked(stream: av.VideoStream, packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """MPEG-4 part 2 with one picture (VOP) a packet: old Xvid files pack a P-frame with the B-frame that follows."""
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream)
    for packet in chain(packets, [None]):
        yield from unpack.filter(packet)


def _find_vops(packets: list[av.Packet]) -> tuple[np.ndarray, np.ndarray]:
    """
    How many VOPs begin in each packet, and the type of the one; -1 where there are none or several, where the packet
    ends before it is told, and where no picture is coded.

    All packets are searched at once: one by one it takes as long as decoding two frames.
    """
    sizes = np.array([packet.size for packet in packets])
    ends = np.cumsum(sizes)
    data = np.frombuffer(b"".join([*packets, _VOP]), np.uint8)
    pairs = data[: len(data) // 2 * 2].view("<u2")  # half as many to compare; a VOP has 00 01 or 01 B6 as one of them
    found = pairs == 0x0100
    found |= pairs == 0xB601
    found = np.flatnonzero(found)
    starts = 2 * found - np.where(pairs[found] == 0x0100, 1, 2)
    starts = starts[(starts >= 0) & (starts <= ends[-1] - len(_VOP))]
    starts = starts[(data[starts[:, None] + np.arange(len(_VOP))] == np.frombuffer(_VOP, np.uint8)).all(1)]
    owners, after = np.searchsorted(ends, starts, "right"), starts + len(_VOP)
    inside = after <= ends[owners]  # not half in the packet that follows
    owners, after = owners[inside], after[inside]
    counts, types = np.bincount(owners, minlength=len(packets)), np.full(len(packets), -1, np.int8)
    types[owners] = np.where(after < ends[owners], data[after] >> 6, -1)
    types[(counts != 1) | (sizes <= _MAX_NOT_CODED_VOP)] = -1
    return counts, types


def facts_of(context: av.VideoCodecContext) -> Callable[[av.Packet], int]:
    """From a packet of this codec to PICTURE | SHOWN | KEY."""
    if context.name in ("h264", "hevc"):
        return _UnitFacts(context.name, context.extradata or b"")
    if context.name in ("vp8", "vp9"):
        return _vp8_facts if context.name == "vp8" else _vp9_facts
    return _plain_facts


def _plain_facts(packet: av.Packet, shown: bool = True) -> int:
    facts = PICTURE | SHOWN if shown and not packet.is_discard else PICTURE
    return facts | KEY if packet.is_keyframe else facts


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
        picture, found, data = PICTURE | SHOWN * (not packet.is_discard), 0, memoryview(packet)
        begins = 0 < self.width < len(data) and data[self.width] >> self.shift & self.mask in self.slices
        if begins and not packet.is_keyframe:  # nearly every packet
            return picture
        for header in self._headers(data):
            unit = header >> self.shift & self.mask
            if unit in self.slices and packet.is_keyframe and unit not in self.keys:
                found = picture
            elif unit in self.slices:
                return picture | KEY * packet.is_keyframe
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
