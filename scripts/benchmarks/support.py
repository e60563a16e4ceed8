"""Kept supports: one query against them beside the backbone alone and a whole episode."""

import functools

import torch
from torch import nn
from transformers import ResNetConfig

from dmgal_hf import DmgalConfig, DmgalModel

from .adapter import clip_config
from .measuring import NUM_FRAMES, BenchmarkArguments, Contender, Group, Run


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
