"""Full disks and damaged files: what is written is whole or not there, and damage is found before it is used."""

import os
import re
import resource
import shutil
import subprocess
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from training_runs import assert_same_end, run

from dmgal_hf.training.checkpoints import damage_of, write_aside

NEWEST = Path("checkpoints", "episode-000000008")
WEIGHTS = {"weight": torch.zeros(500_000)}  # 2 MB
Usage = namedtuple("Usage", "total used free")


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def fill_with_garbage(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copy(finished, tmp_path):
    """The folder of a finished run, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "metrics.json").unlink()
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", [cut_off, empty, fill_with_garbage, change_a_byte, os.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"])
def test_damage_is_found_and_named(copy, damage, name):
    state = copy / NEWEST
    assert damage_of(state) is None
    damage(state / name)
    assert damage_of(state).startswith(f"{name} is ")


@pytest.mark.parametrize("damage", [cut_off, empty, fill_with_garbage])
def test_damaged_checksums_vouch_for_nothing(copy, damage):
    damage(copy / NEWEST / "checksums.json")
    assert damage_of(copy / NEWEST) == "checksums.json cannot be read"


@pytest.mark.slow
def test_a_damaged_state_is_passed_over_for_the_older_one_and_removed(copy, config, finished, caplog):
    change_a_byte(copy / NEWEST / "optimizer.bin")
    run(config("copy"), "--resume", "--keep_checkpoints", "1")
    assert re.search(r"episode-000000008 is damaged \(optimizer.bin .*\): the run goes on from episode-000000006, and",
                     caplog.text)  # fmt: skip
    assert_same_end(copy, finished[0])
    assert [path.name for path in (copy / "checkpoints").glob("episode-*")] == ["episode-000000008"]


@pytest.mark.slow
def test_a_damaged_state_does_not_push_out_a_whole_one(copy, config, finished):
    """It is the newest by its name, also when the states after the one that was resumed are saved."""
    shutil.copytree(copy / NEWEST, copy / "checkpoints" / "episode-000000010")
    empty(copy / "checkpoints" / "episode-000000010" / "model.safetensors")
    shutil.rmtree(copy / NEWEST)
    run(config("copy"), "--resume", "--keep_checkpoints", "1")
    assert_same_end(copy, finished[0])


def test_no_whole_state(copy, config):
    for state in (copy / "checkpoints").glob("episode-*"):
        cut_off(state / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"no whole state to resume: .*000008 is damaged .*; .*000006 is damaged .*Put"
    ):
        run(config("copy"), "--resume")


@pytest.mark.slow
def test_states_of_before_there_were_checksums(copy, config, finished):
    """They resume; weights that are not all there are noticed, and other damage where it is read."""
    for file in copy.rglob("checksums.json"):
        file.unlink()
    cut_off(copy / NEWEST / "model.safetensors")
    run(config("copy"), "--resume")
    assert_same_end(copy, finished[0])
    for state in (copy / "checkpoints").glob("episode-*"):
        (state / "checksums.json").unlink(missing_ok=True)
        empty(state / "optimizer.bin")
    with pytest.raises(
        ValueError, match=r"000008 cannot be loaded \(.*\): remove that folder to resume from an older"
    ):
        run(config("copy"), "--resume")


@pytest.mark.parametrize("with_checksums", [True, False])
def test_the_best_model_is_looked_at_before_the_training(copy, config, with_checksums):
    shutil.rmtree(copy / NEWEST)
    if not with_checksums:
        (copy / "best" / "checksums.json").unlink()
    cut_off(copy / "best" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"best is damaged \(model.safetensors is .*\), the best model of this run: put"
    ):
        run(config("copy"), "--resume")
    assert not (copy / NEWEST).exists()


@pytest.mark.slow
def test_a_full_disk_is_noticed_before_a_state_is_begun(config, tmp_path, monkeypatch):
    path = config("full", num_episodes=2, validate_every=2, test_episodes=0)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 5000, 5000))
        with pytest.raises(OSError, match=r"episode-000000002 cannot be written: there is no room for it\. "
                           r"It needs 0\.[1-9] MB, and 0\.0 MB are free .* go on with --resume"):  # fmt: skip
            run(path)
    assert [path.name for path in (tmp_path / "full" / "checkpoints").iterdir()] == [".lock"]
    run(path)
    assert damage_of(tmp_path / "full" / "checkpoints" / "episode-000000002") is None


@contextmanager
def largest_file(size):
    """As of a quota, which is not seen beforehand."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_text(folder):
    (folder / "text").write_text("x" * 2_000_000)


def write_tensors(folder):
    save_file(WEIGHTS, folder / "model.safetensors")


def write_optimizer(folder):
    torch.save(WEIGHTS, folder / "optimizer.bin")


@pytest.mark.parametrize("write", [write_text, write_tensors, write_optimizer])
def test_what_cannot_be_written_leaves_what_was_there(write, tmp_path):
    accelerator, folder = Accelerator(), tmp_path / "state"
    with write_aside(folder, accelerator, 3) as aside:
        (aside / "text").write_text("old")
    with (
        largest_file(100_000),
        pytest.raises(OSError, match=r"state cannot be written: .* It needs 2\.0 MB, and .* MB"),
        write_aside(folder, accelerator, 2_000_000) as aside,
    ):
        write(aside)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert (folder / "text").read_text() == "old" and damage_of(folder) is None


@pytest.fixture
def small_disk(tmp_path):
    """1 MB, which only a superuser may make."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("write", [write_text, write_tensors, write_optimizer])
@pytest.mark.parametrize("needed", [2_000_000, 0])
def test_a_disk_that_is_really_full(write, needed, small_disk):
    """`needed` is a little less than what is written, which may be what is missing."""
    with (
        pytest.raises(OSError, match=r"cannot be written: .* MB are free on its disk"),
        write_aside(small_disk / "state", Accelerator(), needed) as aside,
    ):
        write(aside)
    assert list(small_disk.iterdir()) == []
