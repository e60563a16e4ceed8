"""Where reading ends: the one error of a video that cannot be read, and how much of one is taken before it is refused.

A small file may claim pictures, tables or unpacked bytes that fill the memory of a machine. No real video comes near
the limits. Who has one that does raises a limit, once in each process that reads:

    from dmgal_hf.model.reading_limits import LIMITS
    LIMITS.pixels = 100_000_000
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_GO_ON = "Replace the file, or leave it out of the index."


class VideoDecodeError(ValueError):
    """
    A video that cannot be read. `source` is its path or URL, or "<bytes>"; None, as is `problem`, where a worker of
    torch's data loader hands the error on, which gives it the message alone.

    Example:

    ```python
    >>> from dmgal_hf import DmgalVideoProcessor, VideoDecodeError

    >>> try:
    ...     DmgalVideoProcessor()("nowhere.mp4")
    ... except VideoDecodeError as error:
    ...     print(error.source)
    nowhere.mp4
    ```
    """

    def __init__(self, source: str, problem: str | None = None, remedy: str = _GO_ON):
        super().__init__(source if problem is None else f"{source}: {problem}. {remedy}")
        self.source = None if problem is None else source
        self.problem, self.remedy = problem, remedy

    def __reduce__(self):  # processes send their errors to each other
        return type(self), (str(self),) if self.problem is None else (self.source, self.problem, self.remedy)


class FrameIndexError(IndexError):
    """A frame was asked for that the clip does not have. The clip itself is sound."""


@contextmanager
def one_error(source: str) -> Iterator[None]:
    """
    Turns whatever a library raises over a damaged or hostile file into a VideoDecodeError that names `source`:
    decoders, unpackers and picture readers raise nearly every exception there is.
    """
    try:
        yield
    except (VideoDecodeError, FrameIndexError):
        raise
    except Exception as error:
        problem = f"not a readable video ({type(error).__name__}: {error})"
        raise VideoDecodeError(source, problem) from error


@dataclass
class ReadingLimits:
    """
    Attributes:
        pixels (`int`): of one frame or picture. 8K video has up to 8192 x 4320, 35 million.
        packets (`int`): of the video track of a file, a frame or a field each: 18 hours of 60 a second.
        unpacked_bytes (`int`): of one member of a zip archive.
        downloaded_bytes (`int`): of one URL.
    """

    pixels: int = 40_000_000
    packets: int = 4_000_000
    unpacked_bytes: int = 2**30
    downloaded_bytes: int = 2**33

    def check(self, source: str, limit: str, value: int) -> None:
        """Raises VideoDecodeError where `source` has more than the limit of that name allows."""
        allowed = getattr(self, limit)
        if value > allowed:
            name = limit.replace("_", " ")
            problem = f"it has {value:,} {name} or more, and {allowed:,} are the limit"
            remedy = f"If it is sound, raise dmgal_hf.model.reading_limits.LIMITS.{limit}; else replace it."
            raise VideoDecodeError(source, problem, remedy)


LIMITS = ReadingLimits()
