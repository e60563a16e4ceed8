"""The golden values of the authors' code: weights and inputs that are rebuilt from names, and recorded outputs."""

import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

FIXTURES = Path(__file__).parent / "fixtures"
SHAPES = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
LOGITS = json.loads((FIXTURES / "model_logits.json").read_text())


def randn(name, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def official_tensor(name, shape):
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    x = randn(name, shape)
    if leaf == "running_var":
        return x.abs() * 0.2 + 0.9
    if leaf == "running_mean":
        return x * 0.1
    if leaf.startswith("gamma"):
        return x.abs() * 0.3 + 0.5
    if len(shape) == 1:
        return x * 0.05 + 1 if leaf == "weight" else x * 0.05
    return x * (1 / torch.Size(shape[1:]).numel()) ** 0.5


def official_state_dict(part):
    """Weights of `smga`, `mixer`, `cmga`, `resnet18` or `resnet50`, without the constant position code's values."""
    return {name: official_tensor(name, shape) for name, shape in SHAPES[part].items()}


def official_frames(name, frames):
    return F.interpolate(2 * randn(name, (frames, 3, 8, 8)), (224, 224), mode="nearest")
