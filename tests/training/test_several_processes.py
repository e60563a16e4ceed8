"""Training and evaluation by several real processes: the results of one, whatever happens to them."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file
from training_runs import ON_CPU, SCRIPTS, assert_same_end, command, run, run_forked, sharded_command, weights
from transformers import AutoModel, AutoProcessor

from dmgal_hf.data import load_motion_shapes, sample_episodes
from dmgal_hf.training.evaluation import evaluate_episodes


@pytest.mark.slow
def test_two_processes_make_the_same_updates(finished, finished_by_two, cache_dir):
    two_dir, printed = finished_by_two
    assert "Training with 2 processes" in printed
    one, two = weights(finished[0]), weights(two_dir)
    for name in one:
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3, msg=name)
    history = [json.loads(Path(d, "metrics.json").read_text())["training"]["history"] for d in (finished[0], two_dir)]
    for first, second in zip(*history):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
    for name in one:  # statistics of as many episodes, which count a little otherwise within a step
        if "running_" in name:
            torch.testing.assert_close(two[name], one[name], atol=0.02, rtol=0.1, msg=name)
    # Both validated the same model, with statistics of all episodes: it is what was saved.
    reached = json.loads((two_dir / "metrics.json").read_text())["validation"]["accuracy"]
    model, processor = (auto.from_pretrained(two_dir) for auto in (AutoModel, AutoProcessor))
    videos = load_motion_shapes(clips_per_class=3, cache_dir=cache_dir)["validation"]
    episodes = sample_episodes(videos["label"], 3, 1, 1, 3, seed=0)
    assert evaluate_episodes(model, processor, videos, episodes, Accelerator())["accuracy"] == reached


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(finished, finished_by_two, config, tmp_path):
    path, out = config("fewer"), tmp_path / "fewer"
    shutil.copytree(finished_by_two[0], out)
    shutil.rmtree(out / "checkpoints" / "episode-000000008")
    (out / "metrics.json").unlink()
    for one, two in zip(finished[1]["training"]["history"], run(path, "--resume")["training"]["history"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_resumed_after_kill_equal_uninterrupted(finished_by_two, config, tmp_path):
    """The launcher and one of its processes die at a moment drawn by chance; the other goes by itself."""
    draw = random.Random(0)
    path, out = config("killed_two"), tmp_path / "killed_two"
    moments = ("checkpoints/.episode-000000004.aside", "checkpoints/episode-000000004", ".best.aside", "best")
    moment, delay, victim = draw.choice(moments), draw.uniform(0, 0.05), draw.randrange(2)
    launch = command(path, processes=2)
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(launch, stdout=log, stderr=log, env=ON_CPU)
    later = out / "checkpoints" / "episode-000000006"  # the moment may be too short to be seen
    while not (out / moment).exists() and not later.exists():
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.002)
    time.sleep(delay)
    workers = psutil.Process(launcher.pid).children()
    launcher.kill()
    workers[victim].kill()
    launcher.wait()
    gone, left = psutil.wait_procs(workers, timeout=60)
    assert not left and len(gone) == 2
    assert not (out / "metrics.json").exists()
    result = run_forked([*launch, "--resume"])
    assert result.returncode == 0, result.stdout
    assert_same_end(out, finished_by_two[0])


@pytest.mark.slow
def test_two_processes_agree_on_the_state_they_go_on_from(finished_by_two, config, tmp_path):
    """The damaged file is that of the second alone."""
    out = tmp_path / "copy"
    shutil.copytree(finished_by_two[0], out)
    (out / "checkpoints" / "episode-000000008" / "random_states_1.pkl").write_bytes(os.urandom(1000))
    words = command(config("copy"), "--resume", processes=2)
    result = run_forked(words)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("is damaged (random_states_1.pkl") == 1
    assert_same_end(out, finished_by_two[0])


@pytest.mark.slow
def test_processes_of_a_killed_launcher_save_and_end(config, tmp_path):
    """They would train on unseen, and keep `--resume` out. One process is enough for a launcher of several."""
    out = tmp_path / "orphaned"
    path = config("orphaned", num_episodes=2000, validate_every=2000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(SCRIPTS / "train.py")]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen([*launch, "--config", str(path)], stdout=log, stderr=log, env=ON_CPU)
    while not list(out.glob("checkpoints/episode-*")):
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    (worker,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    assert not psutil.wait_procs([worker], timeout=60)[1]
    assert "Go on with --resume" in (tmp_path / "log").read_text()
    assert list(out.glob("checkpoints/episode-*"))[-1].name < "episode-000002000"
    with FileLock(out / "checkpoints" / ".lock").acquire(blocking=False):
        pass


@pytest.mark.slow
def test_fsdp_makes_the_same_updates_saves_whole_models_and_resumes(finished, config, tmp_path):
    """As --use_fsdp does on GPUs: torch shards on CPUs too, where accelerate does not look for it."""
    path, out = config("sharded", validate_every=8), tmp_path / "sharded"
    launch = sharded_command(path)
    results, models = [], []
    for options in ((), ("--resume",)):
        result = run_forked([*launch, *options])
        assert result.returncode == 0, result.stdout
        results.append(json.loads((out / "metrics.json").read_text()))
        models.append(load_file(out / "model.safetensors"))
        (out / "metrics.json").unlink()
        shutil.rmtree(out / "checkpoints" / "episode-000000008")
    expected = finished[1]["training"]["history"]
    for one, two, resumed in zip(expected, *(result["training"]["history"] for result in results)):
        for name in ("loss", "gradient_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3)
            assert resumed[name] == two[name]
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert AutoModel.from_pretrained(out).state_dict().keys() == models[0].keys()
    assert not list((out / "best").glob("_fsdp*"))  # source of torch, were the class FSDP's


@pytest.mark.slow
def test_evaluation_is_the_same_with_several_processes_and_several_episodes_at_once(finished, cache_dir, tmp_path):
    options = ["--model", str(finished[0]), "--cache_dir", cache_dir, "--clips_per_class", "3", "--num_workers", "0",
               "--way", "3", "--shot", "1", "2", "--num_episodes", "7"]  # fmt: skip
    results = []
    for processes, together in ((1, 1), (4, 3)):
        path = tmp_path / f"{processes}.json"
        launch = command("unused", processes=processes)
        launch = [*launch[: launch.index(str(SCRIPTS / "train.py"))], str(SCRIPTS / "evaluate.py")]
        launch += [*options, "--episodes_per_forward", str(together), "--json", str(path)]
        result = run_forked(launch)
        assert result.returncode == 0, result.stdout
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]
    assert [(r["shot"], r["num_episodes"], r["num_queries"]) for r in results[0]] == [(1, 7, 21), (2, 7, 21)]


@pytest.mark.slow
def test_more_processes_than_episodes(config):
    result = run_forked(command(config("many"), "--episodes_per_step", "1", processes=2))
    assert result.returncode != 0
    assert "episodes_per_step=1 cannot be shared out to 2 processes" in result.stdout
