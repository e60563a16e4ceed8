"""Training: episodes a second in one and two CPU processes, or on a GPU with its utilisation.

The frames are in memory: decoding in other processes would compete for the cores (the part data measures it).
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from .measuring import BenchmarkArguments, Contender, Group, Run

WORKER = Path(__file__).with_name("train_worker.py")

# Dense bf16 operations a second, from the data sheets of the vendor; the first name that fits counts.
BF16_PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}

COMMON = {"way": 5, "shot": 1, "validation_episodes": 1, "augment": False, "learning_rate": 1e-4}
TINY = {
    "ft": {"backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                               "layer_type": "basic"}, "motion_reduction": 4},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                                    "patch_size": 8}, "adapter_config": {"reduction": 2}},
}  # fmt: skip
# Those of scripts/configs/motion_shapes_*.yaml.
SHAPES = {
    "ft": {"backbone_config": {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64],
                               "depths": [1, 1], "layer_type": "basic"}, "motion_reduction": 2, "crop_size": 56},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 384,
                                    "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 48,
                                    "patch_size": 8}, "adapter_config": {"reduction": 2}, "crop_size": 48},
}  # fmt: skip
FULL = {
    "ft": {"backbone_config": {"model_type": "resnet"}},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
                                    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                                    "patch_size": 16}, "adapter_config": {}, "frame_pooling": "cls"},
}  # fmt: skip


class Workers:
    """Processes of one `accelerate launch` that wait for a number of steps."""

    def __init__(self, fields: dict[str, Any], processes: int, device: str):
        self.folder = tempfile.TemporaryDirectory()
        config = Path(self.folder.name, "config.yaml")
        config.write_text(yaml.safe_dump({**COMMON, **fields, "output_dir": self.folder.name}))
        self.errors = Path(self.folder.name, "errors.txt")
        pipe = Path(self.folder.name, "steps")  # launchers do not hand on the standard input
        os.mkfifo(pipe)
        on_cpu = torch.device(device).type == "cpu"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes),
                  "--num_machines", "1", "--num_cpu_threads_per_process", "1", "--main_process_port", "0",
                  "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
        launch += ["--multi_gpu"] if processes > 1 else ["--cpu"] if on_cpu else []
        self.process = subprocess.Popen(
            [*launch, str(WORKER), "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env={**os.environ, "STEPS": str(pipe), **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})},
        )
        self.steps = None
        while self.steps is None:  # until the main process has opened its end
            try:
                self.steps = os.fdopen(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK), "w")
            except OSError:
                self._check_alive()
                time.sleep(0.05)

    def run(self, steps: int) -> dict[str, Any]:
        """Runs steps and returns what the main process tells of them."""
        self.steps.write(f"{steps}\n")
        self.steps.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.process.wait()
        self._check_alive()

    def _check_alive(self):
        if self.process.poll() is not None:
            raise RuntimeError(f"the processes that train ended:\n{self.errors.read_text()}")

    def close(self):
        self.steps.close()
        self.process.wait()
        self.folder.cleanup()


def peak_of(device: str) -> float | None:
    """Dense bf16 operations a second of a GPU that is known here."""
    if torch.device(device).type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in BF16_PEAKS.items() if known in name), None)


def prepare_training(arguments: BenchmarkArguments, fields: dict[str, Any], steps: int, processes: int) -> Run:
    workers = Workers(fields, processes, arguments.device)
    told: dict[str, Any] = {}

    def call():
        told.update(workers.run(steps))

    def describe(seconds: float) -> dict[str, Any]:
        facts = {
            "episodes_per_second": steps * fields["episodes_per_step"] / seconds,
            "memory_gib": told["memory_gib"],
        }
        facts["flops_per_second"] = steps * told["flops_per_step"] / seconds
        peak = peak_of(arguments.device)
        if peak is not None and fields.get("mixed_precision") == "bf16" and facts["flops_per_second"]:
            facts["utilisation"] = facts["flops_per_second"] / peak
        return facts

    return Run(call, describe=describe, close=workers.close)


def cpu_groups(arguments: BenchmarkArguments) -> list[Group]:
    groups = []
    titles = {"ft": "DMGAL-FT, a small ResNet", "adapter": "DMGAL-Adapter, a small ViT"}
    for paradigm in ("ft",) if arguments.small else titles:
        fields = {"paradigm": paradigm, "num_frames": 8, "query": 3, **SHAPES[paradigm]}
        steps, episodes = 6, 4
        if arguments.small:
            fields, steps, episodes = {**fields, **TINY[paradigm], "query": 1, "crop_size": 32}, 1, 2
        fields |= {"episodes_per_step": episodes, "num_episodes": episodes}
        contenders = [
            Contender(name, functools.partial(prepare_training, arguments, fields, steps, processes))
            for name, processes in (("one process", 1), ("two processes", 2))
        ]
        title = f"{titles[paradigm]}: {steps} steps of {episodes} episodes, one thread a process"
        groups.append(Group(title, contenders, memory=False))
    return groups


def gpu_groups(arguments: BenchmarkArguments) -> list[Group]:
    groups = []
    for paradigm, title in (("adapter", "DMGAL-Adapter, CLIP ViT-B/16"), ("ft", "DMGAL-FT, ResNet-50")):
        fields = {"paradigm": paradigm, "num_frames": 8, "query": 4, "crop_size": 224, **FULL[paradigm]}
        if arguments.small:
            fields |= {**TINY[paradigm], "query": 1, "crop_size": 32}
        fields |= {"episodes_per_step": 1, "num_episodes": 1}
        steps = 1 if arguments.small else 10
        variants = {
            "bf16": {"mixed_precision": "bf16"},
            "bf16, torch.compile": {"mixed_precision": "bf16", "torch_compile": True},
            "float32": {},
        }
        contenders = [
            Contender(name, functools.partial(prepare_training, arguments, fields | changes, steps, 1))
            for name, changes in variants.items()
        ]
        groups.append(Group(f"{title}, 5-way 1-shot: {steps} steps of an episode", contenders, memory=False))
    return groups


def train_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    if torch.device(arguments.device).type == "cuda":
        return gpu_groups(arguments), []
    return cpu_groups(arguments), ["steps of full size, which need --device cuda"]
