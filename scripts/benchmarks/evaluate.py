"""Evaluation: every clip encoded once for all episodes, beside every episode read and encoded by itself."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport, DmgalVideoProcessor
from dmgal_hf.data import EpisodeVideos, collate_episodes, encode_clips, load_motion_shapes, sample_episodes
from dmgal_hf.model.video_decoding import read_frames
from dmgal_hf.training import evaluate_episodes

from .data import KINETICS, ClipKind, as_dataset, write_clip
from .measuring import NUM_FRAMES, OURS, BenchmarkArguments, Contender, Count, Group, Run
from .models import SHAPES, SHAPES_CROP, TINY, clip_config

CLIP = ClipKind("MP4, H.264, 96 frames", ".mp4", "libx264", 256, 340, 96, 30, KINETICS.options)
CLIPS_TOGETHER = 8  # in the pass over all clips
PLAIN = "every episode by itself"
ONE_PASS = "one pass over the clips"


@dataclass(frozen=True)
class Protocol:
    """A split of classes, and what of it is evaluated; `sample` episodes are run by themselves."""

    classes: int = 24
    clips: int = 20
    way: int = 5
    shot: int = 5
    query: int = 1
    episodes: int = 2000
    sample: int = 16


SPLIT, SMALL_SPLIT = Protocol(), Protocol(classes=3, clips=4, way=2, shot=1, episodes=8, sample=2)
# In training by the quick start; all of it is run the plain way.
VALIDATION, SMALL_VALIDATION = (
    Protocol(clips=40, shot=1, episodes=50, sample=50), Protocol(clips=2, way=2, shot=1, episodes=4, sample=4),
)  # fmt: skip


def split_protocol(arguments: BenchmarkArguments) -> Protocol:
    return SMALL_SPLIT if arguments.small else SPLIT


def make_split(arguments: BenchmarkArguments, protocol: Protocol) -> Dataset:
    """A file for every clip."""
    folder = Path(arguments.folder) / f"evaluate{'_small' if arguments.small else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    numbers, kind = range(protocol.classes * protocol.clips), CLIP.reduced() if arguments.small else CLIP
    paths = [folder / f"{number}{CLIP.suffix}" for number in numbers]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write_clip, paths, [kind] * len(paths), numbers, chunksize=8))
    return as_dataset([str(path) for path in paths], protocol.classes)


def make_model(arguments: BenchmarkArguments, paradigm: str) -> tuple[DmgalModel, DmgalVideoProcessor]:
    """Those of the quick starts, away from their start, so that supports and queries matter to each other."""
    fields, crop = (TINY[paradigm], 32) if arguments.small else (SHAPES[paradigm], SHAPES_CROP[paradigm])
    torch.manual_seed(0)
    model = DmgalModel(DmgalConfig(paradigm=paradigm, num_frames=NUM_FRAMES, **fields)).to(arguments.device).eval()
    for name, parameter in model.named_parameters():
        if ".up." in name or "gamma" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, DmgalVideoProcessor(num_frames=NUM_FRAMES, size=crop * 9 // 8, crop_size=crop)


def prepare_ours(arguments: BenchmarkArguments, paradigm: str, videos: Callable, protocol: Protocol) -> Run:
    (model, processor), videos = make_model(arguments, paradigm), videos()
    episodes = draw(videos, protocol, protocol.episodes)
    accelerator = make_accelerator(arguments)

    def call() -> dict[str, Any]:
        return evaluate_episodes(model, processor, videos, episodes, accelerator, num_workers=workers(arguments))

    return Run(call)


def prepare_plain(arguments: BenchmarkArguments, paradigm: str, videos: Callable, protocol: Protocol) -> Run:
    """As it was done before, of the first episodes alone."""
    (model, processor), videos = make_model(arguments, paradigm), videos()
    data = EpisodeVideos(videos, draw(videos, protocol, protocol.sample), processor)

    def call() -> torch.Tensor:
        predicted = []
        for batch in DataLoader(data, num_workers=workers(arguments), collate_fn=collate_episodes):
            frames = [processor.normalize(batch[f"{part}_pixel_values"].to(arguments.device))
                      for part in ("support", "query")]  # fmt: skip
            with torch.no_grad():
                logits = model(frames[0], batch["support_labels"].to(arguments.device), frames[1]).logits
            predicted.append((logits.argmax(-1).cpu() == batch["labels"]).float().mean())
        return torch.stack(predicted)

    done = "all of them" if protocol.sample == protocol.episodes else f"extrapolated from {protocol.sample} episodes"
    return Run(call, note=done, times=protocol.sample / protocol.episodes)


def prepare_one_pass(arguments: BenchmarkArguments, paradigm: str, videos: Callable, protocol: Protocol) -> Run:
    """Every clip read and put through the model as a support, of which nothing is kept."""
    (model, processor), videos = make_model(arguments, paradigm), videos()

    def call() -> None:
        loader = DataLoader(Frames(videos, processor), batch_size=CLIPS_TOGETHER, num_workers=workers(arguments))
        for frames in loader:
            frames = processor.normalize(frames.to(arguments.device))[None]
            labels = torch.zeros(frames.shape[:2], dtype=torch.int64, device=arguments.device)
            with torch.no_grad():
                model.encode_support(frames, labels, way=1)

    return Run(call)


class Frames(torch.utils.data.Dataset):
    """Row -> (T, 3, H, W) uint8."""

    def __init__(self, videos: Dataset, processor: DmgalVideoProcessor):
        self.videos, self.processor = videos["video"][:], processor

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.processor.resize_and_crop(read_frames(self.videos[row], NUM_FRAMES))


def draw(videos: Dataset, protocol: Protocol, num_episodes: int) -> Dataset:
    return sample_episodes(videos["label"], protocol.way, protocol.shot, protocol.query, num_episodes)


def workers(arguments: BenchmarkArguments) -> int:
    """Processes that read, the same for all contenders; their start would take longer than a small part."""
    return 0 if arguments.small else 1


def make_accelerator(arguments: BenchmarkArguments) -> Accelerator:
    return Accelerator(cpu=torch.device(arguments.device).type == "cpu")


def compare_accuracies(arguments, paradigm, videos, protocol, output: torch.Tensor, _) -> dict[str, Any]:
    """The accuracy of the sample, either way."""
    (model, processor), videos = make_model(arguments, paradigm), videos()
    episodes = draw(videos, protocol, protocol.sample)
    metrics = evaluate_episodes(model, processor, videos, episodes, make_accelerator(arguments))
    return {"difference": abs(metrics["accuracy"] / 100 - float(output.double().mean()))}


def prepare_second_half(arguments: BenchmarkArguments, paradigm: str, episodes: int) -> Run:
    """The episodes alone, 1-shot: clips are kept."""
    protocol = replace(split_protocol(arguments), shot=1)
    (model, processor), videos = make_model(arguments, paradigm), make_split(arguments, protocol)
    accelerator = make_accelerator(arguments)
    kept = encode_clips(model, processor, videos, num_workers=workers(arguments))
    drawn = draw(videos, protocol, episodes)
    evaluate = functools.partial(evaluate_episodes, model, processor, videos, accelerator=accelerator, kept=kept)
    evaluate(episodes=draw(videos, protocol, 2))  # what a first call loads is not the episodes'
    return Run(lambda: evaluate(episodes=drawn))


@torch.no_grad()
def backbone_flops(arguments: BenchmarkArguments, kept: bool) -> int:
    """Of all episodes, with adapters in CLIP ViT-B/16, from those of one clip as a support and as a query."""
    protocol = split_protocol(arguments)
    torch.manual_seed(0)
    fields = {"paradigm": "adapter", "adapter_config": {}, "frame_pooling": "cls"}
    model = DmgalModel(DmgalConfig(backbone_config=clip_config(arguments.small), **fields)).eval()
    size = model.config.backbone_config.image_size
    clip = torch.randn(1, NUM_FRAMES, 3, size, size)
    num_support, num_query = protocol.way * protocol.shot, protocol.way * protocol.query
    labels = torch.arange(protocol.way).repeat_interleave(protocol.shot)[None]

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        counts = counter.get_flop_counts()  # by module, as it is called from the outermost one
        name = "DmgalModel.backbone" if "DmgalModel" in counts else type(model.backbone).__name__
        return sum(counts[name].values())

    encoded = {name: one[None] for name, one in model.encode_clips(clip).items()}
    supports = {name: one.expand(-1, num_support, *one.shape[2:]) for name, one in encoded.items()}
    if not kept:
        as_support = count(lambda: model.encode_support(clip[None], labels[:, :1]))
        support = DmgalSupport.from_clips(supports, labels, protocol.way)
        as_query = count(lambda: model(query_pixel_values=clip[None], support=support))
        return protocol.episodes * (num_support * as_support + num_query * as_query)
    once = count(lambda: model.encode_clips(clip))
    again = count(lambda: model.score_clips(supports, labels, encoded))
    return protocol.classes * protocol.clips * once + protocol.episodes * num_query * again


def evaluate_groups(arguments: BenchmarkArguments) -> tuple[list[Group | Count], list[str]]:
    protocol, validation = split_protocol(arguments), SMALL_VALIDATION if arguments.small else VALIDATION
    split = functools.partial(make_split, arguments, protocol)

    def shapes() -> Dataset:
        return load_motion_shapes(clips_per_class=validation.clips, cache_dir=arguments.folder)["validation"]

    title = f"{protocol.episodes:,} episodes of {protocol.way}-way {protocol.shot}-shot over "
    title += f"{protocol.classes} x {protocol.clips} clips, {CLIP.name}"
    of_training = f"validation in the quick start, {validation.episodes} episodes of motion shapes"
    groups = []
    for paradigm, name in (("ft", "DMGAL-FT, a small ResNet"), ("adapter", "adapters in a small ViT")):
        for what, videos, asked in ((title, split, protocol), (of_training, shapes, validation)):
            prepared = (arguments, paradigm, videos, asked)
            contenders = [
                Contender(OURS, functools.partial(prepare_ours, *prepared)),
                Contender(PLAIN, functools.partial(prepare_plain, *prepared), same_as=OURS),
                Contender(ONE_PASS, functools.partial(prepare_one_pass, *prepared)),
            ]
            compare = functools.partial(compare_accuracies, *prepared)
            groups.append(Group(f"{name}: {what}", contenders, memory=False, compare=compare))
        counts = (protocol.episodes // 4, protocol.episodes * 5 // 2)
        contenders = [
            Contender(f"{count:,} episodes", functools.partial(prepare_second_half, arguments, paradigm, count))
            for count in counts
        ]
        groups.append(
            Group(f"{name}: the episodes alone, {protocol.way}-way 1-shot, on kept clips", contenders, most_repeats=1)
        )
    counts = {OURS: functools.partial(backbone_flops, arguments, True),
              PLAIN: functools.partial(backbone_flops, arguments, False)}  # fmt: skip
    groups.append(Count(f"backbone, adapters in CLIP ViT-B/16: {title}", counts))
    return groups, []
