"""The ablation script: variants by seeds, each trained once, in a table with its intervals."""

import json
import shutil
import sys

import pytest
from training_runs import SCRIPTS

from dmgal_hf.training.arguments import (
    DataArguments,
    ModelArguments,
    TrainArguments,
    parse_arguments,
)

sys.path.insert(0, str(SCRIPTS))

import ablate


@pytest.mark.slow
def test_ablation(config, cache_dir, tmp_path, capsys):
    backbone = {"model_type": "vit", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    path = config("ablation", paradigm="adapter", backbone_config=backbone, adapter_config={"reduction": 2},
                  num_episodes=2, test_episodes=2, validate_every=2, motion_reduction=8)  # fmt: skip
    names = ["both", "LoRA of equal size", "frozen backbone, OTAM"]

    def run_ablation(*options):
        classes = (DataArguments, ModelArguments, TrainArguments, ablate.AblationArguments)
        ablate.main(*parse_arguments(classes, ["--config", str(path), *options]))
        return [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]

    rows = run_ablation("--only", *names, "--seeds", "0", "1")
    assert [row[0] for row in rows] == [f"| {name}" for name in names]
    mga, lora, frozen = (int(row[1].replace(",", "")) for row in rows)
    assert mga >= lora > mga / 2 and frozen == 0
    assert all("±" in row[2] and row[3].count(",") == 1 and row[4] == "4 |" for row in rows)  # 2 seeds of 2 episodes
    metrics = sorted(tmp_path.glob("ablation/*/*/metrics.json"))
    written = [file.stat().st_mtime_ns for file in metrics]
    assert len(metrics) == 6 and run_ablation("--only", *names, "--seeds", "0", "1") == rows
    assert [file.stat().st_mtime_ns for file in metrics] == written  # nothing was trained again
    with_one = (tmp_path / "ablation" / "both" / "seed_1" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "ablation" / "both")
    assert run_ablation("--only", *names, "--seeds", "0", "1", "--processes", "2") == rows
    assert (tmp_path / "ablation" / "both" / "seed_1" / "model.safetensors").read_bytes() == with_one
    metrics = json.loads((tmp_path / "ablation" / "both" / "seed_1" / "metrics.json").read_text())["test"]
    by_shots = run_ablation("--only", *names, "--seeds", "0", "1", "--shots", "1", "2")
    assert by_shots[:3] == rows and [row[0] for row in by_shots[4:]] == [row[0] for row in rows]
    (again,) = json.loads((tmp_path / "ablation" / "both" / "seed_1" / "test_2shot.json").read_text())
    assert again["shot"] == 2 and again["num_queries"] == metrics["num_queries"]
    assert "Training" in (tmp_path / "ablation" / "both" / "seed_1" / "output.txt").read_text()
    with pytest.raises(ValueError, match=r"no variant 'no mixer'; there are both, Smga alone"):
        run_ablation("--only", "no mixer")
    with pytest.raises(ValueError, match=r"both/seed_0 holds another run: learning_rate was 0.01 and is 0.5. Give"):
        run_ablation("--only", "both", "--learning_rate", "0.5")


def test_the_interval_over_seeds_is_that_of_students_t():
    assert ablate.interval_over_seeds([90.0, 92.0, 94.0]) == pytest.approx(4.303 * 2 / 3**0.5)
    assert ablate.interval_over_seeds([80.0] * 20) == 0
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        ablate.AblationArguments(processes=0)
    with pytest.raises(ValueError, match=r"shots must be at least 1 each, got \[1, 0\]"):
        ablate.AblationArguments(shots=[1, 0])


def test_rows_of_an_ablation_without_a_spread_and_without_an_interval():
    def result(accuracy, interval):
        test = {"accuracy": accuracy, "confidence_interval": interval, "num_episodes": 2}
        return [{"test": test, "training": {"trainable_parameters": 1000}}]

    table = ablate.format_table({"sure": result(100.0, 0.0), "single": result(50.0, None)}, [0])
    assert table.splitlines()[2:] == ["| sure | 1,000 | 100.0 ± 0.0 | 2 |", "| single | 1,000 | 50.0 | 2 |"]
