"""Data: frames of clips, the frame cache, the data loader, lists and episodes."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, Video
from torch.utils.data import DataLoader

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data import EpisodeVideos, collate_episodes, load_benchmark, sample_episodes
from dmgal_hf.data.preparation import PrepareArguments, load_prepared, prepare_videos
from dmgal_hf.model.video_decoding import read_frames, segment_indices

from .measuring import NUM_FRAMES, OURS, BenchmarkArguments, Contender, Group, Run


@dataclass(frozen=True)
class ClipKind:
    """What a benchmark's files are like."""

    name: str
    suffix: str
    codec: str
    height: int
    width: int
    num_frames: int
    rate: int
    options: tuple[tuple[str, str], ...]

    def reduced(self) -> "ClipKind":
        sizes = (self.height // 8 * 2, self.width // 8 * 2, self.num_frames // 4)  # H.264 needs even ones
        return ClipKind(self.name, self.suffix, self.codec, *sizes, self.rate, self.options)


SSV2 = ClipKind("SSv2-like WebM, VP9, 48 frames", ".webm", "libvpx-vp9", 240, 427, 48, 12,
                (("deadline", "realtime"), ("cpu-used", "8")))  # fmt: skip
KINETICS = ClipKind("Kinetics-like MP4, H.264, 300 frames", ".mp4", "libx264", 256, 340, 300, 30,
                    (("g", "250"), ("bf", "3"), ("preset", "fast"), ("sc_threshold", "0")))  # fmt: skip
UCF = ClipKind("UCF-like AVI, MPEG-4, 176 frames", ".avi", "mpeg4", 240, 320, 176, 25,
               (("bf", "2"), ("b", "700k")))  # fmt: skip


def make_clips(kind: ClipKind, arguments: BenchmarkArguments) -> list[str]:
    """Files of this kind."""
    folder = Path(arguments.folder) / f"{kind.codec}{'_small' if arguments.small else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}{kind.suffix}" for number in range(4)]
    for number, path in enumerate(paths):
        write_clip(path, kind.reduced() if arguments.small else kind, number)
    return [str(path) for path in paths]


def write_clip(path: Path, kind: ClipKind, seed: int) -> None:
    """Written unless it is there: a textured picture under a moving camera, with noise."""
    if path.exists():
        return
    generator = np.random.default_rng(seed)
    height, width = kind.height, kind.width
    coarse = generator.integers(30, 226, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    scene = coarse[:height, :width] + generator.integers(-20, 21, (height, width, 1))
    aside = path.with_name(f"aside{path.name}")
    with av.open(str(aside), "w") as container:
        stream = container.add_stream(kind.codec, rate=kind.rate, options=dict(kind.options))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(kind.num_frames):
            picture = np.roll(scene, (k, 2 * k), (0, 1)) + generator.integers(-3, 4, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    aside.rename(path)


def decode_all(path: str) -> torch.Tensor:
    """(N, 3, H, W) uint8, by PyAV alone."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def fetch_from_all(path: str) -> torch.Tensor:
    frames = decode_all(path)
    return frames[segment_indices(len(frames), NUM_FRAMES)]


def fetch_by_decord(path: str) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    frames = reader.get_batch(segment_indices(len(reader), NUM_FRAMES)).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def fetch_by_torchcodec(path: str, seek_mode: str) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode=seek_mode)
    return decoder.get_frames_at(segment_indices(len(decoder), NUM_FRAMES)).data


def find_fetchers() -> tuple[dict[str, Callable[[str], torch.Tensor]], list[str]]:
    """One thread each, as a data loader has several processes."""
    fetchers = {OURS: functools.partial(read_frames, num_frames=NUM_FRAMES), "PyAV, all frames": fetch_from_all}
    by_torchcodec = {
        f"torchcodec, {mode}": functools.partial(fetch_by_torchcodec, seek_mode=mode)
        for mode in ("exact", "approximate")
    }
    skipped = []
    for module, of_module in {"decord": {"decord": fetch_by_decord}, "torchcodec.decoders": by_torchcodec}.items():
        try:
            importlib.import_module(module)
            fetchers |= of_module
        except (ImportError, OSError, RuntimeError) as error:
            skipped.append(f"{module.split('.')[0]} ({str(error).splitlines()[0].rstrip(':. ')})")
    return fetchers, skipped


def compare_frames(paths: list[str], output: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, Any]:
    """Counts the fetched frames that look more like another frame of the clip than like the one that was meant."""
    wrong = 0
    for path, frames in zip(paths, output, strict=True):
        clip = decode_all(path)[..., ::4, ::4].float()
        nearest = [int((clip - frame[..., ::4, ::4].float()).abs().mean((1, 2, 3)).argmin()) for frame in frames]
        wrong += sum(a != b for a, b in zip(nearest, segment_indices(len(clip), NUM_FRAMES), strict=True))
    worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(output, expected, strict=True))
    return {"wrong_frames": wrong, "fetched_frames": len(paths) * NUM_FRAMES, "grey_levels": worst}


def prepare_fetching(kind: ClipKind, arguments: BenchmarkArguments, fetch: Callable[[str], torch.Tensor]) -> Run:
    paths = make_clips(kind, arguments)
    return Run(lambda: [fetch(path) for path in paths])


def as_dataset(paths: list[str], classes: int = 2) -> Dataset:
    """Equally many clips a class."""
    names = [str(number) for number in range(classes)]
    features = Features({"video": Video(decode=False), "label": ClassLabel(names=names), "video_id": Value("string")})
    labels = [classes * number // len(paths) for number in range(len(paths))]
    ids = [Path(path).stem for path in paths]
    return Dataset.from_dict({"video": paths, "label": labels, "video_id": ids}, features=features)


def prepare_cache(arguments: BenchmarkArguments, frames: str) -> Run:
    paths = make_clips(KINETICS, arguments)
    if frames != "none":
        folder = Path(arguments.folder) / f"cache_{frames}{'_small' if arguments.small else ''}"
        settings = PrepareArguments(output=str(folder), frames=frames, num_proc=1)
        prepare_videos(DatasetDict(train=as_dataset(paths)), settings, {"dataset": "benchmark clips"})
        paths = [video["path"] for video in load_prepared(folder)["train"]["video"]]
    return Run(lambda: [read_frames(path, NUM_FRAMES) for path in paths])


def prepare_loading(arguments: BenchmarkArguments, num_workers: int) -> Run:
    videos = as_dataset(make_clips(KINETICS, arguments))
    episodes = sample_episodes(videos["label"], 2, 1, 1, num_episodes=2 if arguments.small else 16)
    episodes = EpisodeVideos(videos, episodes, DmgalVideoProcessor(num_frames=NUM_FRAMES))
    loader = DataLoader(
        episodes, batch_size=1, num_workers=num_workers, persistent_workers=True, collate_fn=collate_episodes
    )
    return Run(lambda: tuple(batch["query_pixel_values"] for batch in loader))


def make_lists(arguments: BenchmarkArguments) -> tuple[Path, Path]:
    """Lists of the size of SSv2-Full's, and a folder of empty files that they name."""
    root = Path(arguments.folder) / f"lists{'_small' if arguments.small else ''}"
    videos, lists = root / "videos", root / "lists"
    if lists.exists():
        return videos, lists
    videos.mkdir(parents=True)
    sizes = {"train": (64, 67013), "val": (12, 1926), "test": (24, 2857)}
    number, texts = 0, {}
    for split, (classes, clips) in sizes.items():
        clips = clips // 50 if arguments.small else clips
        texts[split] = "".join(f"{split}{k % classes}/{number + k}\n" for k in range(clips))
        for k in range(clips):
            (videos / f"{number + k}.webm").touch()
        number += clips
    lists.mkdir()
    for split, text in texts.items():
        (lists / f"{split}list.txt").write_text(text)
    return videos, lists


def prepare_lists(arguments: BenchmarkArguments) -> Run:
    videos, lists = make_lists(arguments)
    return Run(lambda: load_benchmark("ssv2-full", videos, splits=lists))


def prepare_drawing(arguments: BenchmarkArguments) -> Run:
    labels = prepare_lists(arguments).call()["train"]["label"][:]
    return Run(lambda: sample_episodes(labels, num_episodes=100 if arguments.small else 10_000))


def data_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    fetchers, skipped = find_fetchers()
    prepare = functools.partial
    groups = []
    for kind in (SSV2, KINETICS, UCF):
        contenders = [
            Contender(name, prepare(prepare_fetching, kind, arguments, fetch), "PyAV, all frames")
            for name, fetch in fetchers.items()
        ]
        compare = functools.partial(_compare_made_clips, kind, arguments)
        groups.append(Group(f"{NUM_FRAMES} frames of each of 4 clips: {kind.name}", contenders, compare=compare))
    caches = (("file", "none"), ("JPEG cache", "jpeg"), ("raw cache", "raw"))
    contenders = [Contender(name, prepare(prepare_cache, arguments, frames), "file") for name, frames in caches]
    compare = functools.partial(_compare_made_clips, KINETICS, arguments)
    title = f"cache of frames: 4 clips, {KINETICS.name}"
    # no memory: the pages of a mapped file count as resident, and are not its cost
    groups.append(Group(title, contenders, memory=False, compare=compare))
    workers = [
        Contender("1 worker", prepare(prepare_loading, arguments, 1)),
        Contender("2 workers", prepare(prepare_loading, arguments, 2), "1 worker"),
    ]
    groups.append(Group("data loader over episodes", workers, memory=False))
    contenders = [
        Contender("71,796 videos indexed", prepare(prepare_lists, arguments)),
        Contender("10,000 episodes drawn from 67,013 of them", prepare(prepare_drawing, arguments)),
    ]
    groups.append(Group("lists of the size of SSv2-Full's", contenders, memory=False))
    return groups, skipped


def _compare_made_clips(kind, arguments, output, expected):
    return compare_frames(make_clips(kind, arguments), output, expected)
