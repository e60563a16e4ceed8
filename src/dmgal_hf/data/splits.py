"""Which classes and videos belong to training, validation and test: split lists read, checked, fetched or drawn."""

import hashlib
import http.client
import os
import re
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from .written_aside import written_aside

SPLIT_NAMES = ("train", "validation", "test")

# The lists belong to their authors: they are fetched from this commit and never shipped with the package.
SPLITS_COMMIT = "022d8adcc69eb80d987d7ed43c973e63ff5641d2"
SPLITS_BASE_URL = f"https://raw.githubusercontent.com/ReverseSuzhou/DMGAL/{SPLITS_COMMIT}/splits"
FETCH_TIMEOUT_SECONDS = 60

# File suffixes of the video containers and raw video streams that FFmpeg reads.
# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".amv", ".apng", ".asf", ".av1", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264",
    ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mod",
    ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".obu", ".ogg", ".ogm", ".ogv", ".qt", ".rm",
    ".rmvb", ".tod", ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
})
# fmt: on
# A zip archive holds the extracted frames of one clip.
CLIP_SUFFIXES = VIDEO_SUFFIXES | {".zip"}

# Up to two numbers at the end of a line, after spaces, tabs or commas.
COUNTS = re.compile(r"(?P<entry>.+?)(?P<counts>(?:\s*[,\s]\s*\d+){1,2})", re.ASCII)

# (class name, video id): one line of a split list.
ListedVideo = tuple[str, str]


@dataclass(frozen=True)
class BenchmarkLists:
    """Where the lists of a benchmark lie in the authors' repository, and what they must be."""

    folder: str  # of `splits/`
    files: Mapping[str, tuple[str, str]]  # split -> (file name, SHA-256 of the file in hexadecimal)


BENCHMARKS = {
    "ssv2-full": BenchmarkLists(
        "ssv2_OTAM",
        {
            "train": ("trainlist07.txt", "886fdd2b9215328efaee7e73ae2ea8f5b3e99fd3732679481652bad1506df5c0"),
            "validation": ("vallist07.txt", "b9884e9e716fbb9a902121d797c0a43ec04517085eb6b36a2804e037db63d6eb"),
            "test": ("testlist07.txt", "83a1ac8e7c6f720c55dced1dc9deae1c11fb8271f8a3bb1f0952aed068646a1e"),
        },
    ),
    "ssv2-small": BenchmarkLists(
        "ssv2_CMN",
        {
            "train": ("trainlist03.txt", "fd15c2eff0065ef3e70a3b4f364b9d7e1c1d2581ce73d22b83d0e4c91e799fb1"),
            "validation": ("vallist03.txt", "aa280e1ece78dc248ae3bda9668bbc549d4837a8dc1e1699f13525d32c1ece43"),
            "test": ("testlist03.txt", "4e8b9ae7446331c47ece4c342cfe4f67896b717f4dea92ffd7659e72baeeddd6"),
        },
    ),
    "kinetics-100": BenchmarkLists(
        "kinetics_CMN",
        {
            "train": ("trainlist03.txt", "d0cbdcaa6fd4a28c8a514e85dd47407a4124ba3d8187aadd0a41c47636d592ae"),
            "validation": ("vallist03.txt", "e3144200327ce31bc5be0e1efb1107c6c7f2912c95eb2457095374b2c22bf74a"),
            "test": ("testlist03.txt", "9c2351cf070ad7d052f1fb2885e5e4b246da7a38d06cb730bf7473eeb7173d09"),
        },
    ),
    "hmdb51": BenchmarkLists(
        "hmdb_ARN",
        {
            "train": ("trainlist03.txt", "2524450b6d7b18775411361fbc366c30345d83516a2d6eec12b6af04c884ec88"),
            "validation": ("vallist03.txt", "85458cf86f85354b411080f6aea3157c5831b1a3bf40fed24e4a2c7a17f8027c"),
            "test": ("testlist03.txt", "e2ce039f857287cb943a00d27ac6d2559a434e7bde5722d350c269253160d388"),
        },
    ),
    "ucf101": BenchmarkLists(
        "ucf_ARN",
        {
            "train": ("trainlist03.txt", "5513fc00bdba74ae84ee721fc1cc2bae0aa2d4fb7883b9b6f90387ca1a54ddb8"),
            "validation": ("vallist03.txt", "5482ce6d2f2db2568a8cd41158ab5a406fad36fcc9940c1811573937ad6bfc4f"),
            "test": ("testlist03.txt", "0887937010eee99ae3baf3178227ac35daebf6a35431b2df051fcf682b48bc31"),
        },
    ),
}


def get_benchmark_lists(name: str) -> BenchmarkLists:
    """The entry of `BENCHMARKS`, or a `ValueError` that says which names there are."""
    if name not in BENCHMARKS:
        raise ValueError(
            f"Unknown benchmark {name!r}: choose one of {', '.join(BENCHMARKS)}, or read a folder of your own with "
            "load_video_folder."
        )
    return BENCHMARKS[name]


def clip_stem(file_name: str) -> str:
    """`file_name` without a video or zip suffix. A dot that begins no such suffix belongs to the name."""
    stem, dot, suffix = file_name.rpartition(".")
    return stem if stem and dot + suffix.lower() in CLIP_SUFFIXES else file_name


def class_key(class_name: str) -> str:
    """A class name without what spellings differ in: `hurling (sport)` and `Hurling_sport` have one key."""
    return re.sub(r"[\s_(),'\-]+", "", class_name).casefold() or class_name


def parse_split_list(path: str | os.PathLike) -> list[ListedVideo]:
    """Reads one split list.

    Two forms of line are understood, each with or without the suffix of the video file; blank lines do not count:

    - `class/video id`: `hurling (sport)/lISBulMckk0_000694_000704`, `train8/78687`;
    - `label//folders/video id`: `test0//videos/fencing/name.avi`. Here the class is named by the folder of the video
      (`fencing`) if there are at least two folders and each label of the list has a folder of its own, as in the
      lists of HMDB51, UCF101 and Kinetics. In a flat folder (`test0//clips/name.mp4`) the label is all there is.

    The number of frames, the number of the class, or both may follow on every line, as lists for other programs have
    them: `class/name.avi 3`, `class/name,405,0`. They are left out. One number after a space and an id without the
    suffix of a video (`class/bout 1`) is part of the id.

    Returns:
        `list[tuple[str, str]]`: (class name, video id) in the order of the lines.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not parse or alone has numbers behind its id, an id occurs twice, or the file is empty
            or no text; with file and line.
    """
    lines = {number: line for number, line in enumerate(_read_lines(Path(path)), start=1) if line}
    lines = _without_counts(path, lines)
    entries = [(number, *_parse_line(path, number, line)) for number, line in lines.items()]
    if not entries:
        raise ValueError(f"{path} lists no video. A line reads `class/video id`.")
    _refuse_repeated_ids(path, entries)

    pairs = {(label, folder) for _, label, folder, _ in entries}
    labels, folders = {label for label, _ in pairs}, {folder for _, folder in pairs}
    # Only a one-to-one relation makes the folders classes: "ssv2/videos/1.webm" for every label does not.
    folder_is_class = None not in folders and len(labels) == len(folders) == len(pairs)
    return [(folder if folder_is_class else label, video_id) for _, label, folder, video_id in entries]


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no split list {path}.")
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front, which is not part of the first class name.
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}.") from error


def _without_counts(path, lines: dict[int, str]) -> dict[int, str]:
    """The lines, by their numbers, without the counts behind their ids."""
    found = {
        number: match for number, line in lines.items() if (match := COUNTS.fullmatch(line)) and _are_counts(match)
    }
    if not found or len(found) == len(lines):
        return {number: match["entry"] for number, match in found.items()} or lines
    # Numbers behind a suffix are counts. Elsewhere they may be part of the ids where not all have them.
    sure = [number for number, match in found.items() if clip_stem(match["entry"]) != match["entry"]]
    if not sure:
        return lines
    other = next(number for number in lines if number not in found)
    raise ValueError(
        f"{path}, line {sure[0]}: {lines[sure[0]]!r} has numbers behind the video id, and line {other} has none: "
        "write them on every line, or on none."
    )


def _are_counts(match: re.Match) -> bool:
    """Whether numbers at the end of a line are counts for sure: one after a space may belong to the id ("bout 1")."""
    has_suffix = clip_stem(match["entry"]) != match["entry"]
    return has_suffix or len(match["counts"].split()) > 1 or any(mark in match["counts"] for mark in ",\t")


def _parse_line(path, number: int, line: str) -> tuple[str, str | None, str]:
    """One line as (label, folder that may be the class, video id)."""
    label, _, location = line.partition("//" if "//" in line else "/")
    parts = [part.strip() for part in location.split("/")]
    label, video_id = label.strip(), clip_stem(parts[-1])
    expects_folders = "//" in line
    if not label or "/" in label or not all(parts) or (len(parts) > 1 and not expects_folders):
        raise ValueError(
            f"{path}, line {number}: cannot read {line!r}. Expected `class/video id` or `label//folders/video id`."
        )
    return label, parts[-2] if len(parts) > 2 else None, video_id


def _refuse_repeated_ids(path, entries: Iterable[tuple[int, str, str | None, str]]) -> None:
    first_line: dict[str, int] = {}
    for number, _, _, video_id in entries:
        if video_id in first_line:
            raise ValueError(
                f"{path}, lines {first_line[video_id]} and {number}: the video id {video_id!r} occurs twice. "
                "Keep one of the two lines."
            )
        first_line[video_id] = number


def read_split_lists(folder: str | os.PathLike, name: str) -> dict[str, list[ListedVideo]]:
    """Reads the three lists of a benchmark and checks that they share neither a class nor a video.

    `folder` holds one `train*.txt`, one `val*.txt` and one `test*.txt`, or the sub-folder of the authors' repository
    that does (`ssv2_OTAM`, `ssv2_CMN`, `kinetics_CMN`, `hmdb_ARN`, `ucf_ARN`).

    Returns:
        `dict[str, list[tuple[str, str]]]`: "train", "validation", "test" -> what `parse_split_list` returns.

    Raises:
        FileNotFoundError: no such folder, or a list is not there.
        ValueError: two files for one split, lists of another benchmark, a bad line, an overlap of the splits.
    """
    paths = _find_list_files(Path(folder).expanduser(), name)
    lists = {split: parse_split_list(path) for split, path in paths.items()}
    check_splits_are_disjoint(lists, sources=paths)
    return lists


def _find_list_files(folder: Path, name: str) -> dict[str, Path]:
    own = get_benchmark_lists(name).folder
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of split lists {folder}.")
    for other, lists in BENCHMARKS.items():
        if folder.name == lists.folder != own:
            raise ValueError(f"{folder} holds the lists of {other}, not of {name} (those are in a folder {own!r}).")

    for place in (folder, folder / own):
        texts = sorted(place.glob("*.txt"))
        found = {
            split: [path for path in texts if path.name.lower().startswith(prefix)]
            for split, prefix in zip(SPLIT_NAMES, ("train", "val", "test"), strict=True)
        }
        if any(found.values()):
            break
    for split, paths in found.items():
        if not paths:
            raise FileNotFoundError(
                f"No {split} list for {name} in {folder}: expected train*.txt, val*.txt and test*.txt there or in its "
                f"sub-folder {own!r}."
            )
        if len(paths) > 1:
            raise ValueError(f"Two {split} lists in {paths[0].parent}: {paths[0].name} and {paths[1].name}. Keep one.")
    return {split: paths[0] for split, paths in found.items()}


def check_splits_are_disjoint(
    lists: Mapping[str, Sequence[ListedVideo]], sources: Mapping[str, str | os.PathLike] | None = None
) -> None:
    """Raises a `ValueError` if two splits share a class or a video.

    Classes that differ in case, spaces, underscores or brackets alone are the same class (`class_key`). `sources` says
    where the list of a split comes from, for the message.
    """
    sources = sources or {split: split for split in lists}
    for kind, column, key in (("class", 0, class_key), ("video", 1, str)):
        owner: dict[str, str] = {}
        shared: dict[str, tuple[str, str]] = {}
        for split, entries in lists.items():
            for value in {entry[column]: None for entry in entries}:
                first = owner.setdefault(key(value), split)
                if first != split:
                    shared[value] = (first, split)
        if shared:
            value, (first, second) = next(iter(shared.items()))
            others = [repr(name) for name in list(shared)[1:]]
            rest = f", and so are {len(others)} more: {first_of(others, 5)}" if others else ""
            raise ValueError(
                f"The {kind} {value!r} is in two splits, {sources[first]} and {sources[second]}{rest}. Training, "
                f"validation and test must not share a {kind}."
            )


def first_of(texts: Sequence[str], limit: int) -> str:
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def fetch_split_lists(name: str, cache_dir: str | os.PathLike | None = None, base_url: str | None = None) -> Path:
    """Fetches the lists of a benchmark from the authors' repository at `SPLITS_COMMIT`, once.

    A list already in the cache is used if its SHA-256 is right, and fetched anew if not.

    Returns:
        `Path`: the folder with the three lists, by default in `dmgal_hf/splits/<commit>` under `HF_HOME`.

    Raises:
        ConnectionError: a list cannot be fetched, or `HF_HUB_OFFLINE` forbids it.
        ValueError: what was fetched has another SHA-256; nothing is kept then.
    """
    lists = get_benchmark_lists(name)
    cache = Path(cache_dir or Path(constants.HF_HOME) / "dmgal_hf" / "splits" / SPLITS_COMMIT) / lists.folder
    for file_name, sha256 in lists.files.values():
        path = cache / file_name
        if not (path.is_file() and _sha256(path.read_bytes()) == sha256):
            fetch_verified_file(f"{base_url or SPLITS_BASE_URL}/{lists.folder}/{file_name}", path, sha256)
    return cache


def fetch_verified_file(url: str, path: Path, sha256: str) -> None:
    """Writes what is at `url` to `path`, if its SHA-256 is the one given (hexadecimal).

    The file appears whole or not at all, so that several processes may fetch the same one at the same time.
    Raises as `fetch_split_lists` does.
    """
    content = _download(url)
    found = _sha256(content)
    if found != sha256:
        raise ValueError(
            f"Wrong checksum of {path.parent.name}/{path.name} from {url}: expected SHA-256 {sha256}, found {found}. "
            "Fetch it again; if the sum stays wrong, pass splits= a folder with lists you trust."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(content)


def _download(url: str) -> bytes:
    advice = "Fetch it by hand and pass splits= the folder that holds the lists."
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache, and HF_HUB_OFFLINE forbids fetching it. {advice}")
    try:
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_SECONDS) as response:
            return response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"Could not fetch the split list {url}: {error}. {advice}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def draw_class_split(
    class_names: Iterable[str], seed: int = 0, fractions: Sequence[float] = (0.64, 0.12, 0.24)
) -> dict[str, list[str]]:
    """Draws which classes train, validate and test: a pure function of the set of names, the seed and the fractions.

    Every class gets a place in the order of the SHA-256 of seed and name, so the draw depends neither on the order in
    which a file system lists the classes nor on the version of a random number generator.

    `fractions` are the shares of train, validation and test, by default those of the 64/12/24 benchmarks. A share
    above 0 gets at least one class, a share of 0 none and no split.

    Returns:
        `dict[str, list[str]]`: split -> its class names, sorted; only splits with a share above 0.

    Raises:
        ValueError: fractions that are no three shares of 1, or fewer classes than splits.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three shares (train, validation, test) with sum 1, got {fractions!r}.")
    shares = {split: share for split, share in zip(SPLIT_NAMES, fractions, strict=True) if share > 0}
    ranked = sorted(set(class_names), key=lambda class_name: _sha256(f"{seed}/{class_name}".encode()))
    if len(ranked) < len(shares):
        raise ValueError(
            f"{len(ranked)} classes cannot be divided over {', '.join(shares)} without sharing one: add classes, or "
            "set a fraction to 0."
        )
    counts = dict.fromkeys(shares, 1)
    for _ in range(len(ranked) - len(shares)):
        neediest = max(shares, key=lambda split: shares[split] * len(ranked) - counts[split])
        counts[neediest] += 1
    draws = iter(ranked)
    return {split: sorted(next(draws) for _ in range(count)) for split, count in counts.items()}
