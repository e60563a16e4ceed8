"""Real signals to real training runs, by every door they may come through: a state is saved, and everything ends."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from filelock import FileLock
from training_runs import ON_CPU, SCRIPTS, command

from dmgal_hf.training.checkpoints import StopSignal

LONG = {"num_episodes": 20_000, "validate_every": 20_000, "checkpoint_every": 20_000, "test_episodes": 0}


@contextmanager
def started(words, folder):
    """The first process of a run, the head of a group as under a shell or `timeout`; what it prints is in a file."""
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=ON_CPU, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in family_of(process):
                one.kill()


def family_of(process):
    return [process, *psutil.Process(process.pid).children(recursive=True)]


def wait_for(pattern, out, process):
    deadline = time.monotonic() + 300
    while not list(out.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, (out.parent / "log").read_text()
        time.sleep(0.002)


def newest_state(out):
    return max(int(folder.name.removeprefix("episode-")) for folder in out.glob("checkpoints/episode-*"))


def assert_all_end(family, out):
    """Nothing is left running, and the run can be resumed."""
    left = psutil.wait_procs(family[1:], timeout=120)[1]
    for one in left:
        one.kill()
    assert not left
    family[0].wait(timeout=120)
    printed = (out.parent / "log").read_text()
    assert "Stopped. Go on with --resume" in printed
    assert "DataLoader worker" not in printed
    assert newest_state(out) < LONG["num_episodes"]
    with FileLock(out / "checkpoints" / ".lock").acquire(blocking=False):
        pass


@pytest.mark.slow
def test_to_the_process_group_while_the_training_waits_for_its_readers(config, tmp_path):
    """As of `timeout`: the readers get it too, and have to bring what the step still needs."""
    out = tmp_path / "run"
    path = config(**LONG | {"checkpoint_every": 2}, num_workers=2)
    with started(command(path), tmp_path) as process:
        wait_for("checkpoints/episode-*", out, process)
        family = family_of(process)
        readers = family[-2:]
        for reader in readers:
            reader.suspend()
        time.sleep(1)  # what they had read is used up
        before = newest_state(out)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        for reader in readers:
            reader.resume()
        assert_all_end(family, out)
    assert newest_state(out) > before


@pytest.mark.slow
def test_to_the_launcher_alone_while_a_state_is_saved(config, tmp_path):
    out = tmp_path / "run"
    path = config(**LONG | {"checkpoint_every": 2}, num_workers=1)
    with started(command(path), tmp_path) as process:
        wait_for("checkpoints/.episode-*/model.safetensors", out, process)
        family = family_of(process)
        assert len(family) == 3
        process.terminate()
        assert_all_end(family, out)


@pytest.mark.slow
def test_to_one_of_two_processes_between_states(config, tmp_path):
    out = tmp_path / "run"
    with started(command(config(**LONG, num_workers=1), processes=2), tmp_path) as process:
        wait_for("config.yaml", out, process)
        while len(family := family_of(process)) < 5:  # both read: they train
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        launched = psutil.Process(process.pid).children()
        launched[1].terminate()
        assert_all_end(family, out)


@pytest.mark.slow
def test_ctrl_c_while_validating_ends_at_once(config, tmp_path):
    """The state was saved before."""
    out = tmp_path / "run"
    path = config(**LONG | {"validate_every": 2}, validation_episodes=30_000, num_workers=1)
    with started([sys.executable, str(SCRIPTS / "train.py"), "--config", str(path)], tmp_path) as process:
        wait_for("checkpoints/episode-*", out, process)
        family = family_of(process)
        os.killpg(process.pid, signal.SIGINT)
        assert_all_end(family, out)
    assert process.returncode == 128 + signal.SIGINT
    assert newest_state(out) == 2 and not (out / "best").exists()


@pytest.mark.slow
def test_ctrl_c_in_an_ablation_begins_no_other_run(config, tmp_path):
    """Its two runs save their states and end; the third, which waited for its turn, never gets it."""
    options = LONG | {"test_episodes": 1, "checkpoint_every": 2, "num_workers": 0}
    words = [sys.executable, str(SCRIPTS / "ablate.py"), "--config", str(config(**options)), "--processes", "2"]
    with started([*words, "--only", "full", "--seeds", "0", "1", "2"], tmp_path) as process:
        for seed in (0, 1):
            wait_for(f"full/seed_{seed}/checkpoints/episode-*", tmp_path / "run", process)
        family = family_of(process)
        os.killpg(process.pid, signal.SIGINT)
        assert not psutil.wait_procs(family, timeout=120)[1]
    runs = sorted(tmp_path.glob("run/full/*"))
    assert [run.name for run in runs] == ["seed_0", "seed_1"]
    assert all("Stopped. Go on with --resume" in (run / "output.txt").read_text() for run in runs)


def test_a_launcher_that_went_while_the_training_was_starting(monkeypatch):
    """The first process has taken over; the training would go on to its end."""
    if "python" in " ".join(psutil.Process(1).cmdline()):
        pytest.skip("the first process of this machine may be a launcher")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with StopSignal() as stop:
        time.sleep(0.1)
        assert not stop.received  # by nohup
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "False")
    with pytest.raises(SystemExit) as exit, StopSignal() as stop, stop.at_once():
        time.sleep(60)
    assert exit.value.code == 128 + signal.SIGTERM
