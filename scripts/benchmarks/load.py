"""Loading: the import, and from_pretrained of whole checkpoints beside that of the bare backbones in them."""

import functools
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, CLIPVisionModel, PreTrainedModel, ResNetConfig, ResNetModel

from dmgal_hf import DmgalModel

from .adapter import clip_config
from .measuring import BenchmarkArguments, Contender, Group, Run


def make_backbone(kind: str, small: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "clip":
        return CLIPVisionModel(clip_config(small))
    if small:
        return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    return ResNetModel(ResNetConfig())


def checkpoint(arguments: BenchmarkArguments, kind: str, ours: bool) -> Path:
    """The folder of a checkpoint with random weights; written where it is not there yet."""
    size = "small" if arguments.small else "full"
    folder = Path(arguments.folder) / f"{kind}-{size}-{'dmgal' if ours else 'backbone'}"
    if not (folder / "model.safetensors").is_file():
        model = make_backbone(kind, arguments.small)
        if ours:
            fields = {"paradigm": "adapter", "adapter_config": {}} if kind == "clip" else {}
            model = DmgalModel.from_backbone(model, **fields)
        model.save_pretrained(folder)
    return folder


def prepare_loading(arguments: BenchmarkArguments, kind: str, ours: bool, read: bool) -> Run:
    folder = checkpoint(arguments, kind, ours)
    device = {} if arguments.device == "cpu" else {"device_map": arguments.device}

    def call():
        model = AutoModel.from_pretrained(folder, **device)
        if read:
            for weight in model.state_dict().values():
                weight.flatten()[::1024].sum()  # a number of every page of memory

    return Run(call, note=f"weights {(folder / 'model.safetensors').stat().st_size / 1e6:.4g} MB")


def prepare_import(statements: str) -> Run:
    return Run(functools.partial(subprocess.run, [sys.executable, "-c", statements], check=True))


def load_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    """On a CPU from_pretrained maps the file, and its bytes are read when they are used: both moments are measured."""
    groups = []
    for title, kind, name in (
        ("CLIP ViT-B/16", "clip", "dmgal_hf, adapters inside"), ("ResNet-50", "resnet", "dmgal_hf, DMGAL-FT")
    ):  # fmt: skip
        for read in (False, True):
            contenders = [
                Contender(label, functools.partial(prepare_loading, arguments, kind, ours, read))
                for label, ours in (("bare backbone", False), (name, True))
            ]
            step = "from_pretrained, all weights read" if read else "from_pretrained"
            groups.append(Group(f"{title}: {step}", contenders))
    bare = "from transformers import AutoModel, AutoProcessor, pipeline, PreTrainedModel"
    statements = {"transformers": bare, "transformers and dmgal_hf": f"{bare}; import dmgal_hf"}
    contenders = [Contender(name, functools.partial(prepare_import, code)) for name, code in statements.items()]
    groups.append(Group("import in a new process", contenders, memory=False))
    return groups, []
