"""Training on few classes of one's own: splits too small for an episode, and ways of their own."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from towers import save_towers
from training_runs import SCRIPTS, run
from transformers import AutoModel

from dmgal_hf.data.made_up_videos import encode_frames


def write_clips(folder, classes, clips, frames=8):
    """Real video files of a bright square that wanders, another way for each class."""
    draw = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class {number}").mkdir(parents=True)
        for clip in range(clips):
            pixels = draw.integers(0, 60, (frames, 36, 40, 3), dtype=np.uint8)
            for frame in range(frames):
                top, left = (frame * number) % 26, (3 * frame + clip) % 30
                pixels[frame, top : top + 10, left : left + 10] = 230
            (folder / f"class {number}" / f"{clip}.mp4").write_bytes(encode_frames(pixels))
    return folder


@pytest.fixture(scope="module")
def eight_classes(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("own") / "clips", classes=8, clips=10)


@pytest.fixture
def small(tmp_path):
    """Options that make a run of any config short, into a folder of its own."""
    return lambda folder, name: [
        "--videos", str(folder), "--output_dir", str(tmp_path / name), "--num_workers", "0", "--num_episodes", "4",
        "--query", "1", "--test_episodes", "4", "--resize", "36", "--crop_size", "32",
    ]  # fmt: skip


@pytest.mark.slow
def test_eight_classes_of_ten_clips_give_a_trained_model_with_one_command(
    eight_classes, small, tmp_path, monkeypatch, capsys
):
    """And that one another, by the configs that are shipped for it; of CLIP a tiny one stands in."""
    save_towers(tmp_path / "clip", "clip")
    configs = SCRIPTS / "configs"
    words = [str(SCRIPTS / "train.py"), "--config", str(configs / "own_clips.yaml"),
             *small(eight_classes, "first"), "--backbone", str(tmp_path / "clip")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    printed = capsys.readouterr().out
    for sentence in (
        "The validation split has one class, too few for an episode: as with validation none, the last weights are "
        "the result, and 6 classes train.\n",
        "Episodes of the split test have 2 classes, as many as there are.\n",
        "novel classes, 2-way 1-shot:",
    ):
        assert printed.count(sentence) == 1, printed
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert "validation" not in metrics and metrics["test"]["way"] == 2 and len(metrics["test"]["per_class"]) == 2
    assert metrics["training"]["best_episodes"] == metrics["training"]["episodes"] == 4
    card = (tmp_path / "first" / "README.md").read_text()
    assert "4 episodes without validation: this is the model after the last of them." in card
    assert "2-way 1-shot" in card

    run(configs / "own_clips_further.yaml", *small(eight_classes, "second"), "--init_from", str(tmp_path / "first"))
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.config.adapter_config == first.config.adapter_config == {"reduction": 4}
    assert f"Starts from {tmp_path / 'first'}: paradigm adapter" in capsys.readouterr().out


@pytest.mark.slow
def test_a_test_split_of_one_class_is_left_out(config, small, tmp_path, capsys):
    few = write_clips(tmp_path / "few", classes=5, clips=4)
    metrics = run(config("few", dataset="folder"), *small(few, "few"), "--way", "4")
    assert "test" not in metrics and "validation" not in metrics
    printed = capsys.readouterr().out
    assert "The test split has one class, too few for an episode: the model is not tested." in printed
    assert "and 4 classes train" in printed


@pytest.mark.slow
def test_without_validation_the_last_weights_are_the_result(config, tmp_path, capsys):
    metrics = run(config("last"), "--validation", "none")
    assert "validation" not in metrics and metrics["training"]["best_episodes"] == 8
    assert not any("validation_accuracy" in record for record in metrics["training"]["history"])
    result = load_file(tmp_path / "last" / "model.safetensors")
    last = load_file(tmp_path / "last" / "checkpoints" / "episode-000000008" / "model.safetensors")
    assert result and all(torch.equal(tensor, last[f"model.{name}"]) for name, tensor in result.items())
    (tmp_path / "last" / "metrics.json").unlink()
    assert run(config("last"), "--validation", "none", "--resume") == metrics
    with pytest.raises(ValueError, match="validation was 'none' and is 'split'"):
        run(config("last"), "--resume")


@pytest.mark.slow
def test_validation_and_test_have_ways_of_their_own(config, capsys):
    metrics = run(config("ways", num_episodes=2), "--validation_way", "2", "--test_way", "4")
    assert (metrics["validation"]["way"], metrics["test"]["way"]) == (2, 4)
    assert metrics["test"]["num_queries"] == 4 * 5
    assert "as many as there are" not in capsys.readouterr().out
