"""A zip archive as a tree of folders: `FILE.zip#/folder/inside` names what lies in it, and is used like any path.

An archive of a whole data set holds millions of extracted frames. Its directory is read once a process, and kept as
one array of numbers a folder: tens of bytes a frame, where `zipfile` keeps hundreds. Nothing stays open, so processes
and threads may read one archive at the same time, forked or not.
"""

import functools
import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from .reading_limits import LIMITS

LOCAL_HEADER = b"PK\x03\x04"
_ENCRYPTED = 1  # bit of the flags
_STORED, _DEFLATED = 0, 8


@dataclass
class ZipFolder:
    """The files and folders right in one folder of an archive.

    Attributes:
        joined_names (`str`): names of the files in natural order, joined by NUL, which no name can hold.
        places (`np.ndarray` of shape `(files, 4)`, int64):
            offset of its local header, packed size, CRC-32 and unpacked size of each.
        subfolders (`set[str]`): names.
    """

    joined_names: str = ""
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))
    subfolders: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        return self.joined_names.split("\0") if self.joined_names else []


class ZipArchive:
    """What lies in the archive at `path`, as `folders`: path inside, without slashes at its ends -> [`ZipFolder`].

    Raises:
        OSError: the file cannot be read.
        zipfile.BadZipFile: it is no zip archive, or a damaged one.
    """

    def __init__(self, path: str):
        self.path = path
        self.folders = {"": ZipFolder()}
        try:
            self._read_directory()
        except (OSError, zipfile.BadZipFile):
            raise
        except Exception as error:  # of a damaged directory, zipfile raises many kinds
            raise zipfile.BadZipFile(f"damaged: {type(error).__name__}, {error}") from error

    def _read_directory(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            inside: dict[str, dict[str, zipfile.ZipInfo]] = {}
            for info in archive.infolist():  # of two members of one name the later one counts
                inner = posixpath.normpath(f"/{info.filename}").lstrip("/")
                if inner.split("/")[0] == "__MACOSX":  # what macOS keeps about the files
                    continue
                if info.is_dir():
                    self._add_folder(inner)
                    continue
                folder, _, name = inner.rpartition("/")
                inside.setdefault(folder, {})[name] = info
        for folder, members in inside.items():
            self._add_folder(folder)
            names = sorted(members, key=natural_key)
            found = [members[name] for name in names]
            places = [(info.header_offset, info.compress_size, info.CRC, info.file_size) for info in found]
            self.folders[folder].joined_names = "\0".join(names)
            self.folders[folder].places = np.array(places, np.int64)

    def _add_folder(self, folder: str) -> None:
        if folder not in self.folders:
            self.folders[folder] = ZipFolder()
            parent, _, name = folder.rpartition("/")
            self._add_folder(parent)
            self.folders[parent].subfolders.add(name)

    def find(self, inner: str) -> np.ndarray:
        """Places of the files right in a folder, (files, 4), or of one file, (1, 4); else a FileNotFoundError."""
        if inner in self.folders:
            return self.folders[inner].places
        folder, _, name = inner.rpartition("/")
        names = self.folders[folder].names if folder in self.folders else []
        if name not in names:
            raise FileNotFoundError(f"the archive {self.path} holds no {inner!r}")
        return self.folders[folder].places[[names.index(name)]]

    def read(self, source: str, places: np.ndarray) -> Iterator[bytes]:
        """
        The contents of members, one by one in the order of `places`, some rows of those of a [`ZipFolder`].

        Raises:
            OSError: the file cannot be read.
            zipfile.BadZipFile: a member is damaged, encrypted, or packed otherwise than by deflate.
            VideoDecodeError: a member is larger than `LIMITS` allows; `source` names it.
        """
        with open(self.path, "rb") as file:
            for offset, packed_size, checksum, size in places.tolist():
                LIMITS.check(source, "unpacked_bytes", max(packed_size, size))
                yield _read_member(file, offset, packed_size, checksum, size)


def _read_member(file: BinaryIO, offset: int, packed_size: int, checksum: int, size: int) -> bytes:
    file.seek(max(offset, 0))
    header = file.read(30)
    if len(header) < 30 or header[:4] != LOCAL_HEADER:
        raise zipfile.BadZipFile("nothing lies where the directory of the archive says")
    flags, method = struct.unpack("<2H", header[6:10])
    if flags & _ENCRYPTED or method not in (_STORED, _DEFLATED):
        raise zipfile.BadZipFile("encrypted, or packed otherwise than by deflate")
    file.seek(sum(struct.unpack("<2H", header[26:])), os.SEEK_CUR)  # its name, and extra fields
    data = file.read(packed_size)
    try:
        if method == _DEFLATED:  # one byte more than it should have, which the checksum will tell
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise zipfile.BadZipFile(str(error)) from error
    if zlib.crc32(data) != checksum:
        raise zipfile.BadZipFile("wrong checksum")
    return data


def split_zip_path(path: str) -> tuple[str, str] | None:
    """
    `FILE.zip#/folder/inside` as (`FILE.zip`, `folder/inside`); `None` for any other path, and for a file that is
    called so.
    """
    match = re.fullmatch(r"(.+?\.zip)#/*(.*?)/*", path, re.DOTALL | re.IGNORECASE)
    is_place = match is not None and os.path.isfile(match[1]) and not os.path.lexists(path)
    return (match[1], match[2]) if is_place else None


def open_zip(path: str) -> ZipArchive:
    """The archive at `path`, whose directory is read once a process. Raises as [`ZipArchive`]."""
    state = os.stat(path)
    return _read_directory(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read_directory(path: str, size: int, mtime_ns: int) -> ZipArchive:
    return ZipArchive(path)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts frame2.jpg before frame10.jpg; equal numbers by their text, so that the order is total."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
