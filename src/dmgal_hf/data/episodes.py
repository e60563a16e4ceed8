"""Episodes: which videos of a dataset are the support and the query of each few-shot task.

An episode names videos by their row number, so it stays small and reading videos remains the reader's concern.
[`EpisodeSource`] draws endlessly (training), [`sample_episodes`] writes the first episodes of a source down as a
`datasets.Dataset` (evaluation), and [`load_episodes`] and [`check_episodes`] take the list of somebody else.
"""

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Column, Dataset, DatasetDict, DatasetInfo, Features, List, Value, load_dataset, load_from_disk
from tqdm.auto import tqdm

EPISODE_FEATURES = Features(
    {name: List(Value("int64")) for name in ("support", "support_labels", "query", "query_labels")}
)
_EPISODES_A_READ = 2048  # of a list, so that one of any length takes no more memory
_WORDS_A_READ = 64
_LARGEST_WORD = 2**64 - 1


class EpisodeSource:
    """
    An endless, indexable source of episodes: `source[i]` is episode `i`, for any `i` from 0 to 2**64 - 1.

    An episode is a pure function of `(labels, way, shot, query, seed, i)`, the same on every machine. Nothing is
    remembered between two draws: processes and workers may share a source, take any numbers they like in any order,
    and go on at any episode without replaying. Far episodes cost the same as near ones.

    Every pair `(seed, i)` keys its own Philox 4x64 stream (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"), so that no two pairs share random numbers. Only numpy's raw 64-bit words are used: numpy guarantees
    those for ever, but not what `Generator.choice` and `Generator.permutation` make of them (NEP 19).

    Args:
        labels (sequence of `int`): the class of each row of the video dataset: a `datasets` column, list, numpy array
            or tensor of shape (number of videos,).
        way (`int`, defaults to 5): classes in an episode, at least 2.
        shot (`int`, defaults to 1): support videos a class, at least 1.
        query (`int`, defaults to 1): query videos a class, at least 1.
        seed (`int`, defaults to 0): 0 to 2**64 - 1.
        class_names (sequence of `str`, *optional*): the name of label 0, 1, ...; only used in error messages.

    Raises:
        ValueError: for labels that are empty, negative or no integers, for fewer classes than `way`, for classes with
            fewer than `shot + query` videos (all of them named), and for numbers out of range.

    Example:

    ```python
    >>> from dmgal_hf.data import EpisodeSource

    >>> labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]  # the class of each row of a dataset of videos
    >>> episode = EpisodeSource(labels, way=2, shot=1, query=1, seed=0)[41]
    >>> episode["support_labels"], episode["query_labels"]
    ([0, 1], [0, 1])
    ```
    """

    def __init__(
        self,
        labels: Sequence[int],
        way: int = 5,
        shot: int = 1,
        query: int = 1,
        seed: int = 0,
        class_names: Sequence[str] | None = None,
    ):
        self.way = _integer("way", way, at_least=2)
        self.shot = _integer("shot", shot, at_least=1)
        self.query = _integer("query", query, at_least=1)
        self.seed = _integer("seed", seed, at_least=0)
        labels = _label_array(labels)
        classes, counts = np.unique(labels, return_counts=True)
        self._check_classes(classes, counts, class_names)
        # Rows class after class, ascending within a class: class c holds _rows[_starts[c] : _starts[c] + _counts[c]].
        self._rows = np.argsort(labels, kind="stable")
        self._counts = counts.tolist()
        self._starts = (np.cumsum(counts) - counts).tolist()

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """
        Draws episode `index`.

        Returns:
            `dict` of `list[int]`: `support` (way * shot row numbers, class after class) with `support_labels`, and
            `query` (way * query row numbers) with `query_labels`; labels are 0..way-1 in the order the classes were
            drawn.

        Raises:
            IndexError: if `index` is negative or above 2**64 - 1.
        """
        index = operator.index(index)
        if not 0 <= index <= _LARGEST_WORD:
            raise IndexError(f"episode {index} does not exist: episodes are numbered from 0 to 2**64 - 1")
        words = _random_words(self.seed, index)
        support, query = [], []
        for drawn_class in _draw_distinct(words, len(self._counts), self.way):
            start = self._starts[drawn_class]
            places = _draw_distinct(words, self._counts[drawn_class], self.shot + self.query)
            rows = [int(self._rows[start + place]) for place in places]
            support += rows[: self.shot]
            query += rows[self.shot :]
        return {
            "support": support,
            "support_labels": [label for label in range(self.way) for _ in range(self.shot)],
            "query": query,
            "query_labels": [label for label in range(self.way) for _ in range(self.query)],
        }

    def _check_classes(self, classes: np.ndarray, counts: np.ndarray, class_names: Sequence[str] | None) -> None:
        if class_names is not None and classes[-1] >= len(class_names):
            raise ValueError(f"label {classes[-1]} has no name: class_names holds {len(class_names)}; name all labels")
        if len(classes) < self.way:
            raise ValueError(
                f"{self.way}-way episodes need {self.way} classes, but the labels hold {len(classes)}: "
                f"lower way or use a split with more classes"
            )
        needed = self.shot + self.query
        short = [
            f"{label} ({'' if class_names is None else repr(class_names[label]) + ', '}{count} videos)"
            for label, count in zip(classes.tolist(), counts.tolist(), strict=True)
            if count < needed
        ]
        if short:
            raise ValueError(
                f"{self.shot} shots and {self.query} queries a class need {needed} videos in every class, but "
                f"{len(short)} of {len(classes)} classes have fewer: {', '.join(short)}. "
                f"Lower shot or query, or take these classes out of the dataset"
            )


def sample_episodes(
    labels: Sequence[int],
    way: int = 5,
    shot: int = 1,
    query: int = 1,
    num_episodes: int = 10_000,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """
    Episodes 0 to `num_episodes - 1` of an [`EpisodeSource`] as an in-memory `datasets.Dataset`.

    Keep it with `save_to_disk`, `to_parquet` or `push_to_hub`, and read it back with [`load_episodes`]. What it was
    drawn from (way, shot, query, seed, number of videos, fingerprint of the labels) stands as JSON in
    `info.description`. Of the three only `save_to_disk` keeps that: `datasets` writes no description into parquet
    files, and what it pushes to the Hub are parquet files.

    Args:
        num_episodes (`int`, defaults to 10,000): at least 1. A longer list starts with the shorter one.
        labels, way, shot, query, seed, class_names: see [`EpisodeSource`].

    Returns:
        `datasets.Dataset`: a row an episode, with columns `support`, `support_labels`, `query` and `query_labels`,
        each `List(Value("int64"))`.

    Raises:
        ValueError: as [`EpisodeSource`], and for `num_episodes` below 1.
    """
    num_episodes = _integer("num_episodes", num_episodes, at_least=1)
    labels = _label_array(labels)
    source = EpisodeSource(labels, way, shot, query, seed, class_names)
    columns = {name: [] for name in EPISODE_FEATURES}
    for index in tqdm(range(num_episodes), desc="Drawing episodes", delay=2):
        for name, values in source[index].items():
            columns[name].append(values)
    description = {
        "way": source.way,
        "shot": source.shot,
        "query": source.query,
        "seed": source.seed,
        "num_videos": len(labels),
        "labels_fingerprint": _labels_fingerprint(labels),
    }
    info = DatasetInfo(description=json.dumps(description), features=EPISODE_FEATURES)
    return Dataset.from_dict(columns, features=EPISODE_FEATURES, info=info)


def load_episodes(
    path_or_repo_id: str | Path, labels: Sequence[int], split: str = "train", revision: str | None = None
) -> Dataset:
    """
    Loads an episode list and checks it against the dataset it is to be used with.

    Args:
        path_or_repo_id (`str` or `Path`): a folder of `save_to_disk` (of a `Dataset` or `DatasetDict`), a parquet
            file, a folder of parquet files, or a dataset repository on the Hub. What exists on disk goes first.
        labels (sequence of `int`): the class of each row of the video dataset, as for [`check_episodes`].
        split (`str`, defaults to `"train"`): which split of a `DatasetDict`, folder or repository; a saved `Dataset`
            and a parquet file hold only one.
        revision (`str`, *optional*): branch, tag or commit of the Hub repository.

    Returns:
        `datasets.Dataset`: the episodes, as [`sample_episodes`] makes them. From parquet and from the Hub they come
        without the labels' fingerprint (see there), and only rows and classes can be checked.

    Raises:
        FileNotFoundError: if nothing readable is found there.
        ValueError: for an unknown split, a `revision` of a local path, and whatever [`check_episodes`] finds.
    """
    path = Path(path_or_repo_id)
    if not path.exists():
        episodes = _load_from_hub(path_or_repo_id, split, revision)
    elif revision is not None:
        raise ValueError(
            f"revision={revision!r} only goes with a Hub repository, but {path} is a local path: leave it out"
        )
    elif path.is_dir():
        episodes = _load_from_folder(path, split)
    elif path.suffix == ".parquet":
        episodes = Dataset.from_parquet(str(path))
    else:
        raise ValueError(f"{path} is no episode list: give a parquet file or a folder written by save_to_disk")
    check_episodes(episodes, labels)
    return episodes


def check_episodes(episodes: Dataset, labels: Sequence[int]) -> None:
    """
    Checks that a list of episodes is sound and fits a dataset. Classes may differ in number of shots and queries.

    Args:
        episodes (`datasets.Dataset`): columns `support`, `support_labels`, `query` and `query_labels`, lists of
            integers; more columns do no harm.
        labels (sequence of `int`): the class of each row of the video dataset, shape (number of videos,).

    Raises:
        ValueError: if a column is missing or holds anything but lists of integers; if the list was drawn from other
            labels (where `info.description` tells); and, naming the first episode at fault, if supports or queries are
            missing or differ in number from their labels; if a row number is out of range; if a video occurs twice in
            an episode; if the episode labels are not 0..way-1, each with a support; if two videos of one episode label
            differ in class, or two of one class in episode label.
    """
    labels = _label_array(labels)
    classes, number = labels.tolist(), 0
    for columns in _read_columns(episodes):
        if len(episodes) == 0:
            raise ValueError("the episode list is empty: draw one with sample_episodes")
        if number == 0:
            _check_fingerprint(episodes.info.description, labels)
        for episode in zip(*(columns[name].lists() for name in EPISODE_FEATURES), strict=True):
            _check_episode(number, *episode, classes)
            number += 1


def episodes_id(episodes: Dataset) -> str:
    """
    A short name for exactly these episodes in this order: 16 hexadecimal digits of the SHA-256 of their contents.

    It depends neither on the way the list was stored nor on its metadata or further columns. Two evaluations with the
    same id were made on the same row numbers.

    Raises:
        ValueError: if a column is missing or holds anything but lists of integers.
    """
    digest = hashlib.sha256()
    for name in EPISODE_FEATURES:
        digest.update(name.encode())
        for part in ("lengths", "values"):
            for columns in _read_columns(episodes, [name]):
                digest.update(getattr(columns[name], part).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def rows_of(episodes: Dataset) -> np.ndarray:
    """The rows that a list names, each once, ascending."""
    parts = [
        np.unique(np.concatenate([columns["support"].values, columns["query"].values]))
        for columns in _read_columns(episodes, ["support", "query"])
    ]
    return np.unique(np.concatenate(parts))


def sizes_of(episodes: Dataset) -> np.ndarray:
    """Number of classes, supports and queries of each episode of a list that was checked: (N, 3) int32."""
    sizes = [
        [1 + np.maximum.reduceat(support.values, support.starts), support.lengths, query.lengths]
        for support, query in (
            (columns["support_labels"], columns["query_labels"])
            for columns in _read_columns(episodes, ["support_labels", "query_labels"])
        )
    ]
    return np.concatenate(sizes, axis=1).T.astype(np.int32)


# Drawing


def _random_words(seed: int, index: int) -> Iterator[int]:
    """The endless stream of 64-bit words that belongs to `(seed, index)`."""
    generator = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    while True:
        yield from generator.random_raw(_WORDS_A_READ).tolist()


def _draw_below(words: Iterator[int], bound: int) -> int:
    """A number below `bound`, each equally likely: words from the last full multiple of `bound` on are dropped."""
    end = 2**64 - 2**64 % bound
    word = next(words)
    while word >= end:
        word = next(words)
    return word % bound


def _draw_distinct(words: Iterator[int], population: int, count: int) -> list[int]:
    """
    `count` different numbers below `population`, in random order: the first steps of a Fisher-Yates shuffle of
    0..population-1, of which only the places that have changed are stored.
    """
    changed = {}
    drawn = []
    for place in range(count):
        other = place + _draw_below(words, population - place)
        drawn.append(changed.get(other, other))
        changed[other] = changed.get(place, place)
    return drawn


# Arguments


def _integer(name: str, value: int, at_least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not at_least <= operator.index(value) <= _LARGEST_WORD:
        raise ValueError(f"{name} must be at least {at_least} and below 2**64, got {value}")
    return operator.index(value)


def _label_array(labels: Sequence[int]) -> np.ndarray:
    """Labels as an int64 array of shape (number of videos,)."""
    if isinstance(labels, Column):
        labels = labels[:]  # one read instead of one a row
    array = np.asarray(labels)
    if array.size == 0:
        raise ValueError("labels are empty: episodes need a dataset with videos")
    if array.ndim != 1:
        raise ValueError(f"labels must hold one integer a video, got an array of shape {array.shape}")
    if array.dtype.kind not in "iu":
        culprits = (
            row for row, label in enumerate(labels) if isinstance(label, bool) or not hasattr(label, "__index__")
        )
        row = next(culprits, 0)
        raise ValueError(
            f"labels must be integers, but row {row} holds {labels[row]!r}: encode the classes as 0, 1, ..."
        )
    if array.min() < 0:
        row = int(np.argmax(array < 0))
        raise ValueError(
            f"labels must not be negative, but row {row} holds {array[row]} ({np.count_nonzero(array < 0)} such rows; "
            f"datasets marks rows without a label with -1): take these rows out first"
        )
    return array.astype(np.int64)


def _labels_fingerprint(labels: np.ndarray) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()[:16]


# Loading


def _load_from_folder(path: Path, split: str) -> Dataset:
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(str(path))
        if split not in splits:
            raise ValueError(f"{path} has no split {split!r}: it holds {', '.join(splits)}")
        return splits[split]
    if (path / "state.json").is_file():
        return load_from_disk(str(path))
    if not any(path.rglob("*.parquet")):
        raise FileNotFoundError(
            f"{path} holds no episode list: neither a dataset saved by save_to_disk nor parquet files"
        )
    return load_dataset(str(path), split=split)


def _load_from_hub(repo_id: str | Path, split: str, revision: str | None) -> Dataset:
    missing = f"no episode list at {str(repo_id)!r}: there is no such file or folder"
    # A repository is "name" or "owner/name"; anything else can only have been meant as a path.
    is_path = isinstance(repo_id, Path) or repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~"))
    if is_path or repo_id.endswith(".parquet"):
        raise FileNotFoundError(f"{missing}; check the path")
    try:
        return load_dataset(repo_id, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{missing}, nor could such a dataset be read from the Hub ({error}); "
            f"check the name, your access to it and the connection"
        ) from error


# Checking


class _ListColumn(NamedTuple):
    """A column of lists: all values in one array, and how many each episode has."""

    values: np.ndarray  # (total,) int64
    lengths: np.ndarray  # (number of episodes,) int64

    @property
    def starts(self) -> np.ndarray:
        """The place of the first value of each episode."""
        return np.cumsum(self.lengths) - self.lengths

    def lists(self) -> Iterator[list[int]]:
        values = iter(self.values.tolist())
        return (list(islice(values, length)) for length in self.lengths.tolist())


def _read_columns(
    episodes: Dataset, names: Sequence[str] = tuple(EPISODE_FEATURES)
) -> Iterator[dict[str, _ListColumn]]:
    """Columns of some episodes after the other, whatever the format or selection set on the dataset."""
    if not isinstance(episodes, Dataset):
        hint = f": choose one of its splits {', '.join(episodes)}" if isinstance(episodes, DatasetDict) else ""
        raise ValueError(f"episodes must be a datasets.Dataset, got {type(episodes).__name__}{hint}")
    missing = [name for name in EPISODE_FEATURES if name not in episodes.column_names]
    if missing:
        raise ValueError(
            f"the episode list lacks the column(s) {', '.join(missing)}; it has {', '.join(episodes.column_names)}"
        )
    table = episodes.select_columns(list(names)).with_format("arrow")
    for first in range(0, max(len(episodes), 1), _EPISODES_A_READ):
        part = table[first : first + _EPISODES_A_READ]
        yield {name: _read_list_column(name, part[name]) for name in names}


def _read_list_column(name: str, column: pa.ChunkedArray) -> _ListColumn:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"column {name} of the episode list must hold lists of integers, got {kind}")
    values = pc.list_flatten(column)
    if column.null_count or values.null_count:
        raise ValueError(f"column {name} of the episode list holds empty (null) entries: every list must be complete")
    lengths = pc.list_value_length(column)
    return _ListColumn(values.cast(pa.int64()).to_numpy(), lengths.cast(pa.int64()).to_numpy())


def _check_fingerprint(description: str, labels: np.ndarray) -> None:
    here = _labels_fingerprint(labels)
    # concatenate_datasets joins the descriptions of its parts by an empty line.
    for paragraph in description.split("\n\n"):
        try:
            origin = json.loads(paragraph)
        except json.JSONDecodeError:
            continue  # a text of somebody's own
        if not isinstance(origin, dict) or "labels_fingerprint" not in origin:
            continue
        if origin["labels_fingerprint"] != here:
            raise ValueError(
                f"the episode list was drawn from another dataset: its labels ({origin.get('num_videos')} videos) "
                f"have fingerprint {origin['labels_fingerprint']}, those given here ({len(labels)} videos) {here}. "
                f"Use the dataset and split it was made for, in the same order, or draw a new list"
            )


def _check_episode(
    number: int,
    support: list[int],
    support_labels: list[int],
    query: list[int],
    query_labels: list[int],
    classes: list[int],
) -> None:
    """`number` is that of the episode in the list, `classes` are those of all rows of the dataset."""
    for part, rows, labels in (("support", support, support_labels), ("query", query, query_labels)):
        if len(rows) != len(labels):
            raise ValueError(
                f"episode {number} has {len(rows)} {part} videos but {len(labels)} {part}_labels: give one label a "
                "video"
            )
        if not rows:
            raise ValueError(f"episode {number} has no {part} videos: take it out of the list")
        for row in rows:
            if not 0 <= row < len(classes):
                raise ValueError(
                    f"{part} row {row} in episode {number} is out of range: the dataset has {len(classes)} videos; "
                    "use the dataset and split the list was made for"
                )
    way = len(set(support_labels))
    if way < 2 or set(support_labels) != set(range(way)):
        raise ValueError(
            f"the support labels of episode {number} are {sorted(set(support_labels))}: they must be 0..way-1, at "
            f"least 2, and each has a support"
        )
    for label in query_labels:
        if not 0 <= label < way:
            raise ValueError(
                f"query label {label} in episode {number} has no support: the labels there are {list(range(way))}"
            )
    remedy = "the list is broken or was made for another dataset, split or order of rows"
    seen, of_label, of_class = set(), {}, {}  # rows; the first row of a label; the first row and label of a class
    for row, label in zip(support + query, support_labels + query_labels, strict=True):
        if row in seen:
            raise ValueError(f"row {row} occurs twice in episode {number}: an episode must not repeat a video")
        seen.add(row)
        first = of_label.setdefault(label, row)
        if classes[first] != classes[row]:
            raise ValueError(
                f"rows {first} and {row} share label {label} of episode {number}, but the dataset has them in classes "
                f"{classes[first]} and {classes[row]}: {remedy}"
            )
        first, first_label = of_class.setdefault(classes[row], (row, label))
        if first_label != label:
            raise ValueError(
                f"rows {first} and {row} have labels {first_label} and {label} in episode {number}, but the dataset "
                f"has both in class {classes[row]}: {remedy}"
            )
