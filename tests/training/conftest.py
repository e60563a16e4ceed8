import pytest
import yaml
from training_runs import FIELDS

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
