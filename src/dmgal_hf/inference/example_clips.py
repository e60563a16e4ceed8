"""The example clips of a few-shot classifier, read from what users give."""

import math
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..model.video_processing_dmgal import _list_videos, undecoded_column

if TYPE_CHECKING:
    import datasets


def read_classes(
    support: Any, video_column: str, label_column: str, with_text: bool = False
) -> dict[str, dict[str, Any]]:
    """For each label its videos, by the names that errors call them; there may be none of a label `with_text`."""
    import datasets  # takes longer to import than all of dmgal_hf

    if isinstance(support, datasets.DatasetDict):
        raise ValueError(f"`support` is a DatasetDict of the splits {list(support)}: give one of them")
    if isinstance(support, (datasets.Dataset, datasets.IterableDataset)):
        support = _group_rows(support, video_column, label_column)
    if not isinstance(support, Mapping):
        raise ValueError(
            f"`support` is a mapping of labels to videos or a datasets.Dataset, not a {type(support).__name__}"
        )
    if not support:
        raise ValueError("`support` is empty: give at least one class")
    for label in support:
        if not isinstance(label, str):
            raise ValueError(f"the label {label!r} is a {type(label).__name__}: labels are strings")
    return {
        label: {}
        if with_text and (examples is None or (isinstance(examples, (list, tuple)) and not examples))
        else _list_videos(examples, f"support[{label!r}]")
        for label, examples in support.items()
    }


def _group_rows(dataset: "datasets.Dataset", video_column: str, label_column: str) -> dict[str, list[Any]]:
    import datasets

    names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its own
    for name in (video_column, label_column):
        if name not in names:
            raise ValueError(f"the dataset has no column {name!r}; its columns are {names}")
    feature, classes = (dataset.features or {}).get(label_column), {}
    if isinstance(dataset, datasets.IterableDataset):  # one pass
        dataset = undecoded_column(dataset[video_column]).source
        rows = ((row[label_column], row[video_column]) for row in dataset)
    else:
        rows = zip(dataset[label_column], undecoded_column(dataset[video_column]))
    for row, (label, video) in enumerate(rows):
        for name, value in ((label_column, label), (video_column, video)):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                raise ValueError(f"row {row} of the dataset has no {name}")
        name = feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label)
        classes.setdefault(name, []).append(video)
    return classes


def clip_digests(classes: Mapping[str, Mapping[str, Any]], seen: dict[str, str]) -> tuple[str | None, ...]:
    """
    One a clip. Warns of a video that is an example of two classes; `seen` has the labels of clips that are there
    already by their digests.
    """
    digests = []
    for label, videos in classes.items():
        for name, video in videos.items():
            digests.append(digest := _digest(video))
            if digest is not None and seen.setdefault(digest, label) != label:
                shown = os.fspath(video) if isinstance(video, (str, os.PathLike)) else name
                warnings.warn(
                    f"{shown} is an example of {label!r}, and the same video is one of {seen[digest]!r}: the two "
                    "cannot be told apart by it",
                    stacklevel=3,
                )
    return tuple(digests)


def _digest(video: Any) -> str | None:
    """What tells whether two clips are the same video, `None` of arrays, pictures and open files."""
    from ..data.kept_clips import video_digest  # brings `datasets` along

    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    return video_digest(video) if isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)) else None
