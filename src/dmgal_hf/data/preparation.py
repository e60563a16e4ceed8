"""Look at every video of a dataset once, before training: an index of what is there, a report of the videos that
cannot be read, and, where asked for, a cache of their frames.

A prepared folder holds

    settings.json   what it was made from and how
    shards/         one record a video that was read, in Arrow files of a few dozen each
    index/          a `datasets.DatasetDict` on disk: the rows of the dataset it was made from, in their order
    report.json     the broken videos, and counts

A shard is written aside and renamed, so one that is there is complete and never read for twice: a run that was killed
goes on where it stopped, and a later run reads only files whose path, size or time of change is new. What a shard
keeps of files that have changed or gone since is not removed. A shard is a dataset of its own
(`datasets.Dataset.from_file`), with the frames as images.
"""

import io
import json
import logging
import math
import multiprocessing
import operator
import os
import shutil
import signal
import threading
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from huggingface_hub.utils import WeakFileLock
from PIL import Image as PilImage
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from ..model.extracted_frames import map_arrow_file
from ..model.video_decoding import VideoDecodeError, probe_video, segment_indices
from ..model.video_processing_dmgal import RESAMPLE_MODES, resize_short_side
from ..model.zip_archive import open_zip, split_zip_path
from .benchmarks import video_dataset
from .frame_memory import read_in_parts
from .written_aside import replace_file, replace_folder, written_aside

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it with any change to what a shard holds
FRAME_FORMATS = ("none", "jpeg", "raw")
JPEG_QUALITY = 95
MAX_CLIPS_A_SHARD = 64  # what a killed process loses at most
MAX_CLIP_BYTES = 2**31 - 1  # an Arrow array of bytes has 32-bit offsets
SOURCE_FIELDS = ("dataset", "videos", "splits", "class_labels", "preset", "clips_per_class", "cache_dir")

INFO_FEATURES = Features(
    {"num_frames": Value("int64"), "fps": Value("float64"), "height": Value("int64"), "width": Value("int64"),
     "duration": Value("float64"), "error": Value("string")}
)  # fmt: skip
RECORD_FEATURES = Features(
    {"path": Value("string"), "size": Value("int64"), "mtime_ns": Value("int64"), **INFO_FEATURES,
     "frames": List(Image(decode=False))}
)  # fmt: skip


@dataclass
class PrepareArguments:
    """Where the prepared folder goes, and what it holds."""

    output: str | None = HfArg(default=None, help="The prepared folder; run again to go on or add to it.")
    num_proc: int | None = HfArg(default=None, help="Processes that read; by default one a CPU core.")
    frames: str = HfArg(
        default="none", help=f"Cache of frames: none, jpeg (quality {JPEG_QUALITY}), or raw (8-bit RGB, exact)."
    )
    short_side: int = HfArg(
        default=256, help="Cached frames are shrunk to this short side, in pixels; none is enlarged."
    )
    max_frames: int | None = HfArg(
        default=None, help="Cache so many frames a clip, spread evenly. It changes which frames an episode shows."
    )
    resample: int = HfArg(
        default=2, help="Resizing of cached frames: 2 bilinear, 3 bicubic, as the model's processor."
    )

    def __post_init__(self):
        if self.output is None:
            raise ValueError("output is not given: name the folder to write into.")
        if self.frames not in FRAME_FORMATS:
            raise ValueError(f"frames must be one of {', '.join(FRAME_FORMATS)}, got {self.frames!r}.")
        if self.resample not in RESAMPLE_MODES:
            raise ValueError(f"resample must be 2 (bilinear) or 3 (bicubic), got {self.resample!r}.")
        for name in ("num_proc", "short_side", "max_frames"):
            value = getattr(self, name)
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def frame_settings(self) -> dict[str, Any]:
        """What decides on the frames of a cache."""
        if self.frames == "none":
            return {"frames": "none"}
        return {name: getattr(self, name) for name in ("frames", "short_side", "max_frames", "resample")}


class Clip(NamedTuple):
    """A video file, or a folder of frames, and its state: a record holds for exactly this."""

    path: str
    size: int  # bytes
    mtime_ns: int


def describe_source(data: Any) -> dict[str, Any]:
    """The fields of [`DataArguments`] that name a dataset, paths made absolute: the `source` of [`prepare_videos`]."""
    source = {name: getattr(data, name) for name in SOURCE_FIELDS}
    for name in ("videos", "splits", "cache_dir"):
        source[name] = None if source[name] is None else _absolute(source[name])
    if source["class_labels"] is not None:
        source["class_labels"] = [_absolute(path) for path in source["class_labels"]]
    return source


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def prepare_videos(videos: DatasetDict, arguments: PrepareArguments, source: Mapping[str, Any]) -> dict[str, Any]:
    """
    Reads every video of a dataset from its first frame to its last, and writes a prepared folder (see the module).

    A cache keeps all frames of a clip by default, so that reading from it gives frames of the very same numbers as
    reading the file: [`load_prepared`]. Frames whose short side is above `short_side` are shrunk to it, so with
    `short_side` and `resample` as the training's, `raw` gives the very same pixels, too, and `jpeg` nearly so. With
    `max_frames` only the centres of as many equal segments are kept (and read); episodes then draw from these.

    Args:
        videos (`datasets.DatasetDict`): columns `video` (paths), `label` and `video_id`, as the loaders here give it.
        arguments ([`PrepareArguments`]): where to, and what.
        source (`Mapping[str, Any]`): fields that name the dataset, JSON values (`describe_source`). A folder that
            was made from others is refused.

    Returns:
        `dict`: what report.json holds: `videos`, `broken` (a list of `split`, `class`, `video_id`, `path`, `error`),
        `read_now` and `kept`, the numbers of files read by this run and of records of former runs that still hold.

    Raises:
        ValueError: no videos, or the folder holds another dataset, other settings, or something else.
        OSError: the folder cannot be written (permissions, a full disk), a video file is gone, or another run is at
            work on the folder. What is finished stays.
    """
    rows = {split: _list_rows(split, dataset) for split, dataset in videos.items()}
    if not any(rows.values()):
        raise ValueError("the dataset has no videos: there is nothing to prepare.")
    output = Path(arguments.output).expanduser().absolute()
    settings = {"version": FORMAT_VERSION, "source": dict(source), **arguments.frame_settings()}
    with _writing(output):
        (output / "shards").mkdir(parents=True, exist_ok=True)
    with _only_run(output):
        with _writing(output):
            _claim(output, json.loads(json.dumps(settings)))
            for leftover in (output / "shards").glob(".*.aside"):
                leftover.unlink()
        clips = {path: _stat(path) for found in rows.values() for path, _, _ in found}
        records = read_records(output)
        missing = [clip for clip in clips.values() if clip not in records]
        if missing:
            _write_shards(output / "shards", missing, arguments)
            records = read_records(output)
        with _writing(output):
            index = _index(videos, rows, {path: records[clip] for path, clip in clips.items()})
            aside = output / ".index.aside"
            shutil.rmtree(aside, ignore_errors=True)
            index.save_to_disk(str(aside))
            replace_folder(output / "index", aside)
            report = _report(index, read_now=len(missing), kept=len(clips) - len(missing))
            _replace_json(output / "report.json", report)
    return report


def load_prepared(output_dir: str | os.PathLike, resize: int | None = None) -> DatasetDict:
    """
    The dataset that a folder was prepared from, without its broken videos.

    Columns, class names and order of rows are those of the original; `video` points into the cache of frames where
    there is one, else to the original files. Nothing but the index is read here.

    Broken videos have no row, so that no episode can meet one, and later rows move up. Without broken videos an
    episode list of the original holds for this dataset, and the other way round. With some, an episode list drawn
    from the original is refused by its fingerprint of the labels (`check_episodes`): draw it from this dataset.
    (Lists that lost their description, as those from the Hub do, carry no fingerprint.)

    Args:
        output_dir (`str` or `os.PathLike`): what `prepare_videos` has written. It may have been moved since.
        resize (`int`, *optional*): what short side the frames will be resized to, in pixels; a cache of smaller ones
            is refused.

    Returns:
        `datasets.DatasetDict` with the columns `video` (`Video(decode=False)`), `label` and `video_id`.

    Raises:
        FileNotFoundError: no prepared folder, one that is not finished, or one that has lost shards.
        ValueError: a split without any readable video, or a cache of frames smaller than `resize`.
    """
    output = Path(output_dir).expanduser().absolute()
    if not (output / "settings.json").is_file():
        raise FileNotFoundError(f"{output} is no prepared folder: write one with scripts/prepare_data.py.")
    if not (output / "index").is_dir():
        raise FileNotFoundError(f"{output} is not finished: run scripts/prepare_data.py again, it goes on from there.")
    settings = json.loads((output / "settings.json").read_text())
    if resize is not None and settings["frames"] != "none" and settings["short_side"] < resize:
        raise ValueError(
            f"the frames in {output} have a short side of {settings['short_side']}, and resize={resize} would enlarge "
            f"them: set resize to {settings['short_side']}, or prepare another folder with short_side={resize}."
        )
    index = load_from_disk(str(output / "index"))
    _check_shards(output, index)
    has_cache = settings["frames"] != "none"
    return DatasetDict({split: _readable(output, split, rows, has_cache) for split, rows in index.items()})


def prepared_source(output_dir: str | os.PathLike) -> dict[str, Any]:
    """The fields of [`DataArguments`] that name the dataset a folder was prepared from ([`describe_source`])."""
    return json.loads((Path(output_dir).expanduser() / "settings.json").read_text())["source"]


def describe_report(report: Mapping[str, Any], limit: int = 20) -> str:
    """What [`prepare_videos`] returns as a text of a few lines: counts, and the first `limit` broken videos."""
    broken = report["broken"]
    lines = [f"{report['videos']} videos: {report['read_now']} read now, {report['kept']} known, {len(broken)} broken"]
    lines += [f"  {one['split']}: {one['path']} ({one['class']}): {one['error']}" for one in broken[:limit]]
    if len(broken) > limit:
        lines.append(f"  and {len(broken) - limit} more, see report.json")
    return "\n".join(lines)


# The dataset and the folder


def _list_rows(split: str, dataset: Dataset) -> list[tuple[str, int, str]]:
    """(path, label, video id) of each row."""
    rows = []
    for row, (video, label, video_id) in enumerate(zip(dataset["video"], dataset["label"], dataset["video_id"])):
        if video["path"] is None or video["bytes"] is not None:
            raise ValueError(
                f"row {row} of {split} holds the bytes of its video, not its path: there is no file to look at."
            )
        rows.append((video["path"], label, video_id))
    return rows


def _stat(path: str) -> Clip:
    """A folder of frames counts as one file: all their bytes, and the time of the latest change. In a zip archive,
    which is written anew whenever something is added, the checksum of the checksums takes the place of the time."""
    if place := split_zip_path(path):
        places = open_zip(place[0]).find(place[1])
        return Clip(path, int(places[:, 1].sum()), zlib.crc32(places[:, 2].tobytes()))
    stats = [os.stat(path)]
    if os.path.isdir(path):
        stats += [entry.stat() for entry in os.scandir(path)]
    return Clip(path, sum(one.st_size for one in stats), max(one.st_mtime_ns for one in stats))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path} ({error}): give a writable folder with room; what is finished stays."
        ) from error


@contextmanager
def _only_run(output: Path) -> Iterator[None]:
    """Holds the folder for this run; the system frees it if the run is killed."""
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(output / ".lock", timeout=1))
        except TimeoutError as error:
            raise OSError(f"another run is at work on {output}: wait for its end.") from error
        yield


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Writes settings.json, or compares with the one that is there."""
    path = output / "settings.json"
    if not path.exists():
        others = [name for name in os.listdir(output) if name != "shards" and not name.startswith(".")]
        others += os.listdir(output / "shards")
        if others:
            raise ValueError(f"{output} is no prepared folder, it holds {others[0]!r}: give an empty folder.")
        _replace_json(path, settings)
        return
    there = json.loads(path.read_text())
    if differing := differences(there | there["source"], settings | settings["source"], {"source"}):
        raise ValueError(
            f"{output} was prepared otherwise: {'; '.join(differing)}. Restore these, or give another folder."
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """What an error says of the settings, but for the `free` ones, in which two runs differ."""
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in free and before.get(name) != now.get(name)
    ]


def _replace_json(path: Path, value: Any) -> None:
    replace_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# Reading videos into shards


def _write_shards(folder: Path, clips: list[Clip], arguments: PrepareArguments) -> None:
    num_proc = min(arguments.num_proc or os.cpu_count() or 1, len(clips))
    length = min(MAX_CLIPS_A_SHARD, math.ceil(len(clips) / (4 * num_proc)))  # small enough to share the work evenly
    settings = arguments.frame_settings()
    jobs = [(folder, clips[start : start + length], settings) for start in range(0, len(clips), length)]
    with tqdm(total=len(clips), desc="Reading videos", unit="video") as bar:
        if num_proc == 1:
            for job in jobs:
                bar.update(write_shard(*job))
            return
        # Fresh processes: forked ones can hang in the threads of torch. A server imports once for all of them.
        context = multiprocessing.get_context("spawn")
        if "forkserver" in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(num_proc, context, initializer=_start_process)
        try:
            for future in as_completed([pool.submit(write_shard, *job) for job in jobs]):
                bar.update(future.result())
        except BrokenProcessPool as error:
            raise OSError(
                f"a process that read videos into {folder} was killed (out of memory?): run again, it goes on from "
                "there, with a smaller num_proc if it happens again."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes: these end without a word

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def write_shard(folder: Path, clips: Iterable[Clip], settings: Mapping[str, Any]) -> int:
    """
    Reads `clips` and writes their records as one new Arrow file of `folder`, whole or not at all.

    Args:
        settings (`Mapping[str, Any]`): [`PrepareArguments.frame_settings`].

    Returns:
        `int`: the number of records.

    Raises:
        OSError: the file cannot be written.
        ValueError: as [`read_clip`].
    """
    target = Path(folder) / f"{uuid.uuid4().hex}.arrow"
    number, schema = 0, RECORD_FEATURES.arrow_schema
    with (
        _writing(target),
        written_aside(target) as aside,
        pa.OSFile(str(aside), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        for clip in clips:
            record = {**clip._asdict(), **read_clip(clip.path, settings)}
            writer.write_batch(pa.RecordBatch.from_pylist([record], schema))
            number += 1
    return number


def read_clip(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Reads one video to its end.

    Returns:
        `dict`: the entries of `VideoInfo`, `error` (what is wrong, or `None`), and `frames`: one
        `{"bytes": ..., "path": None}` a cached frame, none for a broken video.

    Raises:
        ValueError: the frames are more than an Arrow file can hold.
    """
    caches, info = settings["frames"] != "none", dict.fromkeys(INFO_FEATURES)
    frames: list[bytes] = []
    try:
        probed = probe_video(path)
        info.update(asdict(probed))
        wanted = range(probed.num_frames)
        if caches and settings["max_frames"] is not None and settings["max_frames"] < len(wanted):
            wanted = segment_indices(len(wanted), settings["max_frames"])
        for clip in read_in_parts(path, probed, wanted):
            if caches:
                frames += _encode(clip, settings)
    except VideoDecodeError as error:
        return {**info, "error": error.problem, "frames": []}
    except IndexError:
        return {**info, "error": f"damaged: fewer frames decode than the {len(wanted)} it has", "frames": []}
    if sum(map(len, frames)) > MAX_CLIP_BYTES:
        raise ValueError(
            f"the {len(frames)} cached frames of {path} take more than 2 GiB: use frames=jpeg, a smaller short_side, "
            "or max_frames, in another output folder."
        )
    return {**info, "frames": [{"bytes": data, "path": None} for data in frames]}


def _encode(clip: torch.Tensor, settings: Mapping[str, Any]) -> Iterator[bytes]:
    """(T, 3, H, W) uint8 -> an image file a frame. Raw ones are PPM, which PIL opens fastest of what is not packed."""
    if min(clip.shape[-2:]) > settings["short_side"]:
        clip = resize_short_side(clip, settings["short_side"], settings["resample"])
    for frame in clip.permute(0, 2, 3, 1).contiguous().numpy():
        file = io.BytesIO()
        if settings["frames"] == "jpeg":
            PilImage.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
        else:
            PilImage.fromarray(frame).save(file, "PPM")
        yield file.getvalue()


# Index and report


def read_records(output: Path) -> dict[Clip, dict[str, Any]]:
    """
    All records of a prepared folder: where each lies and its columns of `INFO_FEATURES`; of two of one clip the first,
    by the name of the shard.
    """
    records: dict[Clip, dict[str, Any]] = {}
    columns = [name for name in RECORD_FEATURES if name != "frames"]
    for path in sorted((output / "shards").glob("*.arrow")):
        try:
            rows = map_arrow_file(str(path)).select(columns).to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove it and run scripts/prepare_data.py again."
            ) from error
        for number, row in enumerate(rows):
            clip = Clip(*(row.pop(name) for name in Clip._fields))
            records.setdefault(clip, {**row, "cache_file": path.name, "cache_row": number})
    return records


def _index(
    videos: DatasetDict, rows: Mapping[str, list[tuple[str, int, str]]], records: Mapping[str, dict[str, Any]]
) -> DatasetDict:
    index = DatasetDict()
    for split, found in rows.items():
        features = Features(
            {"path": Value("string"), "video_id": Value("string"), "label": videos[split].features["label"],
             **INFO_FEATURES, "cache_file": Value("string"), "cache_row": Value("int64")}
        )  # fmt: skip
        entries = [
            {"path": path, "video_id": video_id, "label": label, **records[path]} for path, label, video_id in found
        ]
        columns = {name: [entry[name] for entry in entries] for name in features}
        index[split] = Dataset.from_dict(columns, features=features, split=videos[split].split)
    return index


def _report(index: DatasetDict, read_now: int, kept: int) -> dict[str, Any]:
    broken = [
        {"split": split, "class": rows.features["label"].int2str(row["label"])}
        | {name: row[name] for name in ("video_id", "path", "error")}
        for split, rows in index.items()
        for row in rows.select(_numbers(rows, broken=True))
    ]
    return {"videos": sum(map(len, index.values())), "read_now": read_now, "kept": kept, "broken": broken}


def _numbers(rows: Dataset, broken: bool) -> list[int]:
    return [number for number, error in enumerate(rows["error"]) if (error is not None) is broken]


def _check_shards(output: Path, index: DatasetDict) -> None:
    there = set(os.listdir(output / "shards"))
    lost = sorted({name for rows in index.values() for name in rows.unique("cache_file")} - there)
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} files are missing in {output / 'shards'} ({lost[0]}, ...): run scripts/prepare_data.py "
            "again, it makes them anew."
        )


def _readable(output: Path, split: str, rows: Dataset, has_cache: bool) -> Dataset:
    """The rows of a split that are not broken, as the loaders give them."""
    label = rows.features["label"]
    kept = rows.select(_numbers(rows, broken=False))
    if len(kept) == 0 < len(rows):
        raise ValueError(f"no video of the split {split!r} in {output} can be read: see report.json there.")
    if len(kept) < len(rows):
        emptied = [label.names[number] for number in sorted(set(rows["label"]) - set(kept["label"]))]
        logger.warning(
            "%d of %d videos of the split %s are left out as broken%s: see %s",
            len(rows) - len(kept), len(rows), split,
            f", among them all of the classes {', '.join(emptied)}" if emptied else "", output / "report.json",
        )  # fmt: skip
    paths = kept["path"][:]
    if has_cache:
        paths = [f"{output / 'shards' / name}#{row}" for name, row in zip(kept["cache_file"], kept["cache_row"])]
    return video_dataset(paths, kept["label"][:], kept["video_id"][:], label, rows.split)
