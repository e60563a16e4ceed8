"""What the cards say, and which files make up a repository."""

import json
import runpy
import shutil
import sys

import pytest
from hub_runs import ARGUMENTS, CHECKPOINT, METRICS, ROOT, make_run
from huggingface_hub import ModelCard

from dmgal_hf.hub import collect_files, render_model_card, write_planned_cards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def test_the_card_of_a_run_says_what_was_measured(run):
    card = ModelCard(str(render_model_card(run, "org/run")))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 54.32)
    assert result.metric_args == {"confidence_interval_95": 1.23}
    assert result.dataset_config == "5-way 1-shot" and result.dataset_type == "something-something-v2"
    assert result.dataset_args == {"way": 5, "shot": 1, "query": 3, "num_episodes": 200,
                                   "episodes_id": "0123456789abcdef"}  # fmt: skip
    assert card.data.model_name == "run" and card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "video-classification"
    assert card.data.base_model is None
    for fact in ("54.32 %", "± 1.23 %", "`0123456789abcdef`", "learning_rate: 0.001", "40 episodes", "after 30",
                 '"org/run"', "2411.11335", "others of their class: 1.", "Crowd workers",
                 "started from random weights"):  # fmt: skip
        assert fact in card.text
    assert "/home/me" not in str(card) and "Not yet trained" not in card.text


def test_a_number_that_was_not_measured_is_absent(tmp_path):
    metrics = {name: METRICS[name] for name in ("training", "validation")}
    untested = render_model_card(make_run(tmp_path / "untested", metrics))
    assert untested.data.eval_results is None and "No accuracy on novel classes has been measured" in untested.text
    converted = render_model_card(CHECKPOINT)
    assert converted.data.eval_results is None and converted.data.datasets is None
    assert "## Training" not in converted.text and "is not recorded" in converted.text
    started = make_run(tmp_path / "started", metrics=None)
    (started / "model.safetensors").unlink()
    card = render_model_card(started)
    assert "Not yet trained" in card.text and card.data.eval_results is None
    single = METRICS["test"] | {"num_episodes": 1, "confidence_interval": None}
    card = render_model_card(make_run(tmp_path / "single", METRICS | {"test": single}))
    assert card.data.eval_results[0].metric_args is None and "nan" not in str(card)


def test_the_card_describes_the_model_that_is_there(tmp_path):
    assert "(S-MGA), a temporal and channel mixer, cross motion-guided attention (C-MGA)" in render_model_card(
        CHECKPOINT
    ).text.replace("\n", " ")
    folder = make_run(tmp_path / "run", arguments=ARGUMENTS | {"dataset": "motion_shapes", "preset": "textured"})
    config = json.loads((folder / "config.json").read_text())
    switches = {"mixer": False, "self_motion_attention": False, "alignment": "otam"}
    (folder / "config.json").write_text(json.dumps(config | switches))
    card = render_model_card(folder)
    assert "mixer" not in card.text.split("## Results")[0] and "S-MGA" not in card.text
    assert "C-MGA" in card.text and "matched by ordered temporal alignment" in card.text
    assert "4 frames a video" in card.text
    assert card.data.eval_results[0].dataset_name.endswith("preset textured")
    puppets = make_run(tmp_path / "puppets", arguments=ARGUMENTS | {"dataset": "puppets", "preset": "crowd"})
    card = render_model_card(puppets)
    assert card.data.datasets == ["puppets"] and "puppets, made by dmgal_hf, preset crowd. Synthetic" in card.text
    (folder / "config.json").write_text(json.dumps(config | {"paradigm": "adapter"}))
    assert "without adapters and without training" in render_model_card(folder).text


def test_the_card_of_a_lora_baseline_speaks_of_no_motion_adapters(tmp_path):
    folder = make_run(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    for adapters, expected in (
        ({"reduction": 2}, "gather patches that move"),
        ({"peft_type": "LORA", "r": 4}, "LORA"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"paradigm": "adapter", "adapter_config": adapters}))
        text = render_model_card(folder).text
        assert expected in text and ("move alike" in text) == (expected != "LORA")


def test_weights_of_unknown_origin_get_no_licence(run):
    card = render_model_card(CHECKPOINT)
    assert card.data.license is None and "Under which terms" in card.text
    assert "Under which terms" not in render_model_card(run).text


def test_base_models_are_repositories_and_adapters_are_peft(tmp_path):
    backbone = "openai/clip-vit-base-patch16"
    card = render_model_card(make_run(tmp_path / "hub", arguments=ARGUMENTS | {"backbone": backbone}))
    assert card.data.base_model == backbone and f"pretrained on ({backbone})" in card.text
    local = tmp_path / "someone" / "backbone"
    local.mkdir(parents=True)
    card = render_model_card(make_run(tmp_path / "local", arguments=ARGUMENTS | {"backbone": str(local)}))
    assert card.data.base_model is None and str(tmp_path / "someone") not in str(card)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config["backbone_config"]["_name_or_path"] = str(local)
    (tmp_path / "local" / "config.json").write_text(json.dumps(config))
    assert str(tmp_path).encode() not in collect_files(tmp_path / "local")["config.json"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": backbone, "peft_type": "MGA"}))
    card = render_model_card(adapter, "org/adapter")
    assert card.data.library_name == "peft" and card.data.base_model == backbone
    assert 'load_adapter("org/adapter")' in card.text and "Not yet trained" in card.text


def test_the_card_says_what_training_started_from(tmp_path):
    started = ARGUMENTS | {"init_from": "org/dmgal-ft-hmdb51", "head_only": True}
    card = render_model_card(make_run(tmp_path / "hub", arguments=started))
    assert (card.data.base_model, card.data.base_model_relation) == ("org/dmgal-ft-hmdb51", "finetune")
    assert "Training started from the weights of org/dmgal-ft-hmdb51." in card.text
    assert "random weights" not in card.text and "The backbone stayed as it was" in card.text
    local = tmp_path / "someone" / "mine"
    local.mkdir(parents=True)
    card = render_model_card(make_run(tmp_path / "local", arguments=ARGUMENTS | {"init_from": str(local)}))
    assert card.data.base_model is None and str(tmp_path / "someone") not in str(card)
    assert "Training started from the weights of a local folder, mine." in card.text
    assert "started" not in render_model_card(make_run(tmp_path / "new")).text.split("## Data")[0]


def test_planned_cards_are_up_to_date_and_promise_nothing(tmp_path):
    write_planned_cards(tmp_path)
    cards = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "model_cards").glob("dmgal-*.md")}
    assert kept == cards, "run dmgal_hf.hub.write_planned_cards('model_cards')"
    assert len(cards) == 10
    for text in cards.values():
        assert "Not yet trained" in text and "model-index" not in text and " %" not in text


def test_dry_run_shows_files_and_card(run, monkeypatch, capsys):
    script = ROOT / "scripts" / "push_to_hub.py"
    arguments = ["--output_dir", str(run), "--repo_id", "org/dry", "--dry_run"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr("socket.socket.connect", None)  # a dry run needs no network
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in collect_files(run))
    assert str(render_model_card(run, "org/dry")) in printed


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        collect_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        collect_files(tmp_path)
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        collect_files(tmp_path)
    shutil.copy(CHECKPOINT / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="a model of type 'vit'"):
        collect_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        collect_files(tmp_path)
