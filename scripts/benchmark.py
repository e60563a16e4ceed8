"""Speed and memory, ours beside the alternatives: `python scripts/benchmark.py --only head data --json FILE`.

Contenders of a group take turns in one run, so that whatever else the machine does falls on all of them. Shown are
medians, and the median of each round's ratio to the first contender of the group. Peak memory is what one call adds to
what rests in memory before it, each contender in a process of its own. Where contenders compute the same thing, their
outputs are compared before the clock runs.

Parts: head (S-MGA, mixer, C-MGA), adapter (MGA in a frozen ViT), support (kept supports), data (frames, cache, lists).
Contenders that are not installed are named at the end: decord, torchcodec, and the authors' modules, which
`--reference DIR` takes from a checkout of their repository. The code in that checkout is run.
"""

import ast
import functools
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, Video
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel, ResNetConfig

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor
from dmgal_hf.arguments import parse_arguments
from dmgal_hf.configuration_mga import MgaConfig
from dmgal_hf.conversion import official_name
from dmgal_hf.data import EpisodeVideos, collate_episodes, load_benchmark, sample_episodes
from dmgal_hf.data.preparation import PrepareArguments, load_prepared, prepare_videos
from dmgal_hf.motion_attention import (
    CrossMotionAttention,
    MotionFeatures,
    SelfMotionAttention,
    TemporalChannelMixer,
    sinusoidal_position_code,
)
from dmgal_hf.video_decoding import read_frames, segment_indices

NUM_FRAMES = 8
OURS = "dmgal_hf"
LIBRARIES = ("torch", "transformers", "peft", "datasets", "av", "numpy", "decord", "torchcodec")


@dataclass(frozen=True)
class BenchmarkArguments:
    """What is measured, and how often."""

    only: list[str] = field(
        default_factory=lambda: list(PARTS), metadata={"help": "head, adapter, support, data: one or several."}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda."})
    repeats: int = field(default=5, metadata={"help": "Rounds that are timed, after one that is not."})
    threads: int = field(default_factory=lambda: os.cpu_count() or 1, metadata={"help": "Threads of torch."})
    small: bool = field(default=False, metadata={"help": "Tiny shapes, to try the script; the figures mean nothing."})
    memory: bool = field(default=True, metadata={"help": "Measure peak memory; each takes a process and its start."})
    reference: str | None = field(default=None, metadata={"help": "Checkout of ReverseSuzhou/DMGAL, for head."})
    json: str | None = field(default=None, metadata={"help": "Write everything measured into this JSON file."})
    folder: str | None = field(default=None, metadata={"help": "Keep the made videos here; by default none stays."})
    measure_memory: str | None = field(
        default=None, metadata={"help": "GROUP|CONTENDER: print the bytes that its first call adds, nothing else."}
    )

    def __post_init__(self):
        unknown = [part for part in self.only if part not in PARTS]
        if unknown or not self.only:
            raise ValueError(f"only must name parts out of {', '.join(PARTS)}, got {unknown or self.only}.")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if torch.device(self.device).type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}, but torch sees no CUDA device: use cpu.")


@dataclass(frozen=True)
class Run:
    """What is timed, and the module whose dropout is off while outputs are compared."""

    call: Callable[[], Any]
    module: nn.Module | None = None
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """`prepare` is not timed. The output must be that of the contender `same_as`, where one is named."""

    name: str
    prepare: Callable[[], Run]
    same_as: str | None = None


def relative_difference(output: Any, expected: Any) -> dict[str, Any]:
    """Largest difference of two tuples of tensors, relative to the largest value of the expected one."""
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(output, expected, strict=True)]
    return {"difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)}


@dataclass(frozen=True)
class Group:
    """Contenders to be measured side by side; ratios are to the first."""

    name: str
    contenders: list[Contender]
    memory: bool = True
    compare: Callable[[Any, Any], dict[str, Any]] = relative_difference


# Measuring


def measure_group(group: Group, arguments: BenchmarkArguments) -> dict[str, Any]:
    runs = {contender.name: contender.prepare() for contender in group.contenders}
    outputs = {}
    for name, run in runs.items():  # also the round that is not timed
        with without_dropout(run.module):
            outputs[name] = run.call()
    facts = {
        one.name: group.compare(outputs[one.name], outputs[one.same_as]) if one.same_as else {}
        for one in group.contenders
    }
    del outputs
    seconds = time_interleaved({name: run.call for name, run in runs.items()}, arguments)
    first = group.contenders[0].name
    rows = []
    for name, run in runs.items():
        ratio = statistics.median(mine / base for mine, base in zip(seconds[name], seconds[first]))
        row = {"name": name, "median_seconds": statistics.median(seconds[name]), "seconds": seconds[name]}
        rows.append({**row, "time_ratio": ratio, **facts[name], "note": run.note})
    del runs
    gc.collect()
    if group.memory and arguments.memory:
        for row in rows:
            row["peak_bytes"] = memory_of_its_own_process(f"{group.name}|{row['name']}", arguments)
        for row in rows:
            row["memory_ratio"] = row["peak_bytes"] / max(rows[0]["peak_bytes"], 1)
    return {"name": group.name, "baseline": first, "contenders": rows}


def time_interleaved(calls: dict[str, Callable[[], Any]], arguments: BenchmarkArguments) -> dict[str, list[float]]:
    seconds = {name: [] for name in calls}
    names = list(calls)
    for round_number in range(arguments.repeats):
        shift = round_number % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            gc.collect()
            synchronize(arguments.device)
            start = time.perf_counter()
            calls[name]()
            synchronize(arguments.device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def without_dropout(module: nn.Module | None) -> Iterator[None]:
    layers = [] if module is None else [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before):
            layer.p = p


def memory_of_its_own_process(case: str, arguments: BenchmarkArguments) -> int:
    command = [sys.executable, os.path.abspath(__file__), "--measure_memory", case, "--device", arguments.device]
    command += ["--threads", str(arguments.threads), "--only", *arguments.only]
    command += ["--small"] if arguments.small else []
    for name in ("reference", "folder"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", getattr(arguments, name)]
    # With a fixed threshold glibc returns freed tensors at once; else what the preparation freed would hide the rest.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {case!r} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def measure_memory(case: str, arguments: BenchmarkArguments) -> int:
    """Bytes that the first call of one contender adds at its peak; run it in a fresh process."""
    cases = {
        f"{group.name}|{contender.name}": contender
        for part in arguments.only
        for group in PARTS[part](arguments)[0]
        for contender in group.contenders
    }
    if case not in cases:
        raise ValueError(f"measure_memory must be one of {'; '.join(cases)}, got {case!r}.")
    call = cases[case].prepare().call
    gc.collect()
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(arguments.device)
        before = torch.cuda.memory_allocated(arguments.device)
        call()
        return torch.cuda.max_memory_allocated(arguments.device) - before
    before = _reset_peak_resident()
    call()
    return max(_peak_resident() - before, 0)


def _reset_peak_resident() -> int:
    """Bytes resident now, from which the peak is counted anew where the system can do so."""
    if not os.path.exists("/proc/self/clear_refs"):
        return _peak_resident()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_resident()


def _peak_resident() -> int:
    if os.path.exists("/proc/self/status"):
        # Not getrusage: on Linux a new process starts with the peak of the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# head: S-MGA, mixer and C-MGA


class Head(nn.Module):
    """Ours, as DmgalModel uses it: maps (S, T, C, H, W) and (Q, T, C, H, W) -> descriptors (S, T, C), (Q, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        config = DmgalConfig()
        self.self_attention = SelfMotionAttention(config, channels)
        self.mixer = TemporalChannelMixer(NUM_FRAMES, channels)
        self.cross_attention = CrossMotionAttention(config, channels)
        for name, parameter in self.named_parameters():
            if "gamma" in name:  # it starts at 0, which would hide every difference
                nn.init.constant_(parameter, 0.5)

    def forward(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        support, query = (self.mixer(self.self_attention(maps)[0]) for maps in (support, query))
        return self.cross(support, query)

    def cross(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps, keys = self.cross_attention.encode_support(support[None])
        return maps[0].mean((-1, -2)), self.cross_attention.describe(query[None], keys)[0][0]

    def cross_all_maps(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole new maps of the queries, as the equations have them, and their mean afterwards."""
        support, query, _ = self.cross_attention(support[None], query[None])
        return support[0].mean((-1, -2)), query[0].mean((-1, -2))


class PlainHead(nn.Module):
    """The equations of the paper and of the authors' code one after the other, in batched PyTorch, with our weights.

    The supports are repeated for every query, each direction has an attention and a product of its own.
    """

    def __init__(self, head: Head):
        super().__init__()
        self.head = head

    def forward(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        support, query = (self.mix(self.attend_self(maps)) for maps in (support, query))
        return self.cross(support, query)

    @staticmethod
    def motion(features: MotionFeatures, maps: torch.Tensor) -> list[torch.Tensor]:
        """(V, T, C, H, W) -> forward and backward motion, (V·T, P, c) each."""
        bottleneck = features.bottleneck_norm(features.bottleneck(maps.flatten(0, 1)))
        moved = features.neighbour(bottleneck).unflatten(0, maps.shape[:2])
        bottleneck = bottleneck.unflatten(0, maps.shape[:2])
        nothing = torch.zeros_like(bottleneck[:, :1])
        ahead = torch.cat([moved[:, 1:] - bottleneck[:, :-1], nothing], 1).flatten(0, 1)
        back = torch.cat([nothing, moved[:, :-1] - bottleneck[:, 1:]], 1).flatten(0, 1)
        motions = []
        for difference in (ahead, back):
            half = features.half_conv(F.avg_pool2d(difference, 2))
            half = F.interpolate(nn.BatchNorm2d.forward(features.half_norm, half), difference.shape[2:])
            full = nn.BatchNorm2d.forward(features.full_norm, features.full_conv(difference))
            motions.append(features.project((difference + half + full) / 3).flatten(2).transpose(1, 2))
        return motions

    def attend_self(self, maps: torch.Tensor) -> torch.Tensor:
        module = self.head.self_attention
        frames = maps.flatten(0, 1)
        values = module.value(frames).flatten(2).transpose(1, 2)
        attended = 0
        for motion in self.motion(module.motion, maps):
            code = sinusoidal_position_code(*motion.shape[1:], motion.device, motion.dtype)
            motion = module.position_dropout(motion + module.position_scale * code)
            scores = torch.bmm(motion, motion.transpose(1, 2)) / math.sqrt(motion.shape[-1])
            attended = attended + 0.5 * torch.bmm(module.attention_dropout(scores.softmax(-1)), values)
        return (frames + module.gamma * attended.transpose(1, 2).reshape(frames.shape)).view_as(maps)

    def mix(self, maps: torch.Tensor) -> torch.Tensor:
        mixer = self.head.mixer
        x = maps.flatten(3).permute(0, 3, 2, 1)  # (V, P, C, T)
        x = x + mixer.temporal_out(F.relu(mixer.temporal_in(x)))
        x = x.permute(0, 3, 1, 2)  # (V, T, P, C)
        x = x + mixer.channel_out(F.relu(mixer.channel_in(x)))
        return x.transpose(2, 3).reshape(maps.shape)

    def cross(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        module = self.head.cross_attention
        support_values = module.value(support.flatten(0, 1)).view_as(support)
        query_values = module.value(query.flatten(0, 1)).view_as(query)
        values = self.repeat(support_values.flatten(3).transpose(2, 3), len(query))
        motions = zip(self.motion(module.motion, support), self.motion(module.motion, query))
        attended = 0
        for keys, motion in motions:
            keys = self.repeat(module.norm(keys).unflatten(0, support.shape[:2]), len(query))
            scores = torch.bmm(module.norm(motion), keys.transpose(1, 2)) / math.sqrt(keys.shape[-1])
            attended = attended + 0.5 * torch.bmm(module.attention_dropout(scores.softmax(-1)), values)
        attended = attended.transpose(1, 2).reshape(query.shape)
        query = query + module.gamma_self * query_values + module.gamma_cross * attended
        support = support + module.gamma_self * support_values
        return support.mean((-1, -2)), query.mean((-1, -2))

    @staticmethod
    def repeat(maps: torch.Tensor, num_queries: int) -> torch.Tensor:
        """(S, T, P, D) -> (Q·T, S·P, D)."""
        return maps.transpose(0, 1).flatten(1, 2).repeat(num_queries, 1, 1)


class OfficialHead(nn.Module):
    """The authors' three modules, with our weights."""

    NAMES = {"Motion_Excitation": "mSEModule", "mlp_mix1": "MLP_Mix_1", "spa_mix2": "spa_mix_2"}

    def __init__(self, head: Head, checkout: str):
        super().__init__()
        classes = load_official_classes(checkout, [*self.NAMES.values(), "PositionalEncoding"])
        channels = len(head.cross_attention.value.weight)
        for name, class_name in self.NAMES.items():
            self.add_module(name, classes[class_name](channels, n_segment=NUM_FRAMES))
        weights = {official_name(name): tensor for name, tensor in head.state_dict().items()}
        missing = self.load_state_dict(weights, strict=False)
        if missing.unexpected_keys or set(missing.missing_keys) - {"Motion_Excitation.pe.pe"}:
            raise ValueError(f"the modules in {checkout} have other weights than the published ones: {missing}.")

    def forward(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cross(*(self.mlp_mix1(self.Motion_Excitation(maps.flatten(0, 1))) for maps in (support, query)))

    def cross(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        support, query = self.spa_mix2(support.flatten(0, 1), query.flatten(0, 1))
        return support.mean((-1, -2)), query.mean((-1, -2))


def load_official_classes(checkout: str, names: list[str]) -> dict[str, type]:
    """
    Runs these classes of DMGAL.py alone: the file as a whole imports torchvision and seeds every generator.

    Raises:
        FileNotFoundError: the folder holds no DMGAL.py.
        ValueError: a class is not in it.
    """
    path = Path(checkout) / "DMGAL.py"
    if not path.is_file():
        raise FileNotFoundError(f"reference: there is no {path}: give a checkout of ReverseSuzhou/DMGAL.")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    absent = set(names) - {node.name for node in tree.body}
    if absent:
        raise ValueError(f"reference: {path} has no class {', '.join(sorted(absent))}: give the published code.")
    scope = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np, "Variable": torch.autograd.Variable}
    exec(compile(tree, str(path), "exec"), scope)
    return {name: scope[name] for name in names}


@functools.cache
def _head_and_maps(small: bool, device: str) -> tuple[Head, tuple[torch.Tensor, torch.Tensor]]:
    channels, num_support, num_queries = (32, 4, 2) if small else (2048, 25, 20)
    torch.manual_seed(0)
    head = Head(channels).to(device)
    videos = [torch.randn(count, NUM_FRAMES, channels, 7, 7).relu().to(device) for count in (num_support, num_queries)]
    return head, tuple(videos)


def has_fast_bfloat16(device: str) -> bool:
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepare_head(arguments: BenchmarkArguments, kind: str, method: str, training: bool, bfloat16: bool) -> Run:
    """Trains as DMGAL-FT does, where the maps come from a backbone that needs their gradient."""
    head, maps = _head_and_maps(arguments.small, arguments.device)
    device_type = torch.device(arguments.device).type
    makers = {OURS: lambda: head, "plain": lambda: PlainHead(head)}
    makers["authors"] = lambda: OfficialHead(head, arguments.reference).to(arguments.device)
    module = makers[kind]().train(training)
    maps = [one.clone().requires_grad_(training) for one in maps]
    weights = [*maps, *module.parameters()]

    def call():
        module.train(training)  # ours and the plain one share their weights, and so this state
        cast = torch.autocast(device_type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(training), cast:
            descriptors = getattr(module, method)(*maps)
        if not training:
            return descriptors
        loss = sum(one.float().square().mean() for one in descriptors)
        return torch.autograd.grad(loss, weights, allow_unused=True)[: len(maps)]

    return Run(call, module)


def head_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    skipped = [] if arguments.reference else ["the authors' modules (give --reference)"]
    precisions = (False, True) if has_fast_bfloat16(arguments.device) else (False,)
    if len(precisions) == 1:
        skipped.append("bfloat16 (this processor has no instructions for it)")
    groups = []
    for title, method in (("S-MGA, mixer and C-MGA", "forward"), ("C-MGA alone", "cross")):
        kinds = [(OURS, OURS, method), ("plain PyTorch", "plain", method)]
        if method == "cross":
            kinds.insert(1, (f"{OURS}, whole maps", OURS, "cross_all_maps"))
        if arguments.reference:
            kinds.append(("the authors' modules", "authors", method))
        for step in ("forward", "forward and backward"):
            contenders = []
            for bfloat16 in precisions:
                for name, kind, called in kinds:
                    shown = f"{name}, bfloat16" if bfloat16 else name
                    prepare = functools.partial(prepare_head, arguments, kind, called, step != "forward", bfloat16)
                    contenders.append(Contender(shown, prepare, same_as=OURS if contenders else None))
            groups.append(Group(f"{title}: {step}", contenders))
    return groups, skipped


# adapter: MGA in a frozen CLIP ViT-B/16


def clip_config(small: bool) -> CLIPVisionConfig:
    if small:
        return CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                image_size=32, patch_size=8)  # fmt: skip
    return CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                            image_size=224, patch_size=16)  # fmt: skip


def count_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def make_backbone(kind: str, small: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = CLIPVisionModel(clip_config(small)).requires_grad_(False).eval()
    if kind == "frozen":
        return model.to(device)
    if kind == "mga":
        return get_peft_model(model, MgaConfig()).to(device)
    budget = count_trainable(make_backbone("mga", small, "cpu"))
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    of_rank_one = model.config.num_hidden_layers * len(targets) * 2 * model.config.hidden_size
    return get_peft_model(model, LoraConfig(r=max(round(budget / of_rank_one), 1), target_modules=targets)).to(device)


def prepare_adapter(arguments: BenchmarkArguments, kind: str, training: bool) -> Run:
    """One support and one query video; a step of training is forward, backward and AdamW."""
    model = make_backbone(kind, arguments.small, arguments.device)
    size = model.config.image_size if kind == "frozen" else model.base_model.model.config.image_size
    pixel_values = torch.randn(2 * NUM_FRAMES, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixel_values = pixel_values.to(arguments.device)
    facts = {"num_frames": NUM_FRAMES, "num_support": [1]} if kind == "mga" else {}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    share = count_trainable(model) / sum(one.numel() for one in model.parameters() if not one.requires_grad)
    note = f"{count_trainable(model):,} trainable, {share:.2%} of the backbone" if trainable else ""
    optimizer = torch.optim.AdamW(trainable, lr=1e-4) if trainable else None

    def call():
        learns = training and optimizer is not None
        with torch.set_grad_enabled(learns):
            output = model(pixel_values=pixel_values, **facts).last_hidden_state
        if learns:
            output.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return (output,)

    return Run(call, model, note)


def adapter_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    groups = []
    for step in ("forward", "training step"):
        training = step != "forward"
        frozen = "frozen backbone, forward only" if training else "frozen backbone"
        contenders = [
            Contender(name, functools.partial(prepare_adapter, arguments, kind, training), same_as)
            # a fresh adapter of either kind changes nothing, so all outputs are the backbone's
            for name, kind, same_as in (
                (frozen, "frozen", None), ("MGA adapters", "mga", frozen), ("LoRA (peft)", "lora", frozen)
            )
        ]  # fmt: skip
        groups.append(Group(f"CLIP ViT-B/16, 2 videos of {NUM_FRAMES} frames: {step}", contenders))
    return groups, []


# support: one query against kept supports


def _support_config(kind: str, small: bool) -> DmgalConfig:
    if kind == "adapter":
        return DmgalConfig(backbone_config=clip_config(small), paradigm="adapter", adapter_config={})
    if small:
        backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        return DmgalConfig(backbone_config=backbone, motion_reduction=4)
    return DmgalConfig(backbone_config=ResNetConfig())


@functools.lru_cache(maxsize=1)
def _episode(kind: str, small: bool, device: str):
    """A model in eval mode and the videos of an episode: supports (1, S, T, 3, H, W), labels, one query."""
    way, shot, size = (2, 1, 32) if small else (5, 5, 224)
    torch.manual_seed(0)
    model = DmgalModel(_support_config(kind, small)).eval().to(device)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.constant_(parameter, 0.5)
    support = torch.randn(1, way * shot, NUM_FRAMES, 3, size, size, device=device)
    labels = torch.arange(way, device=device).repeat_interleave(shot)[None]
    return model, support, labels, torch.randn(1, 1, NUM_FRAMES, 3, size, size, device=device)


def prepare_query(arguments: BenchmarkArguments, kind: str, contender: str) -> Run:
    model, support, labels, query = _episode(kind, arguments.small, arguments.device)
    if contender == "backbone":
        # of its own: the model's may hold adapters
        torch.manual_seed(0)
        plain = _support_config(kind, arguments.small)
        plain.adapter_config = None
        backbone = DmgalModel(plain).eval().to(arguments.device).backbone
        call = functools.partial(backbone, pixel_values=query.flatten(0, 2))
    elif contender == "kept":
        with torch.no_grad():
            kept = model.encode_support(support, labels)
        call = functools.partial(model, query_pixel_values=query, support=kept)
    else:
        call = functools.partial(model, support, labels, query)

    def call_without_gradient():
        with torch.no_grad():
            output = call()
        return (output.logits,) if contender != "backbone" else None

    return Run(call_without_gradient)


def support_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    groups = []
    for title, kind in (("CLIP ViT-B/16 with adapters", "adapter"), ("ResNet-50, DMGAL-FT", "ft")):
        contenders = [
            Contender(name, functools.partial(prepare_query, arguments, kind, contender), same_as)
            for name, contender, same_as in (
                ("the backbone on one video", "backbone", None),
                ("one query, kept supports", "kept", "one query, whole 5-way 5-shot episode"),
                ("one query, whole 5-way 5-shot episode", "episode", None),
            )
        ]
        groups.append(Group(title, contenders))
    return groups, []


# data: frames, cache, loading, lists


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
    """Files of this kind, written unless they are there: a textured picture under a moving camera, with noise."""
    folder = Path(arguments.folder) / f"{kind.codec}{'_small' if arguments.small else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}{kind.suffix}" for number in range(4)]
    for number, path in enumerate(paths):
        if not path.exists():
            aside = path.with_name(f"aside{kind.suffix}")
            write_clip(aside, kind.reduced() if arguments.small else kind, number)
            aside.rename(path)
    return [str(path) for path in paths]


def write_clip(path: Path, kind: ClipKind, seed: int) -> None:
    generator = np.random.default_rng(seed)
    height, width = kind.height, kind.width
    coarse = generator.integers(30, 226, (height // 8 + 1, width // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)
    scene = coarse[:height, :width] + generator.integers(-20, 21, (height, width, 1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind.codec, rate=kind.rate, options=dict(kind.options))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(kind.num_frames):
            picture = np.roll(scene, (k, 2 * k), (0, 1)) + generator.integers(-3, 4, (height, width, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
    skipped = []
    try:
        import decord  # noqa: F401

        fetchers["decord"] = fetch_by_decord
    except (ImportError, OSError, RuntimeError) as error:
        skipped.append(f"decord ({_first_line(error)})")
    try:
        import torchcodec.decoders  # noqa: F401

        for mode in ("exact", "approximate"):
            fetchers[f"torchcodec, {mode}"] = functools.partial(fetch_by_torchcodec, seek_mode=mode)
    except (ImportError, OSError, RuntimeError) as error:
        skipped.append(f"torchcodec ({_first_line(error)})")
    return fetchers, skipped


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(":. ")


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


def as_dataset(paths: list[str]) -> Dataset:
    """Two classes, half of the clips each."""
    features = Features(
        {"video": Video(decode=False), "label": ClassLabel(names=["bend", "climb"]), "video_id": Value("string")}
    )
    labels = [2 * number // len(paths) for number in range(len(paths))]
    return Dataset.from_dict(
        {"video": paths, "label": labels, "video_id": [Path(path).stem for path in paths]}, features=features
    )


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


def read_lists_plainly(videos: Path, lists: Path) -> dict[str, list[tuple[str, str]]]:
    """The least that any reader must do: list the folder, read the lines, and look every file up. No check."""
    there = {entry.name: entry.path for entry in os.scandir(videos)}
    splits = {}
    for path in lists.iterdir():
        pairs = (line.split("/") for line in path.read_text().splitlines())
        splits[path.name] = [(label, there[f"{video_id}.webm"]) for label, video_id in pairs]
    return splits


def prepare_lists(arguments: BenchmarkArguments, read: Callable[[Path, Path], Any]) -> Run:
    folders = make_lists(arguments)
    return Run(lambda: read(*folders))


def draw_episodes_plainly(labels: list[int], num_episodes: int) -> list[list[list[int]]]:
    """5-way 1-shot with 1 query a class by Python's random module: no list to keep, no random access to episodes."""
    classes: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        classes.setdefault(label, []).append(row)
    generator, rows = random.Random(0), list(classes.values())
    return [[generator.sample(one, 2) for one in generator.sample(rows, 5)] for _ in range(num_episodes)]


def prepare_drawing(arguments: BenchmarkArguments, draw: Callable[..., Any]) -> Run:
    videos, lists = make_lists(arguments)
    labels = load_benchmark("ssv2-full", videos, splits=lists)["train"]["label"][:]
    return Run(lambda: draw(labels, num_episodes=100 if arguments.small else 10_000))


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
    readers = {OURS: lambda videos, lists: load_benchmark("ssv2-full", videos, splits=lists),
               "plain Python, unchecked": read_lists_plainly}  # fmt: skip
    contenders = [Contender(name, prepare(prepare_lists, arguments, read)) for name, read in readers.items()]
    groups.append(Group("dataset of 71,796 listed videos", contenders, memory=False))
    drawers = {OURS: sample_episodes, "plain Python": draw_episodes_plainly}
    contenders = [Contender(name, prepare(prepare_drawing, arguments, draw)) for name, draw in drawers.items()]
    groups.append(Group("10,000 episodes drawn from 67,013 videos", contenders, memory=False))
    return groups, skipped


def _compare_made_clips(kind, arguments, output, expected):
    return compare_frames(make_clips(kind, arguments), output, expected)


PARTS = {"head": head_groups, "adapter": adapter_groups, "support": support_groups, "data": data_groups}


# Reporting


def describe_environment(arguments: BenchmarkArguments) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(arguments.device),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "small": arguments.small,
        "versions": versions,
    }


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def format_environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    small = " Tiny shapes: the figures mean nothing." if environment["small"] else ""
    return (
        f"{environment['device']}, {environment['cpus']} CPUs, {environment['threads']} threads, "
        f"{environment['repeats']} rounds; {versions}.{small}\n"
    )


def format_group(group: dict[str, Any]) -> str:
    """A markdown table."""
    lines = [f"### {group['name']}", "", "| | time, relative | median | peak memory, relative | MB | |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in group["contenders"]:
        cells = [row["name"], f"{row['time_ratio']:.2f}", format_seconds(row["median_seconds"])]
        has_memory = "peak_bytes" in row
        cells += [f"{row['memory_ratio']:.2f}", f"{row['peak_bytes'] / 1e6:.1f}"] if has_memory else ["", ""]
        lines.append(f"| {' | '.join([*cells, format_facts(row)])} |")
    return "\n".join(lines) + "\n"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def format_facts(row: dict[str, Any]) -> str:
    facts = [row["note"]] if row["note"] else []
    if "difference" in row:
        facts.append(f"differs by {row['difference']:.0e}" if row["difference"] else "equal")
    if row.get("wrong_frames"):
        facts.append(f"WRONG: {row['wrong_frames']} of {row['fetched_frames']} are other frames")
    elif "wrong_frames" in row:
        facts.append(f"right frames, at most {row['grey_levels']:.0f} grey levels apart")
    return "; ".join(facts)


def run_benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    result = {"environment": describe_environment(arguments), "parts": {}}
    print(format_environment(result["environment"]), flush=True)
    for part in arguments.only:
        groups, skipped = PARTS[part](arguments)
        measured = []
        for group in groups:
            measured.append(measure_group(group, arguments))
            print(format_group(measured[-1]), flush=True)
        if skipped:
            print(f"Not measured: {'; '.join(skipped)}.\n", flush=True)
        result["parts"][part] = {"groups": measured, "skipped": skipped}
    return result


def main(arguments: BenchmarkArguments) -> None:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() if arguments.folder is None else nullcontext(arguments.folder) as folder:
        arguments = BenchmarkArguments(**{**vars(arguments), "folder": folder})
        if arguments.measure_memory is not None:
            print(measure_memory(arguments.measure_memory, arguments))
            return
        result = run_benchmark(arguments)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*parse_arguments((BenchmarkArguments,)))
