import subprocess

import pytest
import yaml
from training_runs import FIELDS, ON_CPU, command, run

from dmgal_hf.data import load_motion_shapes


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion_shapes")
    load_motion_shapes(clips_per_class=3, cache_dir=folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, cache_dir):
    """Writes a config file of a small run and returns its path."""

    def write(name="run", **fields):
        path = tmp_path / f"{name}.yaml"
        fields = {**FIELDS, "cache_dir": cache_dir, "output_dir": str(tmp_path / name), **fields}
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cache_dir):
    """An uninterrupted run, its folder and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**FIELDS, "cache_dir": cache_dir, "output_dir": str(folder / "run")}))
    return folder / "run", run(path)


@pytest.fixture(scope="session")
def finished_by_two(tmp_path_factory, cache_dir):
    """An uninterrupted run of two processes, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("finished_by_two")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**FIELDS, "cache_dir": cache_dir, "output_dir": str(folder / "run")}))
    result = subprocess.run(command(path, processes=2), capture_output=True, text=True, env=ON_CPU)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "run", result.stdout
