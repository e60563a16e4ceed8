"""Folders as training leaves them, for the tests of what is pushed."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from transformers import ViTConfig

from dmgal_hf import DmgalConfig, DmgalModel

ROOT = Path(__file__).parents[1]
# Written by the first release of format version 1, with the logits it gave; never to be written again.
CHECKPOINT = Path(__file__).parent / "fixtures" / "checkpoint_v1"
METRICS = {
    "training": {"episodes": 40, "best_episodes": 30, "bad_steps": 0, "broken_videos": ["/home/me/videos/a.mp4"],
                 "history": []},
    "validation": {"accuracy": 61.25, "num_episodes": 20},
    "test": {"way": 5, "shot": 1, "query": 3, "seed": 0, "accuracy": 54.3219, "confidence_interval": 1.2345,
             "num_episodes": 200, "num_queries": 3000, "episodes_id": "0123456789abcdef", "per_class": {},
             "confusion": {}},
}  # fmt: skip
ARGUMENTS = {"dataset": "ssv2-small", "videos": "/home/me/videos", "output_dir": "/home/me/run", "backbone": None,
             "way": 5, "learning_rate": 0.001}  # fmt: skip


def make_run(folder, metrics=METRICS, arguments=ARGUMENTS):
    """A run folder as training leaves it, and what users leave there."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(arguments))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    for below in ("checkpoints/episode-000000040", "best"):
        shutil.copytree(CHECKPOINT, folder / below)
    for name in ("optimizer.bin", "train.log", "secrets.json", "notes.py", ".metrics.json"):
        (folder / name).write_text("{}")
    return folder


def make_adapter_run(folder):
    torch.manual_seed(0)
    backbone = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                         image_size=32, patch_size=8)  # fmt: skip
    adapters = {"reduction": 2, "init_weights": False}
    config = DmgalConfig(backbone_config=backbone, paradigm="adapter", num_frames=4, adapter_config=adapters)
    DmgalModel(config).save_pretrained(folder)
    shutil.copy(CHECKPOINT / "preprocessor_config.json", folder)
    return folder
