"""Kept supports: one query against them beside the backbone alone and a whole episode; a stream of queries."""

import dataclasses
import functools
from pathlib import Path

import torch
from torch import nn
from transformers import Pipeline, pipeline

from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport, DmgalVideoProcessor
from dmgal_hf.inference.pipeline import TASK
from dmgal_hf.inference.streaming import FRAMES_TOGETHER
from dmgal_hf.model.video_decoding import read_frames_at

from .data import KINETICS, write_clip
from .measuring import NUM_FRAMES, BenchmarkArguments, Contender, Group, Reach, Run, as_graph, count_flops, on_gpu
from .models import FULL, TINY, clip_config

WINDOW, STRIDE = 2.0, 0.5  # seconds
ADAPTERS = {"adapter": {}, "pooling adapter": {"support_pooling": 2}}


def _support_config(kind: str, small: bool) -> DmgalConfig:
    if kind in ADAPTERS:
        return DmgalConfig(backbone_config=clip_config(small), paradigm="adapter", adapter_config=ADAPTERS[kind])
    return DmgalConfig(**(TINY if small else FULL)["ft"])


@functools.lru_cache(maxsize=1)
def _episode(kind: str, small: bool, device: str):
    """A model in eval mode and the videos of an episode: supports (1, S, T, 3, H, W), labels, one query."""
    way, shot, size = (2, 1, 32) if small else (5, 5, 224)
    torch.manual_seed(0)
    dtype = _dtype(device)
    model = DmgalModel(_support_config(kind, small)).eval().to(device, dtype)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.constant_(parameter, 0.5)
    support = torch.randn(1, way * shot, NUM_FRAMES, 3, size, size, device=device, dtype=dtype)
    labels = torch.arange(way, device=device).repeat_interleave(shot)[None]
    return model, support, labels, torch.randn(1, 1, NUM_FRAMES, 3, size, size, device=device, dtype=dtype)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if on_gpu(device) else torch.float32


@functools.lru_cache(maxsize=1)
def _kept_support(kind: str, small: bool, device: str) -> DmgalSupport:
    model, support, labels, _ = _episode(kind, small, device)
    with torch.no_grad():
        return model.encode_support(support, labels)


def _kept_few(kept: DmgalSupport) -> DmgalSupport:
    """One support of each class."""
    return kept.select([kept.labels[0].tolist().index(label) for label in range(kept.way)])


def _kept_many(kept: DmgalSupport) -> DmgalSupport:
    """Four times the classes, of the same videos: what a query costs does not depend on what they show."""
    many = DmgalSupport.cat([kept] * 4)
    labels = torch.cat([kept.labels + n * kept.way for n in range(4)], 1)
    return dataclasses.replace(many, labels=labels, way=4 * kept.way)


def prepare_query(arguments: BenchmarkArguments, kind: str, contender: str, graph: bool = False) -> Run:
    model, support, labels, query = _episode(kind, arguments.small, arguments.device)
    note = ""
    if contender == "backbone":
        # of its own: the model's may hold adapters
        torch.manual_seed(0)
        plain = _support_config(kind, arguments.small)
        plain.adapter_config = None
        backbone = DmgalModel(plain).eval().to(arguments.device, _dtype(arguments.device)).backbone
        call = functools.partial(backbone, pixel_values=query.flatten(0, 2))
    elif contender in KEPT:
        kept = KEPT[contender](_kept_support(kind, arguments.small, arguments.device))
        call = functools.partial(model, query_pixel_values=query, support=kept)
        size = sum(tensor.nbytes for tensor in (kept.features, *kept.states.values()))
        note = f"{size / kept.features.shape[1] / 1e6:.2f} MB a kept clip"
    else:
        call = functools.partial(model, support, labels, query)

    def call_without_gradient():
        with torch.no_grad():
            output = call()
        return (output.logits,) if contender != "backbone" else None

    if graph:
        return Run(as_graph(call_without_gradient), note=note, flops=count_flops(call_without_gradient))
    return Run(call_without_gradient, note=note)


KEPT = {"few": _kept_few, "same": lambda kept: kept, "many": _kept_many}


def _long_video(arguments: BenchmarkArguments) -> tuple[str, int]:
    """A file of 30 frames a second like those of Kinetics, and its seconds."""
    seconds = 6 if arguments.small else 60
    path = Path(arguments.folder) / f"{seconds}_seconds.mp4"
    write_clip(path, dataclasses.replace(KINETICS, num_frames=seconds * KINETICS.rate), seed=0)
    return str(path), seconds


def _classifier(arguments: BenchmarkArguments, kind: str, cuda_graphs: bool = True) -> Pipeline:
    """Fitted with the supports of the episode."""
    model, support, labels, _ = _episode(kind, arguments.small, arguments.device)
    size, way = support.shape[-1], int(labels.max()) + 1
    processor = DmgalVideoProcessor(num_frames=NUM_FRAMES, size=size * 8 // 7, crop_size=size)
    options = {"device": arguments.device, "cuda_graphs": cuda_graphs}
    classifier = pipeline(TASK, model=model, image_processor=processor, **options)
    clips = (support[0].permute(0, 1, 3, 4, 2).sigmoid() * 255).byte().cpu().unflatten(0, (way, -1))
    return classifier.fit({f"class {n}": list(clips[n].numpy()) for n in range(way)})


def prepare_answer(arguments: BenchmarkArguments, kind: str, cuda_graphs: bool) -> Run:
    """What the pipeline computes of a query once it is read, as far as its logits on the host."""
    classifier = _classifier(arguments, kind, cuda_graphs)
    inputs = {"pixel_values": _episode(kind, arguments.small, arguments.device)[3][0], "error": None}

    def call():
        return (classifier.forward(inputs)["logits"],)

    flops = count_flops(call)  # of a call that is not replayed yet
    call()
    return Run(call, flops=flops)


def prepare_stream(arguments: BenchmarkArguments, kind: str, contender: str) -> Run:
    """The stream, or what it cannot do without: each of the frames that its windows take once through the backbone."""
    path, seconds = _long_video(arguments)
    classifier = _classifier(arguments, kind)
    model, processor = classifier.model, classifier.image_processor
    spacing = WINDOW / NUM_FRAMES
    taken = [int((k + 0.5) * spacing * KINETICS.rate) for k in range(int(seconds / spacing))]

    def pass_once():
        clip = processor.resize_and_crop(read_frames_at(path, taken))
        with torch.no_grad():
            for frames in clip.split(FRAMES_TOGETHER):
                model.encode_frames(processor.normalize(frames).to(arguments.device))

    if contender == "pass":
        return Run(pass_once, note=f"{len(taken)} of {seconds * KINETICS.rate} frames")
    stride = STRIDE if contender == "overlapping" else WINDOW
    windows = len(list(classifier.stream(path, WINDOW, stride)))
    return Run(lambda: list(classifier.stream(path, WINDOW, stride)), note=f"{windows} windows")


def stream_group(arguments: BenchmarkArguments) -> Group:
    contenders = [
        Contender(name, functools.partial(prepare_stream, arguments, "ft", contender))
        for name, contender in (
            ("one pass of the backbone over its sampled frames", "pass"),
            ("stream, windows end to end: once through the whole model", "apart"),
            ("stream, a window every 0.5 s", "overlapping"),
        )
    ]
    return Group("ResNet-50, DMGAL-FT: 60 s in windows of 2 s", contenders)


def gpu_groups(arguments: BenchmarkArguments) -> list[Group]:
    """In bf16, with and without the host that launches every kernel."""
    groups, prepare = [], functools.partial
    for title, kind, most in (("CLIP ViT-B/16 with adapters", "adapter", 1.3), ("ResNet-50, DMGAL-FT", "ft", 1.15)):
        backbone = "the backbone on one video, CUDA graph"
        query, plain = "one query, kept 5-way 5-shot supports", "one query, cuda_graphs=False"
        contenders = [
            Contender(backbone, prepare(prepare_query, arguments, kind, "backbone", True)),
            Contender(query, prepare(prepare_answer, arguments, kind, True), same_as=plain),
            Contender(plain, prepare(prepare_answer, arguments, kind, False)),
            Contender("the backbone on one video", prepare(prepare_query, arguments, kind, "backbone")),
        ]
        groups.append(Group(f"{title}, bf16", contenders, reaches=(Reach(query, "seconds", backbone, at_most=most),)))
    return groups


def support_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    if on_gpu(arguments.device):
        return gpu_groups(arguments), ["streams (--device cpu)"]
    groups = []
    for title, kind in (
        ("CLIP ViT-B/16 with adapters", "adapter"),
        ("CLIP ViT-B/16 with adapters of support_pooling=2", "pooling adapter"),
        ("ResNet-50, DMGAL-FT", "ft"),
    ):
        contenders = [
            Contender(name, functools.partial(prepare_query, arguments, kind, contender), same_as)
            for name, contender, same_as in (
                ("the backbone on one video", "backbone", None),
                ("one query, kept 5-way 1-shot supports", "few", None),
                ("one query, kept 5-way 5-shot supports", "same", "one query, whole 5-way 5-shot episode"),
                ("one query, kept 20-way 5-shot supports", "many", None),
                ("one query, whole 5-way 5-shot episode", "episode", None),
            )
        ]
        groups.append(Group(title, contenders))
    return [*groups, stream_group(arguments)], []
