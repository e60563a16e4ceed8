"""Training: steps in one and two CPU processes, or on a GPU beside LoRA and the authors' model.

The frames are in memory: decoding in other processes would compete for the cores (the part feed measures it).
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import AutoModel

from dmgal_hf import DmgalConfig, DmgalModel
from dmgal_hf.training.acceleration import compile_regions

from .head import LastHiddenState, load_official_model
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
from .models import FULL, SHAPES, SHAPES_CROP, TINY, clip_config

WORKER = Path(__file__).with_name("train_worker.py")

COMMON = {"way": 5, "shot": 1, "validation_episodes": 1, "augment": False, "learning_rate": 1e-4}


class Workers:
    """Processes of one `accelerate launch` that wait for a number of steps."""

    def __init__(self, fields: dict[str, Any], processes: int, device: str):
        self.folder = tempfile.TemporaryDirectory()
        config = Path(self.folder.name, "config.yaml")
        config.write_text(yaml.safe_dump({**COMMON, **fields, "output_dir": self.folder.name}))
        self.errors = Path(self.folder.name, "errors.txt")
        pipe = Path(self.folder.name, "steps")  # launchers do not hand on the standard input
        os.mkfifo(pipe)
        self.steps = os.fdopen(os.open(pipe, os.O_RDWR), "w")  # for writing alone it would wait for a reader
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

    def run(self, steps: int) -> dict[str, Any]:
        """Runs steps and returns what the main process tells of them. The first call waits for the start, so that
        all that were made before it start side by side."""
        self.steps.write(f"{steps}\n")
        self.steps.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.process.wait()
        raise RuntimeError(f"the processes that train ended:\n{self.errors.read_text()}")

    def close(self):
        self.steps.close()
        self.process.wait()
        self.folder.cleanup()


def prepare_training(arguments: BenchmarkArguments, fields: dict[str, Any], steps: int, processes: int) -> Run:
    workers = Workers(fields, processes, arguments.device)
    told: dict[str, Any] = {}

    def call():
        told.update(workers.run(steps))

    def describe(seconds: float) -> dict[str, Any]:
        names = ("memory_gib", "flops", "kernel_seconds", "launches", "warm_up_seconds", "replayed")
        facts = {"episodes_per_second": fields["episodes_per_step"] / seconds}
        return facts | {name: told[name] for name in names if name in told}

    return Run(call, describe=describe, close=workers.close, times=steps, local=False)


def cpu_groups(arguments: BenchmarkArguments) -> list[Group]:
    groups = []
    titles = {"ft": "DMGAL-FT, a small ResNet", "adapter": "DMGAL-Adapter, a small ViT"}
    for paradigm in ("ft",) if arguments.small else titles:
        fields = {"paradigm": paradigm, "num_frames": 8, "query": 3, "crop_size": SHAPES_CROP[paradigm]}
        fields |= SHAPES[paradigm]
        steps, episodes = 6, 4
        if arguments.small:
            fields, steps, episodes = {**fields, **TINY[paradigm], "query": 1, "crop_size": 32}, 1, 2
        fields |= {"episodes_per_step": episodes, "num_episodes": episodes}
        contenders = [
            Contender(name, functools.partial(prepare_training, arguments, fields, steps, processes))
            for name, processes in (("one process", 1), ("two processes", 2))
        ]
        title = f"{titles[paradigm]}: a step of {episodes} episodes, one thread a process"
        groups.append(Group(title, contenders, memory=False))
    return groups


def make_episode(small: bool, shot: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch of one 5-way episode with 20 queries."""
    way, query, size = (5, 1, 32) if small else (5, 4, 224)
    labels = {"support_labels": shot, "labels": query}
    batch = {name: torch.arange(way).repeat_interleave(count)[None].to(device) for name, count in labels.items()}
    for name, count in (("support_pixel_values", shot), ("query_pixel_values", query)):
        batch[name] = torch.randn(1, way * count, NUM_FRAMES, 3, size, size, device=device, dtype=dtype)
    return batch


def training_step(model: nn.Module, loss_of: Callable[[], torch.Tensor], device: str, bfloat16: bool) -> Run:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=on_gpu(device))

    def call():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(call, model)


def prepare_lora(arguments: BenchmarkArguments, shot: int) -> Run:
    """LoRA of about the adapters' size in the same model, matched in the same way, under autocast."""
    torch.manual_seed(0)
    lora = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    fields = {"paradigm": "adapter", "frame_pooling": "cls", "adapter_config": lora}
    config = DmgalConfig(backbone_config=clip_config(arguments.small), **fields)
    model = DmgalModel(config).to(arguments.device).train()
    episode = make_episode(arguments.small, shot, arguments.device)
    return training_step(model, lambda: model(**episode).loss, arguments.device, bfloat16=True)


def prepare_official(arguments: BenchmarkArguments, bfloat16: bool) -> Run:
    torch.manual_seed(0)
    backbone = AutoModel.from_config(DmgalConfig(**FULL["ft"]).backbone_config)
    model = load_official_model(arguments.reference, backbone).to(arguments.device).train()
    episode = make_episode(arguments.small, 1, arguments.device)
    frames = [episode[f"{part}_pixel_values"].flatten(0, 2) for part in ("support", "query")]
    labels = episode["support_labels"][0]

    def loss_of() -> torch.Tensor:
        logits = model(frames[0], labels, frames[1])["logits"][0]
        return F.cross_entropy(logits.float(), episode["labels"][0])

    return training_step(model, loss_of, arguments.device, bfloat16)


def prepare_backbone(arguments: BenchmarkArguments, dtype: torch.dtype, graph: bool, compiled: bool = False) -> Run:
    """Forward passes of the frozen backbone alone over the frames of a 1-shot episode; float32 means autocast."""
    torch.manual_seed(0)
    model = LastHiddenState(AutoModel.from_config(clip_config(arguments.small))).eval().to(arguments.device, dtype)
    if compiled:
        compile_regions(model)
    episode = make_episode(arguments.small, 1, arguments.device, dtype)
    frames = torch.cat([episode[f"{part}_pixel_values"].flatten(0, 2) for part in ("support", "query")])
    casts = dtype == torch.float32

    def call():
        with torch.no_grad(), torch.autocast(torch.device(arguments.device).type, torch.bfloat16, enabled=casts):
            return model(frames)

    return Run(as_graph(call), flops=count_flops(call)) if graph else Run(call)


def gpu_groups(arguments: BenchmarkArguments) -> list[Group]:
    steps = 1 if arguments.small else 10
    prepare = functools.partial

    def ours(paradigm: str, *switches: str, **changes: Any) -> Contender:
        fields = {"paradigm": paradigm, "num_frames": NUM_FRAMES, "query": 4, "crop_size": 224, **FULL[paradigm]}
        if arguments.small:
            fields |= {**TINY[paradigm], "query": 1, "crop_size": 32}
        fields |= {"episodes_per_step": 1, "num_episodes": 1, "mixed_precision": "bf16", **changes}
        fields |= {"cuda_graphs": False} | dict.fromkeys(switches, True)
        return Contender(", ".join([OURS, *switches]), prepare(prepare_training, arguments, fields, steps, 1))

    groups = [
        Group("CLIP ViT-B/16 alone: forward pass over 200 frames", [
            Contender("bf16 autocast", prepare(prepare_backbone, arguments, torch.float32, False)),
            Contender("bf16", prepare(prepare_backbone, arguments, torch.bfloat16, False)),
            Contender("bf16, CUDA graph", prepare(prepare_backbone, arguments, torch.bfloat16, True)),
            Contender("bf16, blocks compiled", prepare(prepare_backbone, arguments, torch.bfloat16, False, True)),
        ])
    ]  # fmt: skip
    lora = "LoRA of rank 8 (peft), bf16 autocast"
    compiled, best = f"{OURS}, torch_compile", f"{OURS}, torch_compile, cuda_graphs"
    for shot in (1, 5):
        contenders = [Contender(lora, prepare(prepare_lora, arguments, shot)), ours("adapter", shot=shot)]
        reaches = ()
        if shot == 1:
            contenders += [ours("adapter", "torch_compile"), ours("adapter", "torch_compile", "cuda_graphs")]
            reaches = (
                Reach(best, "ceiling_share", at_least=0.4), Reach(best, "seconds", lora, at_most=0.55),
                Reach(compiled, "warm_up_seconds", at_most=60),
            )  # fmt: skip
        title = f"DMGAL-Adapter, CLIP ViT-B/16, 5-way {shot}-shot: training step, bf16"
        groups.append(Group(title, contenders, reaches=reaches))
    # All of them lie on the device together, graphs with memory of their own: no row of compiled blocks alone.
    contenders = [ours("ft", *some) for some in ([], ["cuda_graphs"], ["torch_compile", "cuda_graphs"])]
    reaches = (Reach(best, "warm_up_seconds", at_most=60),)
    if arguments.reference and not arguments.small:  # their C-MGA takes maps of 7 x 7 alone
        for name, bfloat16 in (("bf16 autocast", True), ("float32", False)):
            contenders.append(Contender(f"the authors' model, {name}", prepare(prepare_official, arguments, bfloat16)))
        reaches += (Reach(best, "seconds", "the authors' model, bf16 autocast", at_most=1 / 2.5),)
    groups.append(Group("DMGAL-FT, ResNet-50, 5-way 1-shot: training step, bf16", contenders, reaches=reaches))
    return groups


def train_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    if on_gpu(arguments.device):
        return gpu_groups(arguments), [] if arguments.reference else ["the authors' model (give --reference)"]
    return cpu_groups(arguments), ["steps of full size, which need --device cuda"]
