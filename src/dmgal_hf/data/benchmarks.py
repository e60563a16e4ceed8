"""The five benchmarks, and any folder of videos, as a `datasets.DatasetDict`.

Nothing here opens a video: a clip is known by its path. Every dataset has the columns `video`
(`datasets.Video(decode=False)`, absolute path), `label` (`datasets.ClassLabel`) and `video_id` (string), and all
splits share one list of class names: those of train, then of validation, then of test. A dataset points to its files;
the `save_to_disk` and `push_to_hub` of `datasets` write the bytes of the videos along, where each is one file.
"""

import json
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, Video

from ..model.extracted_frames import FRAME_SUFFIXES, is_frame
from ..model.zip_archive import open_zip, split_zip_path
from .splits import (
    CLIP_SUFFIXES,
    SPLIT_NAMES,
    ListedVideo,
    check_splits_are_disjoint,
    class_key,
    clip_stem,
    draw_class_split,
    fetch_split_lists,
    first_of,
    get_benchmark_lists,
    read_split_lists,
)

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}

# A YouTube id has 11 characters of its own, "_" and "-" among them; Kinetics appends start and end in seconds.
KINETICS_SEGMENT = re.compile(r"([\w-]{11})_(\d+)_(\d+)", re.ASCII)


def load_benchmark(
    name: str,
    videos: str | os.PathLike,
    splits: str | os.PathLike | None = None,
    class_labels: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    allow_missing: bool = False,
    min_clips: int = 2,
) -> DatasetDict:
    """One of the five few-shot benchmarks, from its split lists and a folder that holds its videos anywhere below.

    The folder may be as the data set is published: `<id>.webm` (Something-Something V2),
    `<class>/<id>_<start>_<end>.mp4` or `<id>.mp4` (Kinetics; start and end with or without leading zeros),
    `<class>/<name>.avi` (HMDB51, UCF101; case does not count). Or frames extracted from a clip: a folder or a zip
    archive of JPEG or PNG files that bears the clip's name. All of this may lie in one zip archive, which is read as
    it is. Of two files with one name, the one in the folder of its class is taken.

    Args:
        name (`str`): "ssv2-full", "ssv2-small", "kinetics-100", "hmdb51" or "ucf101".
        videos (`str` or `os.PathLike`): the folder of videos, or one zip archive of it; searched once and in depth.
        splits (`str` or `os.PathLike`, *optional*):
            Folder of the lists, see `read_split_lists`. Default: the authors' lists, fetched once and verified
            (`fetch_split_lists`).
        class_labels (`str`, `os.PathLike` or a sequence of those, *optional*):
            Label files of Something-Something V2 (`train.json`, `validation.json`), which give its numbered classes
            (`train8`) their names.
        allow_missing (`bool`): go on, with a warning, when videos of the lists are not in the folder.
        min_clips (`int`):
            How many clips a class that misses some must keep, at least 1: an episode takes shot + query clips of a
            class, by default one each.

    Returns:
        `datasets.DatasetDict`: "train", "validation" and "test", rows in the order of the lists.

    Raises:
        FileNotFoundError: no such folder, or videos are missing; counted and listed by class.
        ValueError: unknown name, bad lists, two files for one video, a class with fewer than `min_clips` clips left.
        ConnectionError: the lists cannot be fetched.
    """
    get_benchmark_lists(name)
    if min_clips < 1:
        raise ValueError(f"min_clips must be at least 1 (every class needs a clip), got {min_clips}.")
    root = _existing_folder(videos)
    lists = read_split_lists(fetch_split_lists(name) if splits is None else splits, name)
    if class_labels is not None:
        lists = name_ssv2_classes(name, lists, class_labels)

    paths = find_videos(lists, root, has_segments=name == "kinetics-100")
    missing: dict[str, list[str]] = {}
    for class_name, video_id in _all_entries(lists):
        if video_id not in paths:
            missing.setdefault(class_name, []).append(video_id)
    if missing:
        _handle_missing(name, lists, missing, root, allow_missing, min_clips)
    rows = {
        split: [(paths[video_id], class_name, video_id) for class_name, video_id in entries if video_id in paths]
        for split, entries in lists.items()
    }
    # From the lists, not the rows: the number of a class must not depend on which videos are missing.
    return _to_dataset_dict(rows, class_names=dict(_all_entries(lists)))


def load_video_folder(
    root: str | os.PathLike,
    seed: int = 0,
    fractions: Sequence[float] = (0.64, 0.12, 0.24),
    validation: bool = True,
) -> DatasetDict:
    """A folder of videos sorted into classes, without any list.

    Two layouts are understood. Hidden files do not count; anything else that is no clip is an error.

    - `root/<split>/<class>/...` with one or more of the splits `train`, `val` or `validation`, and `test`: the
      splits are as given, a split that is not there is not in the result.
    - `root/<class>/...`: the classes are divided by `seed` and `fractions` (`draw_class_split`).

    A clip is a file of any container that FFmpeg reads (by its suffix), or a sub-folder or zip archive of JPEG or PNG
    frames; it may lie at any depth in the folder of its class. Where `root` holds one folder alone, and that one the
    classes or splits (`hmdb/<class>/...`), it is read in place of `root`, with a warning.

    Args:
        root (`str` or `os.PathLike`): the folder, or a zip archive, or `FILE.zip#/folder` inside one.
        seed (`int`): which division of the classes. Like what follows, not used where the folder has splits.
        fractions (`Sequence[float]`): shares of train, validation and test.
        validation (`bool`): `False` has the classes that would validate train; those of the test are the same.

    Returns:
        `datasets.DatasetDict`: one dataset a split; classes sorted within a split, rows by path. `video_id` is the
        path from the class on: `fencing/bout 1.mp4`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an empty folder or class, a file that is no video, a class in two splits, too few classes.
    """
    root = _existing_folder(root)
    if sum(share > 0 for share in fractions) > 1:  # else one class is enough
        root = _without_top_folder(root)
    folders = _class_folders(root)
    if any(folder.casefold() in SPLIT_FOLDERS for folder in folders):
        class_folders = _given_splits(root, folders)
    else:
        drawn = draw_class_split(folders, seed, fractions)
        if not validation and "validation" in drawn:
            drawn["train"] = sorted(drawn.get("train", []) + drawn.pop("validation"))
        class_folders = {
            split: {name: os.path.join(root, name) for name in class_names} for split, class_names in drawn.items()
        }
    check_splits_are_disjoint({split: [(name, name) for name in found] for split, found in class_folders.items()})
    clips = _clips_of(root, {name: folder for found in class_folders.values() for name, folder in found.items()})
    rows = {
        split: [
            (path, name, Path(name, os.path.relpath(path, folder)).as_posix())
            for name, folder in found.items()
            for path in clips[name]
        ]
        for split, found in class_folders.items()
    }
    return _to_dataset_dict(rows, class_names=[name for found in class_folders.values() for name in found])


def list_class_clips(root: str | os.PathLike) -> dict[str, list[str]]:
    """The clips of each class of a folder `root/<class>/...`, as [`load_video_folder`] finds them.

    Returns:
        `dict[str, list[str]]`: class name -> paths of its clips, both sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an empty folder or class, or a file that is no video or lies outside any class.
    """
    root = _without_top_folder(_existing_folder(root))
    return _clips_of(root, {name: os.path.join(root, name) for name in _class_folders(root)})


def _clips_of(root: str, folders: Mapping[str, str]) -> dict[str, list[str]]:
    """Class name -> paths of all clips in its folder; anything else in there is refused."""
    scans = {class_name: scan_videos(folder) for class_name, folder in folders.items()}
    for class_name, scan in scans.items():
        if not scan.clips and not scan.unknown:
            raise ValueError(f"The class folder {folders[class_name]} holds no video. Add clips to it or remove it.")
    unknown = [path for scan in scans.values() for path in scan.unknown]
    if unknown:
        _refuse_unknown(root, unknown)
    return {class_name: scan.clips for class_name, scan in scans.items()}


@dataclass
class VideoScan:
    """What lies below a folder, as sorted paths."""

    # Video files, zip archives, and folders of frames with neither videos nor folders in them; in a zip archive, too,
    # as `FILE.zip#/path/inside`.
    clips: list[str] = field(default_factory=list)
    # The rest but hidden files: other files, images beside videos, broken links, empty folders.
    unknown: list[str] = field(default_factory=list)


def scan_videos(root: str | os.PathLike) -> VideoScan:
    """Lists every clip below `root` by name alone, following links. An `OSError` names a folder it cannot read."""
    scan = VideoScan()
    root = os.fspath(root)
    folders = [root]
    while folders:
        folder = folders.pop()
        clips, images, others, subfolders = _list_folder(folder)
        if images and folder != root and not clips and not subfolders:
            clips = [folder]
        else:
            others += images
        scan.clips += clips
        scan.unknown += others
        folders += subfolders
        if folder != root and not (clips or others or subfolders):
            scan.unknown.append(folder)
    scan.clips.sort()
    scan.unknown.sort()
    return scan


def _list_folder(folder: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Paths of clip files, images, other entries and sub-folders right in `folder`, hidden ones left out."""
    clips, images, others, subfolders = [], [], [], []
    for name, kind in _entries(folder):
        path = os.path.join(folder, name)
        suffix = os.path.splitext(name)[1].lower()
        if kind == "folder":
            subfolders.append(path)
        elif kind == "file" and suffix in CLIP_SUFFIXES:
            clips.append(path)
        elif kind == "file" and suffix in FRAME_SUFFIXES:
            images.append(path)
        else:  # a broken link and a socket, too
            others.append(path)
    return clips, images, others, subfolders


def _entries(folder: str) -> Iterator[tuple[str, str]]:
    """(name, "file" or "folder" or "other") of what is not hidden in a folder, or in a folder of a zip archive."""
    if place := split_zip_path(folder):
        found = open_zip(place[0]).folders[place[1]]
        kinds = chain(
            ((name, "file") for name in found.names), ((name, "folder") for name in sorted(found.subfolders))
        )
        yield from (entry for entry in kinds if not entry[0].startswith("."))
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.name != "__MACOSX":  # what macOS keeps about the files
                yield entry.name, "folder" if entry.is_dir() else "file" if entry.is_file() else "other"


def find_videos(
    lists: Mapping[str, Sequence[ListedVideo]], root: str | os.PathLike, has_segments: bool = False
) -> dict[str, str]:
    """Finds the file of every listed video below a folder.

    With `has_segments`, ids are those of Kinetics: `<YouTube id>_<start>_<end>`, where a file or a list may leave out
    the segment. Two different segments of one YouTube video are never taken for each other.

    Returns:
        `dict[str, str]`: video id -> path, for those that were found.

    Raises:
        ValueError: two files could be one video, or one file two videos; both are named.
    """
    split_name = _split_segment if has_segments else _without_segment
    wanted = {split_name(video_id)[0] for _, video_id in _all_entries(lists)}
    candidates: dict[str, list[tuple[tuple[int, int] | None, str]]] = {}
    for path in scan_videos(root).clips:
        base, segment = split_name(clip_stem(os.path.basename(path)))
        if base in wanted:
            candidates.setdefault(base, []).append((segment, path))

    paths: dict[str, str] = {}
    owner: dict[str, str] = {}
    for class_name, video_id in _all_entries(lists):
        base, segment = split_name(video_id)
        path = _choose_path(class_name, video_id, segment, candidates.get(base, ()))
        if path is None:
            continue
        if owner.setdefault(path, video_id) != video_id:
            raise ValueError(
                f"{path} could be either of two listed videos, {owner[path]!r} and {video_id!r}. Rename it to the "
                "full id of the one it is."
            )
        paths[video_id] = path
    return paths


def _without_segment(name: str) -> tuple[str, None]:
    # The archive of UCF101 itself writes v_HandStandPushups in the folder HandstandPushups.
    return name.casefold(), None


def _split_segment(name: str) -> tuple[str, tuple[int, int] | None]:
    # YouTube ids differ by case alone, so theirs counts.
    match = KINETICS_SEGMENT.fullmatch(name)
    return (match[1], (int(match[2]), int(match[3]))) if match else (name, None)


def _choose_path(
    class_name: str,
    video_id: str,
    segment: tuple[int, int] | None,
    candidates: Iterable[tuple[tuple[int, int] | None, str]],
) -> str | None:
    """The one file for a listed video: of its very segment, or else where list or file leaves the segment open."""
    paths = [path for found, path in candidates if found == segment]
    if not paths:
        paths = [path for found, path in candidates if found is None or segment is None]
    if len(paths) > 1:
        key = class_key(class_name)
        in_class = [path for path in paths if class_key(os.path.basename(os.path.dirname(path))) == key]
        if len(in_class) != 1:
            first, second = (in_class or paths)[:2]
            raise ValueError(
                f"Two files could be the video {video_id!r} of class {class_name!r}: {first} and {second}. "
                "Remove one, or keep it in a folder outside the one given."
            )
        paths = in_class
    return paths[0] if paths else None


def _handle_missing(
    name: str,
    lists: Mapping[str, Sequence[ListedVideo]],
    missing: Mapping[str, Sequence[str]],
    root: str,
    allow_missing: bool,
    min_clips: int,
) -> None:
    """Refuses missing videos, or warns about them and refuses only classes that are left too small."""
    listed = Counter(class_name for class_name, _ in _all_entries(lists))
    report = _describe_missing(name, missing, listed, root)
    if not allow_missing:
        raise FileNotFoundError(f"{report}\nComplete the folder, or pass allow_missing=True to go on without them.")
    left = {class_name: listed[class_name] - len(ids) for class_name, ids in missing.items()}
    too_few = [f"{class_name!r} ({count})" for class_name, count in left.items() if count < min_clips]
    if too_few:
        raise ValueError(
            f"{report}\nToo few clips are left for an episode, which needs min_clips={min_clips} of a class, in "
            f"{len(too_few)} of {len(listed)} classes: {first_of(too_few, 10)}. Complete these classes."
        )
    logger.warning("%s\nGoing on without them.", report)


def _describe_missing(
    name: str, missing: Mapping[str, Sequence[str]], listed: Mapping[str, int], root: str, limit: int = 10
) -> str:
    ranked = sorted(missing.items(), key=lambda item: (-len(item[1]), item[0]))
    lines = [
        f"  {class_name}: {len(ids)} of {listed[class_name]} ({first_of([repr(video_id) for video_id in ids], 3)})"
        for class_name, ids in ranked[:limit]
    ]
    if len(ranked) > limit:
        lines.append(f"  and {sum(len(ids) for _, ids in ranked[limit:])} in {len(ranked) - limit} more classes")
    total = sum(len(ids) for ids in missing.values())
    head = f"{total} of {sum(listed.values())} videos of {name} are missing in {root}, in {len(missing)} classes:"
    return "\n".join([head, *lines])


def name_ssv2_classes(
    name: str,
    lists: Mapping[str, Sequence[ListedVideo]],
    class_labels: str | os.PathLike | Sequence[str | os.PathLike],
) -> dict[str, list[ListedVideo]]:
    """Replaces the class names of Something-Something lists by the templates that its label files give the videos.

    Returns:
        `dict[str, list[tuple[str, str]]]`: the lists with `train8` replaced by, say, `Holding something`.

    Raises:
        ValueError: another benchmark, a file of another form, a class without any labelled id, the ids of one class
            disagree, or two classes have one template.
    """
    if name not in ("ssv2-full", "ssv2-small"):
        raise ValueError(f"class_labels are for Something-Something V2 alone: the lists of {name} name their classes.")
    templates = read_ssv2_templates([class_labels] if isinstance(class_labels, (str, os.PathLike)) else class_labels)
    witness: dict[str, str] = {}
    for class_name, video_id in _all_entries(lists):
        if video_id not in templates:
            continue
        first = witness.setdefault(class_name, video_id)
        if templates[first] != templates[video_id]:
            raise ValueError(
                f"The videos of class {class_name!r} disagree on its name: {first} is {templates[first]!r}, "
                f"{video_id} is {templates[video_id]!r}. These label files do not belong to these lists."
            )
    unnamed = [class_name for class_name in dict(_all_entries(lists)) if class_name not in witness]
    if unnamed:
        raise ValueError(
            f"class_labels name no video of {len(unnamed)} classes: {first_of(unnamed, 10)}. Pass both train.json and "
            "validation.json."
        )
    owner: dict[str, str] = {}
    for class_name, video_id in witness.items():
        other = owner.setdefault(templates[video_id], class_name)
        if other != class_name:
            raise ValueError(f"The classes {other!r} and {class_name!r} have one name, {templates[video_id]!r}.")
    return {
        split: [(templates[witness[class_name]], video_id) for class_name, video_id in entries]
        for split, entries in lists.items()
    }


def read_ssv2_templates(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """Video id -> template without brackets (`Holding something`) from label files of Something-Something V2."""
    templates: dict[str, str] = {}
    for path in paths:
        try:
            entries = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"The label file {path} is not JSON: {error}.") from error
        if not isinstance(entries, list):
            raise ValueError(
                f'The label file {path} is no list of {{"id": ..., "template": ...}}: pass train.json or such.'
            )
        for number, entry in enumerate(entries):
            text = entry.get("template", entry.get("label")) if isinstance(entry, dict) else None
            if not isinstance(text, str) or "id" not in entry:
                raise ValueError(
                    f'Entry {number} of the label file {path} needs "id" and "template" (or "label"), got {entry!r}.'
                )
            text = text.replace("[", "").replace("]", "")
            if templates.setdefault(str(entry["id"]), text) != text:
                raise ValueError(
                    f"The label files disagree on video {entry['id']}: {templates[str(entry['id'])]!r}, and in {path} "
                    f"{text!r}."
                )
    return templates


class LooseFileError(NotADirectoryError, ValueError):
    """A file where folders of classes are expected."""


def _without_top_folder(root: str) -> str:
    """`root`, or the folder that is all it holds, where that is a folder of folders and no class of its own."""
    clips, images, others, subfolders = _list_folder(root)
    if clips or images or others or len(subfolders) != 1:
        return root
    (top,) = subfolders
    clips, images, others, inside = _list_folder(top)
    of_frames = all(_list_folder(folder)[1] for folder in inside)
    if clips or images or others or of_frames or os.path.basename(top).casefold() in SPLIT_FOLDERS:
        return root
    logger.warning("%s holds nothing but the folder %r: it is read in its place.", root, os.path.basename(top))
    return _without_top_folder(top)


def _class_folders(root: str) -> list[str]:
    """Names of the folders in `root`, sorted; loose files are refused, since they have no class."""
    clips, images, others, subfolders = _list_folder(root)
    loose = sorted(clips + images + others)
    if loose:
        raise LooseFileError(
            f"{loose[0]} ({len(loose)} such) is a file and lies outside any class. Expected folders: "
            f"{root}/<class>/<clip> or {root}/train/<class>/<clip>."
        )
    if not subfolders:
        raise ValueError(f"{root} is empty. Expected {root}/<class>/<clip> or {root}/train/<class>/<clip>.")
    return sorted(os.path.basename(folder) for folder in subfolders)


def _given_splits(root: str, folders: Sequence[str]) -> dict[str, dict[str, str]]:
    """Split -> class name -> folder, in the order of `SPLIT_NAMES`, for a root whose folders are splits."""
    found: dict[str, str] = {}
    for folder in folders:
        split = SPLIT_FOLDERS.get(folder.casefold())
        if split is None:
            raise ValueError(
                f"{root} mixes splits and other folders: {folder!r} is none of {', '.join(SPLIT_FOLDERS)}. Move it "
                "into a split, or give the folders with names of splits other names."
            )
        if split in found:
            raise ValueError(f"{root} has two folders for {split}: {found[split]!r} and {folder!r}. Merge them.")
        found[split] = folder
    places = {split: os.path.join(root, found[split]) for split in SPLIT_NAMES if split in found}
    return {
        split: {name: os.path.join(place, name) for name in _class_folders(place)} for split, place in places.items()
    }


def _refuse_unknown(root: str, unknown: Sequence[str]) -> None:
    names = [os.path.relpath(path, root) for path in unknown]
    message = (
        f"{len(unknown)} entries of {root} are no video: {first_of(names, 10)}. Remove them, or hide them with a dot."
    )
    if picture := next(filter(is_frame, names), None):
        message += f" {picture} is a picture, not a clip: put the frames of a clip into a folder or zip of their own."
    raise ValueError(message)


def _existing_folder(folder: str | os.PathLike) -> str:
    """The absolute path of a folder, also one in a zip archive, whose root is `FILE.zip#/`."""
    path = os.path.abspath(os.path.expanduser(folder))
    if place := split_zip_path(path):
        if place[1] not in open_zip(place[0]).folders:
            raise FileNotFoundError(f"There is no folder {place[1]!r} in the zip archive {place[0]}.")
        return path
    if os.path.isfile(path):
        try:
            open_zip(path)
        except zipfile.BadZipFile as error:
            raise NotADirectoryError(
                f"{path} is a file and no readable zip archive ({error}). Pass a folder of videos, or a zip archive; "
                "unpack any other."
            ) from error
        if not path.lower().endswith(".zip"):
            raise NotADirectoryError(f"{path} is a zip archive by another name: give it one that ends in .zip.")
        return f"{path}#/"
    if not os.path.isdir(path):
        raise FileNotFoundError(f"There is no folder of videos {path}.")
    return path


def _all_entries(lists: Mapping[str, Sequence[ListedVideo]]) -> Iterable[ListedVideo]:
    return (entry for entries in lists.values() for entry in entries)


def _to_dataset_dict(rows: Mapping[str, Sequence[tuple[str, str, str]]], class_names: Iterable[str]) -> DatasetDict:
    """Rows of (path, class name, video id) by split as datasets that share the class names."""
    label = ClassLabel(names=list(class_names))
    datasets = DatasetDict()
    for split, entries in rows.items():
        paths, classes, video_ids = ([entry[part] for entry in entries] for part in range(3))
        datasets[split] = video_dataset(paths, label.str2int(classes), video_ids, label)
    return datasets


def video_dataset(
    paths: list[str], labels: list[int], video_ids: list[str], label: ClassLabel, split: str | None = None
) -> Dataset:
    """A dataset of the columns that all here have."""
    features = Features({"video": Video(decode=False), "label": label, "video_id": Value("string")})
    columns = {"video": paths, "label": labels, "video_id": video_ids}
    return Dataset.from_dict(columns, features=features, split=split)
