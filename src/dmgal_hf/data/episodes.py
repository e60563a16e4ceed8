"""Episodes: which videos of a dataset are the support and the query of each few-shot task.

An episode names videos by their row number, so it stays small and reading videos remains the reader's concern.
[`EpisodeSource`] draws endlessly (training), [`sample_episodes`] writes the first episodes of a source down as a
`datasets.Dataset` (evaluation), and [`load_episodes`] and [`check_episodes`] take the list of somebody else.
"""

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
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
    for columns in _read_columns(episodes):
        if len(episodes) == 0:
            raise ValueError("the episode list is empty: draw one with sample_episodes")
        if columns["support"].first == 0:
            _check_fingerprint(episodes.info.description, labels)
        for part in ("support", "query"):
            _check_lengths(part, columns[part], columns[f"{part}_labels"])
            _check_rows(part, columns[part], len(labels))
        _check_way(columns["support_labels"], columns["query_labels"])
        _check_classes_agree(columns, labels)


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
    first: int  # number of the first of these episodes in the list

    @property
    def episode(self) -> np.ndarray:
        """The episode of each value, shape (total,), counted from the first of these."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """The place of the first value of each episode."""
        return np.cumsum(self.lengths) - self.lengths


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
        yield {name: _read_list_column(name, part[name], first) for name in names}


def _read_list_column(name: str, column: pa.ChunkedArray, first: int) -> _ListColumn:
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise ValueError(f"column {name} of the episode list must hold lists of integers, got {kind}")
    values = pc.list_flatten(column)
    if column.null_count or values.null_count:
        raise ValueError(f"column {name} of the episode list holds empty (null) entries: every list must be complete")
    lengths = pc.list_value_length(column)
    return _ListColumn(values.cast(pa.int64()).to_numpy(), lengths.cast(pa.int64()).to_numpy(), first)


def _first(mask: np.ndarray) -> int | None:
    """The first place where `mask`, shape (total,), is true; `None` without such."""
    places = np.flatnonzero(mask)
    return int(places[0]) if len(places) else None


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


def _check_lengths(part: str, rows: _ListColumn, labels: _ListColumn) -> None:
    if (episode := _first(rows.lengths != labels.lengths)) is not None:
        raise ValueError(
            f"episode {rows.first + episode} has {rows.lengths[episode]} {part} videos but {labels.lengths[episode]} "
            f"{part}_labels: give one label a video"
        )
    if (episode := _first(rows.lengths == 0)) is not None:
        raise ValueError(f"episode {rows.first + episode} has no {part} videos: take it out of the list")


def _check_rows(part: str, rows: _ListColumn, num_videos: int) -> None:
    if (clip := _first((rows.values < 0) | (rows.values >= num_videos))) is not None:
        raise ValueError(
            f"{part} row {rows.values[clip]} in episode {rows.first + rows.episode[clip]} is out of range: the "
            f"dataset has {num_videos} videos; use the dataset and split the list was made for"
        )


def _check_way(support: _ListColumn, query: _ListColumn) -> None:
    """Support labels must be exactly 0..way-1, and query labels among them."""
    episode = support.episode
    possible = (support.values >= 0) & (support.values < support.lengths[episode])
    # Lifting the labels of later episodes above those of earlier ones counts all episodes' different labels at once.
    step = support.lengths.max()
    lifted = np.unique((step * episode + support.values)[possible])
    different = np.bincount(lifted // step, minlength=len(support.lengths))
    way = 1 + np.maximum.reduceat(support.values, support.starts)
    wrong = (way != different) | (way < 2)
    wrong[episode[~possible]] = True
    if (wrong_episode := _first(wrong)) is not None:
        found = np.unique(support.values[episode == wrong_episode]).tolist()
        raise ValueError(
            f"the support labels of episode {support.first + wrong_episode} are {found}: they must be 0..way-1, at "
            f"least 2, and each has a support"
        )
    if (clip := _first((query.values < 0) | (query.values >= way[query.episode]))) is not None:
        labels = np.arange(way[query.episode[clip]]).tolist()
        raise ValueError(
            f"query label {query.values[clip]} in episode {query.first + query.episode[clip]} has no support: "
            f"the labels there are {labels}"
        )


def _check_classes_agree(columns: dict[str, _ListColumn], labels: np.ndarray) -> None:
    """No video twice in an episode; one episode label is one class and one class one episode label."""
    first = columns["support"].first
    episode = first + np.concatenate([columns["support"].episode, columns["query"].episode])
    row = np.concatenate([columns["support"].values, columns["query"].values])
    episode_label = np.concatenate([columns["support_labels"].values, columns["query_labels"].values])

    clips = _first_conflict(episode, row, np.arange(len(row)))
    if clips is not None:
        raise ValueError(
            f"row {row[clips[0]]} occurs twice in episode {episode[clips[0]]}: an episode must not repeat a video"
        )
    remedy = "the list is broken or was made for another dataset, split or order of rows"
    clips = _first_conflict(episode, episode_label, labels[row])
    if clips is not None:
        one, other = row[list(clips)]
        raise ValueError(
            f"rows {one} and {other} share label {episode_label[clips[0]]} of episode {episode[clips[0]]}, but the "
            f"dataset has them in classes {labels[one]} and {labels[other]}: {remedy}"
        )
    clips = _first_conflict(episode, labels[row], episode_label)
    if clips is not None:
        one, other = row[list(clips)]
        raise ValueError(
            f"rows {one} and {other} have labels {episode_label[clips[0]]} and {episode_label[clips[1]]} in episode "
            f"{episode[clips[0]]}, but the dataset has both in class {labels[one]}: {remedy}"
        )


def _first_conflict(episode: np.ndarray, group: np.ndarray, value: np.ndarray) -> tuple[int, int] | None:
    """The first two places, all arrays (total,), of one episode and group whose values differ; `None` without such."""
    order = np.lexsort((value, group, episode))
    before, after = order[:-1], order[1:]
    same_group = (episode[before] == episode[after]) & (group[before] == group[after])
    place = _first(same_group & (value[before] != value[after]))
    return None if place is None else (before[place], after[place])
