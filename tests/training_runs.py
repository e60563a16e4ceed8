"""Small training runs: in this process, or as real processes of accelerate."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from dmgal_hf.training import train
from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments

SCRIPTS = Path(__file__).parents[1] / "scripts"
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}  # --multi_gpu then starts processes that talk through gloo
FIELDS = {
    "clips_per_class": 3,
    "resize": 36,
    "crop_size": 32,
    "num_workers": 0,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"
    },
    "motion_reduction": 4,
    "way": 3,
    "query": 1,
    "num_episodes": 8,
    "episodes_per_step": 2,
    "learning_rate": 0.01,
    "class_loss_weight": 0.3,
    "validate_every": 4,
    "validation_episodes": 3,
    "test_episodes": 5,
    "checkpoint_every": 2,
}  # fmt: skip


def run(config, *options):
    arguments = parse_arguments((DataArguments, ModelArguments, TrainArguments), ["--config", str(config), *options])
    return train(*arguments)


def command(config, *options, processes=1):
    return [
        sys.executable, "-m", "accelerate.commands.launch", *(["--cpu"] if processes == 1 else ["--multi_gpu"]),
        "--num_processes", str(processes), "--num_cpu_threads_per_process", "1", "--main_process_port", "0",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        str(SCRIPTS / "train.py"), "--config", str(config), *options,
    ]  # fmt: skip


def sharded_command(config):
    """Two processes with FSDP2."""
    launch = command(config, processes=2)
    launch[launch.index("--multi_gpu") : launch.index("--multi_gpu") + 1] = ["--use_fsdp", "--fsdp_version", "2"]
    launch.insert(launch.index(str(SCRIPTS / "train.py")), str(Path(__file__).parent / "training" / "fsdp_on_cpu.py"))
    return launch


def start_forked(words, log):
    """The processes that a `command` starts, without its launcher, forked from one that has imported all they need.

    Imports take most of the time of a small run. What the processes print is appended to the file `log`.
    """
    arguments = launch_command_parser().parse_args(words[words.index("accelerate.commands.launch") + 1 :])
    env = {**prepare_multi_gpu_env(arguments), "ACCELERATE_USE_CPU": "true"}
    if arguments.num_processes > 1:
        env |= {"WORLD_SIZE": words[words.index("--num_processes") + 1], "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(arguments.main_process_port)}  # fmt: skip
    context = multiprocessing.get_context("forkserver")
    script = [arguments.training_script, *arguments.training_script_args]
    processes = [
        context.Process(target=_run_script, args=(script, env, rank, str(log)))
        for rank in range(arguments.num_processes)
    ]
    for process in processes:
        process.start()
    return processes


def _run_script(words, env, rank, log):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    if "WORLD_SIZE" in env:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": env["WORLD_SIZE"]})
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_forked(words):
    """The exit status of the first process that failed, else 0, and what all of them printed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        processes = start_forked(words, log)
        for process in processes:
            process.join(300)
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        return subprocess.CompletedProcess(words, next(filter(None, codes), 0), log.read_text())


def weights(output_dir):
    (folder,) = sorted(Path(output_dir, "checkpoints").glob("episode-000000008"))
    return load_file(folder / "model.safetensors")


def assert_same_end(first, second):
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name
    states = [torch.load(Path(d, "checkpoints/episode-000000008/optimizer.bin"), weights_only=True)["state"]
              for d in (first, second)]  # fmt: skip
    for key, state in states[0].items():
        assert all(torch.equal(state[name], states[1][key][name]) for name in state)
    losses = [
        [
            (r["loss"], r["learning_rate"])
            for r in json.loads(Path(d, "metrics.json").read_text())["training"]["history"]
        ]
        for d in (first, second)
    ]
    assert losses[0] == losses[1]
