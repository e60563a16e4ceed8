"""Videos that lie elsewhere, by the paths of fsspec: "hf://...", "s3://...", "zip://a.mp4::https://.../archive.zip"."""

import os
import re
from collections.abc import Iterator

from .reading_limits import VideoDecodeError


def is_elsewhere(path: str) -> bool:
    """Whether `path` is one of fsspec's; http(s) addresses and files that are here are none."""
    named = re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE) and not re.match("https?://", path)
    return bool(named or "::" in path) and not os.path.lexists(path)


def fetch(path: str) -> Iterator[bytes]:
    """The bytes of the file, part by part. Raises VideoDecodeError where they cannot be had."""
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            yield from iter(lambda: file.read(2**20), b"")
    except Exception as error:  # each file system has its own, and some have to be installed
        raise VideoDecodeError(path, f"cannot be fetched ({error})", "Check the path and the access to it.") from error
