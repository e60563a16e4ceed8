"""Feeding: training episodes from files, from frame caches and from memory to the device, alone and under steps."""

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from datasets import Dataset
from torch.utils.data import DataLoader

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.data import (
    ClipAugmentation,
    EpisodeSource,
    EpisodeVideos,
    augment_ahead,
    collate_episodes,
    load_video_folder,
    pack_episodes,
)
from dmgal_hf.data.frame_memory import FrameMemory
from dmgal_hf.data.preparation import PrepareArguments, load_prepared, prepare_videos
from dmgal_hf.training import train
from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments

from .data import KINETICS, make_clips
from .measuring import NUM_FRAMES, BenchmarkArguments, Contender, Group, Reach, Run, on_gpu
from .models import FULL, TINY

WAY, SHOT, QUERY = 5, 1, 4
CACHES = {"JPEG cache": "jpeg", "raw cache": "raw"}


def make_folder(arguments: BenchmarkArguments) -> Path:
    """A folder of videos with splits, each of five classes of five clips: links to the few that are made."""
    root = Path(arguments.folder).absolute() / f"feed{'_small' if arguments.small else ''}"
    paths = make_clips(KINETICS, arguments)
    for split in ("train", "validation"):
        for label in range(WAY):
            (root / split / f"{split}{label}").mkdir(parents=True, exist_ok=True)
            for number in range(SHOT + QUERY):
                link = root / split / f"{split}{label}" / f"{number}{KINETICS.suffix}"
                if not link.exists():
                    link.symlink_to(Path(paths[(label + number) % len(paths)]).absolute())
    return root


def make_cache(arguments: BenchmarkArguments, frames: str) -> Path:
    """A prepared folder of those videos."""
    root = make_folder(arguments)
    cache = root.with_name(f"{root.name}_{frames}")
    if not cache.exists():
        settings = PrepareArguments(output=str(cache), frames=frames)
        prepare_videos(load_video_folder(root), settings, {"dataset": "folder", "videos": str(root)})
    return cache


def load_source(arguments: BenchmarkArguments, source: str) -> Dataset:
    if source in CACHES:
        return load_prepared(make_cache(arguments, CACHES[source]))["train"]
    return load_video_folder(make_folder(arguments))["train"]


def prepare_feeding(arguments: BenchmarkArguments, source: str, num_episodes: int, workers: int) -> Run:
    """Reads and augments episodes where a run does it: in the workers, or on the GPU."""
    crop, resize = (32, 40) if arguments.small else (224, 256)
    processor = DmgalVideoProcessor(num_frames=NUM_FRAMES, size=resize, crop_size=crop)
    augmentations = (
        ClipAugmentation.for_support(crop, resize), ClipAugmentation.for_query(crop, resize, horizontal_flip=True),
    )  # fmt: skip
    videos, raw, folder = load_source(arguments, source), on_gpu(arguments.device), tempfile.TemporaryDirectory()
    memory = FrameMemory(Path(folder.name), processor, 1 << 40) if source == "memory" else None
    episodes = EpisodeSource(videos["label"], WAY, SHOT, QUERY)
    data = EpisodeVideos(videos, episodes, processor, augmentations, raw=raw, memory=memory)
    loader = DataLoader(
        data, sampler=range(num_episodes), num_workers=workers, persistent_workers=True, pin_memory=raw,
        collate_fn=pack_episodes if raw else collate_episodes,
    )  # fmt: skip

    def call() -> tuple[torch.Tensor, ...]:
        batches = augment_ahead(loader, augmentations, torch.device(arguments.device)) if raw else loader
        return tuple(batch["support_pixel_values"].float().mean() for batch in batches)

    def describe(seconds: float) -> dict[str, Any]:
        return {"episodes_per_second": num_episodes / seconds}

    return Run(call, describe=describe, close=folder.cleanup, local=False)


def prepare_run(arguments: BenchmarkArguments, source: str, num_episodes: int, workers: int) -> Run:
    """A training run from start to end; what its second half logged tells how long a step waits for its episode."""
    place = {"dataset": "folder", "videos": str(make_folder(arguments))}
    if source in CACHES:
        place = {"prepared": str(make_cache(arguments, CACHES[source]))}
    resize, crop = (40, 32) if arguments.small else (256, 224)
    model = ModelArguments(paradigm="adapter", **(TINY if arguments.small else FULL)["adapter"])
    told: dict[str, Any] = {}
    # accelerate takes a GPU where it sees one, unless it is told otherwise.
    on_cpu = "false" if on_gpu(arguments.device) else "true"

    def call():
        with tempfile.TemporaryDirectory() as folder, patch_environment(ACCELERATE_USE_CPU=on_cpu):
            settings = TrainArguments(
                output_dir=folder, way=WAY, shot=SHOT, query=QUERY, num_episodes=num_episodes, learning_rate=1e-4,
                validate_every=num_episodes, validation_episodes=1, test_episodes=0, checkpoint_every=num_episodes,
                mixed_precision="bf16" if on_gpu(arguments.device) else "no", frame_memory=float(source == "memory"),
            )  # fmt: skip
            train(DataArguments(**place, resize=resize, crop_size=crop, num_workers=workers), model, settings)
            history = json.loads(Path(folder, "metrics.json").read_text())["training"]["history"]
        steps = history[len(history) // 2 :]
        seconds = [1 / step["episodes_per_second"] for step in steps]
        waited = [step["data_wait_share"] * one for step, one in zip(steps, seconds, strict=True)]
        told.update(episodes_per_second=len(steps) / sum(seconds), data_wait_share=sum(waited) / sum(seconds))

    return Run(call, describe=lambda seconds: told, local=False)


def feed_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    workers = os.cpu_count() or 1
    alone, under = (2, 4) if arguments.small else (8 * workers, 8)
    if on_gpu(arguments.device) and not arguments.small:
        alone, under = 4 * workers, 4 * workers
    clips = f"{WAY * (SHOT + QUERY)} clips, {KINETICS.name}"
    contenders = [
        Contender(source, functools.partial(prepare_feeding, arguments, source, alone, workers), same_as)
        for source, same_as in (("files", None), ("JPEG cache", "files"), ("raw cache", "files"), ("memory", "files"))
    ]
    groups = [Group(f"{alone} training episodes of {clips}: to the device, {workers} workers", contenders, False)]
    contenders = [
        Contender(source, functools.partial(prepare_run, arguments, source, under, workers))
        for source in ("files", "raw cache")
    ]
    model = "CLIP ViT-B/16" if not arguments.small else "a small ViT"
    title = f"a whole run of {under} such episodes, adapters in {model}"
    reaches = (Reach("raw cache", "data_wait_share", at_most=0.1),) if on_gpu(arguments.device) else ()
    return [*groups, Group(title, contenders, memory=False, most_repeats=1, reaches=reaches)], []
