"""Made-up videos as files and datasets: renders the clips that are not yet in the cache, in several processes."""

import io
import math
import multiprocessing
import operator
import os
import signal
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from datasets import ClassLabel, DatasetDict
from huggingface_hub import constants
from tqdm.auto import tqdm

from .benchmarks import video_dataset
from .clip_looks import FRAMES_PER_SECOND
from .written_aside import written_aside


class MadeUpVideos(NamedTuple):
    """A dataset whose clips are drawn."""

    name: str  # in messages; with underscores, its folder in the cache and its name on the command line
    version: int  # of the generator; it names the folder of the clips
    presets: Collection[str]
    splits: Mapping[str, str]  # of each class, in their order: "train" (base), "validation" or "test" (novel)
    # (class, preset, seed, index) -> (frames, height, width, 3) uint8 RGB; top-level, for spawned processes to find it
    render: Callable[[str, str, int, int], np.ndarray]

    def check(self, preset: str, class_name: str | None = None):
        """Raises `ValueError` where the preset or the class is unknown."""
        if preset not in self.presets:
            raise ValueError(f"unknown preset {preset!r} of {self.name}: use one of {', '.join(self.presets)}")
        if class_name is not None and class_name not in self.splits:
            raise ValueError(
                f"unknown motion class {class_name!r} of {self.name}: use one of {', '.join(self.splits)}"
            )

    def load(
        self,
        preset: str = "plain",
        clips_per_class: int = 40,
        seed: int = 0,
        cache_dir: str | os.PathLike | None = None,
        num_proc: int | None = None,
    ) -> DatasetDict:
        """Make the clips that are not yet in the cache, and offer them as datasets.

        Args:
            preset: "plain" (flat backgrounds), "textured" (patterns on all, less contrast) or, of puppets, "crowd"
                (also other figures and objects that move otherwise, and a post that hides a part).
            clips_per_class: clips a class. Asking for more later only adds files; asking for fewer takes the first
                ones.
            seed: another seed, other clips of the same classes, in a folder of their own.
            cache_dir: where the clips go, by default `<HF_HOME>/dmgal_hf/<name of the dataset>`. A complete cache is
                only read.
            num_proc: processes that make clips, by default one a CPU core. The clips do not depend on it.

        Returns:
            DatasetDict of "train" (base classes), "validation" and "test" (novel classes), with disjoint classes.
            Columns: `video` (`Video(decode=False)`), `label` (`ClassLabel` with the names of all splits), `video_id`.

        Raises:
            ValueError: unknown preset, or `clips_per_class` or `num_proc` below 1.
            OSError: the cache folder cannot be made or written.
        """
        self.check(preset)
        num_proc = (os.cpu_count() or 1) if num_proc is None else num_proc
        for name, value in (("clips_per_class", clips_per_class), ("num_proc", num_proc)):
            if operator.index(value) < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")

        default = Path(constants.HF_HOME, "dmgal_hf", self.name.replace(" ", "_"))
        root = Path(cache_dir) if cache_dir is not None else default
        folder = root.expanduser().absolute() / f"{preset}-seed{operator.index(seed)}-v{self.version}"
        self._make_missing(folder, preset, clips_per_class, seed, num_proc)

        label = ClassLabel(names=list(self.splits))
        splits = DatasetDict()
        for split in ("train", "validation", "test"):
            clips = [(name, i) for name, own in self.splits.items() if own == split for i in range(clips_per_class)]
            paths = [str(folder / name / _clip_name(index)) for name, index in clips]
            ids = [f"{name}_{index:05d}" for name, index in clips]
            labels = label.str2int([name for name, _ in clips])
            splits[split] = video_dataset(paths, labels, ids, label, split)
        return splits

    def _make_missing(self, folder: Path, preset: str, clips_per_class: int, seed: int, num_proc: int):
        try:
            jobs = []
            for name in self.splits:
                (folder / name).mkdir(parents=True, exist_ok=True)
                present = set(os.listdir(folder / name))
                missing = (index for index in range(clips_per_class) if _clip_name(index) not in present)
                jobs += [(self.render, str(folder), name, preset, operator.index(seed), index) for index in missing]
            if jobs:  # fewer than 8 clips are not worth a process
                _write_clips(jobs, min(num_proc, math.ceil(len(jobs) / 8)), self.name)
        except OSError as error:
            raise OSError(
                f"cannot write {self.name} clips under {folder}: {error}; give a writable folder with room as "
                "cache_dir"
            ) from error


def encode_frames(frames: np.ndarray) -> bytes:
    """One H.264 mp4 file, the same bytes on every call."""
    file = io.BytesIO()
    # bitexact: no library version in the file's header.
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=FRAMES_PER_SECOND,
            # A keyframe every 12 frames and no B-frames: a reader that wants 8 of the 48 frames starts at the keyframe
            # before each, and gets frames in the order they are stored. Longer groups save little at this size.
            options={"preset": "veryfast", "crf": "18", "g": "12", "bf": "0", "sc_threshold": "0"},
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1  # x264's output depends on the number of its threads
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _clip_name(index: int) -> str:
    return f"{index:05d}.mp4"


def _write_clip(job: tuple[Callable, str, str, str, int, int]) -> None:
    """Render one clip into its class folder; top-level, with plain arguments, so that a spawned process can run it."""
    render, folder, class_name, preset, seed, index = job
    target = Path(folder) / class_name / _clip_name(index)
    content = encode_frames(render(class_name, preset, seed, index))
    with written_aside(target) as aside:
        aside.write_bytes(content)


def _write_clips(jobs: list[tuple], num_proc: int, name: str) -> None:
    bar = {"total": len(jobs), "desc": f"Making {name}", "unit": "clip"}
    if num_proc == 1:
        for _ in tqdm(map(_write_clip, jobs), **bar):
            pass
        return
    # The start method is the program's own choice (`multiprocessing.set_start_method`), else the platform's default.
    # Ctrl-C is the parent's business: it then drops what is queued, and the processes end with the clip at hand.
    start_method, ignore_ctrl_c = multiprocessing.get_context(), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(num_proc, start_method, initializer=signal.signal, initargs=ignore_ctrl_c)
    try:
        for _ in tqdm(pool.map(_write_clip, jobs, chunksize=4), **bar):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
