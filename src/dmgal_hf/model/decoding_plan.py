"""Which packets have to be decoded for the wanted frames of a clip, where its packets tell that beyond doubt."""

from collections.abc import Iterable
from dataclasses import dataclass

import av
import numpy as np

from .video_packets import KEY, NO_STAMP, PICTURE, SHOWN, PacketIndex

_PLANNED = {"h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1", "mjpeg", "prores"}
_B_VOP = 2


@dataclass
class Plan:
    """
    pts: (packets,) int64, unique among those of frames, which decoded frames carry; shown: (frames,) for each frame
    in the order shown the position of its packet, keys: of the key picture that decoding it starts with, begins: and
    of the first of those without a picture right before that; restamped: the packets carry other stamps.
    """

    pts: np.ndarray
    shown: np.ndarray
    keys: np.ndarray
    begins: np.ndarray
    restamped: bool


def plan_decoding(context: av.VideoCodecContext, index: PacketIndex) -> Plan | None:
    """What the packets tell about the order of frames, or None where they cannot be trusted."""
    pts = index.pts
    if context.name not in _PLANNED:
        return None
    if context.name == "mpeg4":
        pts = _in_vop_order(index.vops)
    elif context.name in ("h264", "hevc") and context.has_b_frames and not _are_reordered(pts):
        return None  # AVI has time stamps of decoding only
    pictures, shown, keys = (np.flatnonzero(index.facts & fact) for fact in (PICTURE, SHOWN, KEY))
    if pts is None or not len(shown) or not len(keys):
        return None
    begins = np.append(-1, pictures)[np.searchsorted(pictures, keys)] + 1
    if begins[0] != 0:
        return None
    order = np.argsort(pts[keys], kind="stable")  # fast, as they are nearly in order
    keys, begins = keys[order], begins[order]
    shown = shown[np.argsort(pts[shown], kind="stable")]
    stamps, key_stamps = pts[shown], pts[keys]
    if stamps[0] == NO_STAMP or key_stamps[0] == NO_STAMP or (stamps[1:] == stamps[:-1]).any():
        return None
    starts = np.searchsorted(key_stamps, stamps, "right") - 1
    if starts[0] < 0:  # shown before the first picture that can be decoded
        return None
    return Plan(pts, shown, keys[starts], begins[starts], pts is not index.pts)


def _are_reordered(pts: np.ndarray) -> bool:
    return bool(((pts[:-1] > pts[1:]) & (pts[1:] != NO_STAMP)).any())


@dataclass
class Run:
    """Packets begin to end - 1 are decoded together; frames before the stamp `first` refer to what came before."""

    begin: int
    end: int
    first: int


def runs_of(plan: Plan, indices: Iterable[int]) -> list[Run]:
    runs: list[Run] = []
    for index in sorted(indices):
        begin, end = int(plan.begins[index]), int(plan.shown[index]) + 1
        if not runs or begin > runs[-1].end:
            runs.append(Run(begin, end, int(plan.pts[plan.keys[index]])))
        else:
            runs[-1].end = max(runs[-1].end, end)
    return runs


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
