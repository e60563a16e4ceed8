"""Files and folders that are there whole or not at all: written aside, under a hidden name, and renamed."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """
    Gives a path to write a file to, which takes the place of `path` at the end; after an error what was there stays.
    Several processes may write the same file at the same time.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.aside")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Writes a text file, in UTF-8."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def replace_folder(folder: Path, aside: Path) -> None:
    """
    Renames `aside` to `folder`, and removes the folder of that name. A folder cannot be renamed over another: a reader
    may find none for a moment, but never half of one, and a process that is killed then leaves `.<name>.old`.
    """
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
