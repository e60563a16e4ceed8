"""
Videos that lie elsewhere: http(s) addresses, and what fsspec opens: "hf://...", "s3://...", "zip://a.mp4::FILE.zip".
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .reading_limits import LIMITS, VideoDecodeError

DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


def is_elsewhere(path: str) -> bool:
    """Whether `path` is an address or one of fsspec's; a file that is here is none."""
    named = re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) or "::" in path
    return _is_url(path) or (bool(named) and not os.path.lexists(path))


def fetch(path: str) -> BinaryIO:
    """What lies there, in a temporary file. Raises VideoDecodeError where it cannot be had."""
    parts_of, problem = (_download, "download failed") if _is_url(path) else (_open, "cannot be fetched")
    try:
        with parts_of(path) as parts:
            return on_disk(path, parts)
    except VideoDecodeError:
        raise
    except Exception as error:  # of each file system, and of each major version of the hub's client, others
        raise VideoDecodeError(path, f"{problem} ({error})", "Check the address and the access to it.") from error


def _is_url(path: str) -> bool:
    return re.match("https?://", path) is not None


@contextmanager
def _download(url: str) -> Iterator[Iterable[bytes]]:
    from huggingface_hub import get_session

    with get_session().stream("GET", url, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True) as response:
        response.raise_for_status()
        yield response.iter_bytes(2**20)


@contextmanager
def _open(path: str) -> Iterator[Iterable[bytes]]:
    import fsspec

    with fsspec.open(path, "rb") as file:
        yield iter(lambda: file.read(2**20), b"")


def on_disk(source: str, parts: Iterable[bytes]) -> BinaryIO:
    """A file without a name, which goes with the last reference to it."""
    file, size = tempfile.TemporaryFile(), 0  # noqa: SIM115
    for part in parts:
        size += file.write(part)
        LIMITS.check(source, "downloaded_bytes", size)
    return file
