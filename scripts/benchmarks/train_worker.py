"""What benchmarks/train.py starts with `accelerate launch`: steps of a real TrainingRun, on frames held in memory.

Every line of the pipe that the environment variable STEPS names asks for a number of steps; the answer is a line with
JSON. Ends with the pipe.
"""

import functools
import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from measuring import count_flops, profile_kernels

from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments
from dmgal_hf.training.checkpoints import StopSignal
from dmgal_hf.training.training_run import TrainingRun, build_accelerator, memory_in_use


def make_videos(arguments: TrainArguments) -> DatasetDict:
    """Rows without videos: enough for the episodes to be drawn."""
    rows = arguments.shot + max(arguments.query, arguments.test_query)
    labels = [number for number in range(arguments.way) for _ in range(rows)]
    features = Features({"video": Value("string"), "label": ClassLabel(names=[str(n) for n in range(arguments.way)])})
    videos = Dataset.from_dict({"video": [""] * len(labels), "label": labels}, features)
    return DatasetDict(train=videos, validation=videos, test=videos)


def make_batches(run: TrainingRun, crop_size: int) -> Iterator[dict]:
    """The same uint8 frames over and over, sent to the device each time."""
    arguments, device = run.arguments, run.accelerator.device
    batch = {"broken": [], "episode": torch.zeros(1, dtype=torch.int64)}
    for part, labels, count in (("support", "support_labels", arguments.shot), ("query", "labels", arguments.query)):
        classes = torch.arange(arguments.way).repeat_interleave(count)[None].repeat(arguments.episodes_per_forward, 1)
        shape = (*classes.shape, run.processor.num_frames, 3, crop_size, crop_size)
        batch |= {labels: classes, f"{part}_classes": classes}
        batch[f"{part}_pixel_values"] = torch.randint(256, shape, dtype=torch.uint8)
    if device.type == "cuda":
        batch = {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}
    while True:
        yield send_to_device(batch, device, non_blocking=True)


def main(data: DataArguments, model: ModelArguments, arguments: TrainArguments):
    accelerator = build_accelerator(arguments)
    run = TrainingRun(accelerator, data, model, arguments, make_videos(arguments), {})
    run.learner.train()
    batches, stop = make_batches(run, data.crop_size), StopSignal()
    step = functools.partial(run.step, batches, stop)
    flops = count_flops(step) * accelerator.num_processes
    facts = {"trainable_parameters": run.num_trainable, "flops": flops, "device": accelerator.device.type}
    if accelerator.device.type == "cuda":
        before = time.perf_counter()
        for _ in range(3):  # what is compiled or captured is so afterwards
            step()
        facts["warm_up_seconds"] = time.perf_counter() - before
        facts |= profile_kernels(step)
        if arguments.cuda_graphs:
            facts["replayed"] = run.replayed is not None and not run.replayed.failed
    with open(os.environ["STEPS"]) if accelerator.is_main_process else nullcontext() as pipe:
        while True:
            (line,) = broadcast_object_list([pipe.readline() if accelerator.is_main_process else None])
            if not line:
                break
            for _ in range(int(line)):
                step()  # reads the loss at its end, so the device is done
            if accelerator.is_main_process:
                print(json.dumps({**facts, "memory_gib": memory_in_use(accelerator.device)}), flush=True)
    del batches, step, run  # before the process group, see dmgal_hf.training.train
    accelerator.free_memory()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(*parse_arguments((DataArguments, ModelArguments, TrainArguments)))
