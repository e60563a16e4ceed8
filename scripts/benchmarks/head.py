"""The head: S-MGA, mixer and C-MGA beside the plain equations and the authors' modules."""

import ast
import copy
import functools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dmgal_hf import DmgalConfig
from dmgal_hf.hub.conversion import official_name
from dmgal_hf.model.motion_attention import (
    CrossMotionAttention,
    MixedMaps,
    MotionFeatures,
    SelfMotionAttention,
    TemporalChannelMixer,
    sinusoidal_position_code,
)
from dmgal_hf.training.acceleration import compile_regions

from .measuring import (
    NUM_FRAMES,
    OURS,
    BenchmarkArguments,
    Contender,
    Group,
    Reach,
    Run,
    as_graph,
    count_flops,
    on_gpu,
)


class Head(nn.Module):
    """Ours, as DmgalModel uses it: maps (S, T, C, H, W) and (Q, T, C, H, W) -> descriptors (S, T, C), (Q, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        config = DmgalConfig()
        self.self_attention = SelfMotionAttention(config, channels)
        self.mixer = TemporalChannelMixer(NUM_FRAMES, channels)
        self.cross_attention = CrossMotionAttention(config, channels)
        self.backbone = nn.Identity()  # which a DmgalModel has, for compile_regions
        for name, parameter in self.named_parameters():
            if "gamma" in name:  # it starts at 0, which would hide every difference
                nn.init.constant_(parameter, 0.5)

    def forward(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        support = self.mixer(self.self_attention(support)[0])
        # As DmgalModel does, but for training: the mixer's last product is folded into what C-MGA reads of a query.
        folds = not self.training and self.cross_attention.prefers_mixed(query.shape[1:])
        query = self.self_attention(query)[0]
        return self._describe(support, self.mixer.mix(query) if folds else self.mixer(query)[None])

    def cross(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._describe(support, query[None])

    def _describe(self, support: torch.Tensor, query: torch.Tensor | MixedMaps) -> tuple[torch.Tensor, torch.Tensor]:
        descriptors, keys = self.cross_attention.encode_support(support[None])
        return descriptors[0], self.cross_attention.describe(query, keys)[0][0]


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


class LastHiddenState(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.backbone(pixel_values).last_hidden_state


def load_official_model(checkout: str, backbone: nn.Module) -> nn.Module:
    """
    The authors' whole model around a ResNet-50 of transformers, which has the layers of torchvision's; for what their
    file imports there are stand-ins.
    """
    names = [*OfficialHead.NAMES.values(), "PositionalEncoding", "DMAGL", "cos_sim", "extract_class_indices"]
    axes = {
        "b s d -> (b s) d": lambda x, **_: x.flatten(0, 1),
        "(tb ts) (sb ss) -> tb sb ts ss": lambda x, tb, sb: (
            x.unflatten(1, (sb, -1)).unflatten(0, (tb, -1)).transpose(1, 2)
        ),
        "c q -> q c": lambda x, **_: x.T,
    }
    resnet = nn.Sequential(LastHiddenState(backbone), nn.Identity(), nn.Identity())  # the last two are cut off
    stand_ins = {
        "models": SimpleNamespace(resnet50=lambda pretrained: resnet),
        "rearrange": lambda x, pattern, **sizes: axes[pattern](x, **sizes),
        "split_first_dim_linear": lambda x, sizes: x.reshape(*sizes, -1),
        "NUM_SAMPLES": 1,
    }
    model = load_official_classes(checkout, names, stand_ins)["DMAGL"]
    channels = backbone.config.hidden_sizes[-1]
    return model(SimpleNamespace(method="resnet50", trans_linear_in_dim=channels, seq_len=NUM_FRAMES))


def load_official_classes(
    checkout: str, names: list[str], stand_ins: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    Runs these classes and functions of DMGAL.py alone: the file as a whole imports torchvision and seeds every
    generator.

    Raises:
        FileNotFoundError: the folder holds no DMGAL.py.
        ValueError: a class is not in it.
    """
    path = Path(checkout) / "DMGAL.py"
    if not path.is_file():
        raise FileNotFoundError(f"reference: there is no {path}: give a checkout of ReverseSuzhou/DMGAL.")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    absent = set(names) - {node.name for node in tree.body}
    if absent:
        raise ValueError(f"reference: {path} has no class {', '.join(sorted(absent))}: give the published code.")
    scope = {"torch": torch, "nn": nn, "F": F, "math": math, "np": np, "Variable": torch.autograd.Variable,
             **(stand_ins or {})}  # fmt: skip
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
    head, maps = _head_and_maps(arguments.small, arguments.device)
    makers = {OURS: lambda: head, "plain": lambda: PlainHead(head)}
    makers["authors"] = lambda: OfficialHead(head, arguments.reference).to(arguments.device)
    return call_head(makers[kind](), method, maps, training, arguments.device, bfloat16)


def prepare_replayed(arguments: BenchmarkArguments, method: str) -> Run:
    """Ours in bfloat16, as training does it with torch_compile and cuda_graphs."""
    head, maps = copy.deepcopy(_head_and_maps(arguments.small, arguments.device))
    compile_regions(head)
    call = call_head(head, method, maps, True, arguments.device, bfloat16=True).call
    return Run(as_graph(call), flops=count_flops(call))


def call_head(
    module: nn.Module, method: str, maps: list[torch.Tensor], training: bool, device: str, bfloat16: bool = False
) -> Run:
    """Trains as DMGAL-FT does, where the maps come from a backbone that needs their gradient."""
    maps = [one.clone().requires_grad_(training) for one in maps] if training else maps
    weights = [*maps, *module.parameters()]
    device_type = torch.device(device).type

    def call():
        module.train(training)  # ours and the plain one share their weights, and so this state
        cast = torch.autocast(device_type, torch.bfloat16) if bfloat16 else nullcontext()
        with torch.set_grad_enabled(training), cast:
            descriptors = getattr(module, method)(*maps)
        if not training:
            return descriptors
        # Not autograd.grad(), in which operations cannot be counted.
        sum(one.float().square().mean() for one in descriptors).backward()
        gradients = tuple(one.grad for one in maps)
        for one in weights:
            one.grad = None
        return gradients

    return Run(call, module)


def head_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    skipped = [] if arguments.reference else ["the authors' modules (give --reference)"]
    precisions = (False, True) if has_fast_bfloat16(arguments.device) else (False,)
    if len(precisions) == 1:
        skipped.append("bfloat16 (this processor has no instructions for it)")
    groups = []
    for title, method in (("S-MGA, mixer and C-MGA", "forward"), ("C-MGA alone", "cross")):
        kinds = {OURS: OURS, "plain PyTorch": "plain"}
        if arguments.reference:
            kinds["the authors' modules"] = "authors"
        for step in ("forward", "forward and backward"):
            contenders = []
            for bfloat16 in precisions:
                for name, kind in kinds.items():
                    shown = f"{name}, bfloat16" if bfloat16 else name
                    prepare = functools.partial(prepare_head, arguments, kind, method, step != "forward", bfloat16)
                    contenders.append(Contender(shown, prepare, same_as=OURS if contenders else None))
            if on_gpu(arguments.device) and step != "forward":
                shown = f"{OURS}, bfloat16, torch_compile, cuda_graphs"
                contenders.append(Contender(shown, functools.partial(prepare_replayed, arguments, method)))
            reaches, ours, theirs = (), f"{OURS}, bfloat16", "the authors' modules, bfloat16"
            if on_gpu(arguments.device) and arguments.reference and step != "forward":
                reaches = (Reach(shown, "seconds", theirs, at_most=1 / 3 if method == "cross" else 1 / 4),)
                if method == "forward":
                    reaches += (Reach(ours, "memory_gib", theirs, at_most=1 / 3),)
            groups.append(Group(f"{title}: {step}", contenders, reaches=reaches))
    return groups, skipped
