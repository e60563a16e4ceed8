"""Whole training runs on small motion shapes: in this process, and as real processes of accelerate."""

import json
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from datasets import concatenate_datasets
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from training_runs import FIELDS, SCRIPTS, assert_same_end, command, run, start_forked, weights
from transformers import AutoModel, AutoProcessor

from dmgal_hf import DmgalConfig, MgaConfig
from dmgal_hf.data import load_motion_shapes, sample_episodes
from dmgal_hf.data.preparation import PrepareArguments, describe_source, prepare_videos
from dmgal_hf.training.arguments import (
    DataArguments,
    EvaluateArguments,
    ModelArguments,
    TrainArguments,
    parse_arguments,
)
from dmgal_hf.training.batch_statistics import BatchStatistics
from dmgal_hf.training.checkpoints import StopSignal
from dmgal_hf.training.evaluation import evaluate, evaluate_episodes
from dmgal_hf.training.loading import load_videos
from dmgal_hf.training.training import describe_result, run_fields


@pytest.mark.slow
def test_a_run_leaves_a_model_and_its_records(finished, cache_dir, capsys):
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert yaml.safe_load((folder / "config.yaml").read_text())["learning_rate"] == 0.01
    history = metrics["training"]["history"]
    assert [record["episodes"] for record in history] == [2, 4, 6, 8]
    assert all(record["gradient_norm"] > 0 and 0 <= record["data_wait_share"] <= 1 for record in history)
    assert [i for i, record in enumerate(history) if "validation_accuracy" in record] == [1, 3]
    assert metrics["validation"]["accuracy"] == max(r.get("validation_accuracy", -1) for r in history)
    test = metrics["test"]
    assert (test["num_episodes"], test["num_queries"], len(test["episodes_id"])) == (5, 15, 16)
    assert sum(sum(row.values()) for row in test["confusion"].values()) == 15

    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert processor.crop_size == {"height": 32, "width": 32}
    best = AutoModel.from_pretrained(folder / "best").state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in model.state_dict().items())

    card = (folder / "README.md").read_text()
    assert f"{test['accuracy']:.1f}" in card and test["episodes_id"] in card

    arguments = parse_arguments(
        (DataArguments, ModelArguments, TrainArguments), ["--config", str(folder.parent / "run.yaml")]
    )
    describe_result(*arguments)
    assert "loaded again as DmgalModel and DmgalVideoProcessor" in capsys.readouterr().out


@pytest.mark.slow
def test_training_changes_what_it_should(config):
    """Ten times the same few clips: the loss must fall."""
    metrics = run(config(num_episodes=150, episodes_per_step=1, validate_every=150, test_episodes=0, query=2, shot=1,
                         checkpoint_every=150, learning_rate=0.01, class_loss_weight=1.0))  # fmt: skip
    losses = [record["loss"] for record in metrics["training"]["history"]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@contextmanager
def started(words, log, until):
    """The process of a run, when there is a file or folder `until`; what it prints is in a file."""
    (process,) = start_forked(words, log)
    try:
        deadline = time.monotonic() + 120
        while not until.exists():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
def test_kept_frames_change_nothing_and_are_gone_at_the_end(finished, config, tmp_path, monkeypatch):
    """The finished run kept them: one without, and one with workers that share them, have the same updates."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    run(config("plain"), "--frame_memory", "0")
    assert_same_end(tmp_path / "plain", finished[0])
    assert not (tmp_path / "home").exists()
    run(config("kept", num_workers=2))
    assert_same_end(tmp_path / "kept", finished[0])
    assert list((tmp_path / "home" / "dmgal_hf" / "frames").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("episodes", [2, 4])
def test_resumed_after_kill_equals_uninterrupted(finished, config, tmp_path, episodes):
    path = config("killed")
    with started(command(path), tmp_path / "log", tmp_path / "killed" / "checkpoints" / f"episode-{episodes:09d}"):
        pass
    assert not (tmp_path / "killed" / "metrics.json").exists()
    run(path, "--resume")
    assert_same_end(tmp_path / "killed", finished[0])


@pytest.mark.slow
def test_sigterm_saves_first(finished, config, tmp_path):
    path = config("stopped", checkpoint_every=8, validate_every=8)
    words, log = command(path, "--validate_every", "2"), tmp_path / "log"
    with started(words, log, tmp_path / "stopped" / "best") as process:  # after the first of four steps
        process.terminate()
        process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM, log.read_text()
    assert "Go on with --resume" in log.read_text()
    run(path, "--resume", "--validate_every", "2")
    assert_same_end(tmp_path / "stopped", finished[0])


@pytest.mark.slow
def test_compiled_run_has_the_losses_of_the_plain_one_and_resumes(config, tmp_path, tmp_path_factory, monkeypatch):
    """The real compiler on a network of few kernels: each costs a second of g++."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    backbone = {**FIELDS["backbone_config"], "hidden_sizes": [8], "depths": [1]}
    fields = {"backbone_config": backbone, "motion_attention": False, "class_loss_weight": 0.0, "optimizer": "sgd"}
    plain = run(config("plain", **fields))
    counters.clear()
    compiled = run(config("compiled", **fields, torch_compile=True))
    # The one block of the backbone: in training, and in validation for clips in batches of another size.
    assert counters["stats"]["unique_graphs"] == 3
    folder, last = tmp_path / "compiled", tmp_path / "compiled" / "checkpoints" / "episode-000000008"
    kept = load_file(last / "model.safetensors"), load_file(folder / "model.safetensors")
    for tensors, name in zip(kept, ("checkpoints/episode-000000008/model.safetensors", "model.safetensors")):
        assert tensors.keys() == load_file(tmp_path / "plain" / name).keys()
    model = AutoModel.from_pretrained(folder)
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in model.state_dict().items() if name in kept[1])
    shutil.rmtree(last)
    resumed = run(folder.with_suffix(".yaml"), "--resume")
    for one, two, three in zip(*(metrics["training"]["history"] for metrics in (plain, compiled, resumed))):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
        assert three["loss"] == two["loss"]
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in weights(folder).items())


@pytest.mark.slow
def test_adapters_learn_in_a_run_of_bfloat16_and_are_saved_in_float32(config, tmp_path):
    backbone = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip
    fields = {"paradigm": "adapter", "backbone_config": backbone, "adapter_config": {"reduction": 1}, "augment": False,
              "num_episodes": 20, "learning_rate": 0.02, "validate_every": 20, "checkpoint_every": 20}  # fmt: skip
    AcceleratorState._reset_state()  # one precision a process
    try:
        metrics = run(config("half", **fields, mixed_precision="bf16"))
    finally:
        AcceleratorState._reset_state()
    losses = [record["loss"] for record in metrics["training"]["history"]]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
    frozen = [tensor for name, tensor in saved.items() if name.endswith("mlp.fc1.weight")]
    assert len(frozen) == 2 and not any(torch.equal(one, one.bfloat16().float()) for one in frozen)  # to the last bit


def test_one_episode_has_no_interval(finished, cache_dir, tmp_path, capsys):
    options = ["--model", str(finished[0]), "--cache_dir", cache_dir, "--clips_per_class", "3", "--num_workers", "0",
               "--way", "3", "--num_episodes", "1", "--json", str(tmp_path / "new" / "one.json")]  # fmt: skip
    evaluate(*parse_arguments((DataArguments, EvaluateArguments), options))
    assert re.search(r"query 1, seed 0: \d+\.\d\d % over 1 episodes", capsys.readouterr().out)
    (written,) = json.loads((tmp_path / "new" / "one.json").read_text(), parse_constant=pytest.fail)
    assert written["confidence_interval"] is None
    with pytest.raises(ValueError, match="crop_size: frames are read as the processor of the model says"):
        evaluate(*parse_arguments((DataArguments, EvaluateArguments), [*options, "--crop_size", "16"]))


@pytest.mark.slow
def test_a_prepared_folder_is_recorded_as_what_it_was_made_from(cache_dir, tmp_path):
    data = DataArguments(preset="plain", clips_per_class=3, cache_dir=cache_dir)
    source = describe_source(data) | {"preset": "textured"}
    prepare_videos(load_videos(data), PrepareArguments(output=str(tmp_path / "prepared"), num_proc=1), source)
    fields = run_fields(DataArguments(prepared=str(tmp_path / "prepared")), ModelArguments(), TrainArguments())
    assert fields["dataset"] == "motion_shapes" and fields["preset"] == "textured" and fields["clips_per_class"] == 3


@pytest.mark.slow
def test_accuracy_counts_what_the_model_says(finished, cache_dir):
    """Against a loop over the episodes that asks the processor and the model one by one."""
    model, processor = AutoModel.from_pretrained(finished[0]), AutoProcessor.from_pretrained(finished[0])
    videos = load_motion_shapes(clips_per_class=3, cache_dir=cache_dir)["test"]
    episodes = sample_episodes(videos["label"], 3, 1, 2, 6, seed=3)
    metrics = evaluate_episodes(model, processor, videos, episodes, Accelerator())
    accuracies = []
    for episode in episodes:
        support = {label: [videos[row]["video"]] for row, label in zip(episode["support"], episode["support_labels"])}
        inputs = processor(support=support, query=[videos[row]["video"] for row in episode["query"]])
        with torch.no_grad():
            predicted = model(**inputs).logits[0].argmax(-1)
        accuracies.append((predicted == torch.tensor(episode["query_labels"])).float().mean().item())
    accuracies = torch.tensor(accuracies)
    assert metrics["accuracy"] == pytest.approx(100 * accuracies.mean().item(), abs=1e-4)
    assert metrics["confidence_interval"] == pytest.approx(196 * accuracies.std().item() / 6**0.5, abs=1e-3)
    assert evaluate_episodes(model, processor, videos, episodes, Accelerator(), episodes_per_forward=4) == metrics
    ragged = concatenate_datasets([episodes, sample_episodes(videos["label"], 3, 2, 1, 1, seed=3)])
    with pytest.raises(ValueError, match=r"not of one size.*\(3, 3, 6\), \(3, 6, 3\): set episodes_per_forward=1"):
        evaluate_episodes(model, processor, videos, ragged, Accelerator(), episodes_per_forward=2)


@pytest.mark.slow
def test_a_broken_video_is_replaced_and_reported(config, cache_dir, tmp_path):
    folder = tmp_path / "videos"
    for split, classes in {
        "train": ("left", "right", "up"),
        "val": ("rotate_ccw", "up_right", "figure_eight"),
    }.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for clip in Path(cache_dir, "plain-seed0-v1", name).glob("*.mp4"):
                (folder / split / name / clip.name).write_bytes(clip.read_bytes())
    broken = folder / "train" / "left" / "00001.mp4"
    broken.write_bytes(broken.read_bytes()[:500])
    fields = {"dataset": "folder", "videos": str(folder), "test_episodes": 0, "num_episodes": 4, "validate_every": 4}
    metrics = run(config("replaced", max_broken=0.2, **fields))
    assert metrics["training"]["broken_videos"] == [str(broken)]
    with pytest.raises(
        RuntimeError, match=r"1 of 9 training videos cannot be read, more than max_broken=1\.00%.*00001"
    ):
        run(config("refused", **fields))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_left_out_and_ends_the_run(config, tmp_path):
    with pytest.raises(RuntimeError, match=r"not finite in 2 steps in a row"):
        run(config("bad", learning_rate=1e30, warmup_ratio=0.0, num_episodes=16, max_bad_steps=2))


def test_a_step_left_out_does_not_spoil_the_batch_statistics():
    norm = torch.nn.BatchNorm2d(3)
    statistics = BatchStatistics(norm, Accelerator())
    norm(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    statistics.average()
    kept = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.full((2, 3, 4, 4), torch.nan))
    assert norm.running_mean.isnan().all()
    statistics.restore()
    assert torch.equal(norm.running_mean, kept[0]) and torch.equal(norm.running_var, kept[1])
    assert kept[0].abs().min() > 0


def test_a_signal_ends_validation_at_once(capsys):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.flags() == [1, 0] and not stop.agreed  # honoured after the step
        stop.agree([0.5, 0])
        assert stop.agreed == signal.SIGTERM
        with pytest.raises(SystemExit) as exit, stop.at_once():
            pytest.fail("the state is saved: there is nothing to wait for")
    assert exit.value.code == 128 + signal.SIGTERM and "--resume" in capsys.readouterr().err


class TestBadInput:
    def test_resuming_another_run(self, config, tmp_path, finished):
        path = config("other", output_dir=str(finished[0]))
        with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.01 and is 0\.02"):
            run(path, "--resume", "--learning_rate", "0.02")

    def test_the_states_of_an_earlier_run_are_not_mixed_up_with_a_new_one(self, finished):
        with pytest.raises(ValueError, match=r"holds the states of an earlier run: go on with --resume"):
            run(finished[0].parent / "run.yaml")

    def test_two_runs_do_not_write_into_one_folder(self, config, finished):
        before = (finished[0] / "config.yaml").read_text()
        with FileLock(finished[0] / "checkpoints" / ".lock"), pytest.raises(ValueError, match="another process is"):
            run(finished[0].parent / "run.yaml", "--resume", "--num_workers", "0")
        assert (finished[0] / "config.yaml").read_text() == before

    def test_missing_split(self, config, cache_dir, tmp_path):
        for name in ("left", "right", "up"):
            (tmp_path / "videos" / "train" / name).mkdir(parents=True)
            clip = next(Path(cache_dir, "plain-seed0-v1", name).glob("*.mp4"))
            (tmp_path / "videos" / "train" / name / clip.name).write_bytes(clip.read_bytes())
        with pytest.raises(ValueError, match=r"no split 'validation', only train"):
            run(config("no_split", dataset="folder", videos=str(tmp_path / "videos")))

    def test_a_tracker_that_is_not_installed(self, config):
        installed = set(map(str, get_available_trackers()))
        name = next((name for name in ("tensorboard", "wandb", "trackio") if name not in installed), None)
        if name is None:
            pytest.skip("all trackers are installed")
        with pytest.raises(ValueError, match=f"report_to='{name}' is not installed"):
            run(config("untracked"), "--report_to", name)

    def test_nothing_to_resume(self, config):
        with pytest.raises(FileNotFoundError, match=r"nothing to resume.*leave out --resume"):
            run(config("empty"), "--resume")

    @pytest.mark.slow
    def test_incomplete_checkpoint(self, config, tmp_path):
        path = config("incomplete", test_episodes=0)
        run(path)
        newest = sorted((tmp_path / "incomplete" / "checkpoints").iterdir())[-1]
        (newest / "optimizer.bin").unlink()
        (newest / "checksums.json").unlink()  # as before there were any
        with pytest.raises(FileNotFoundError, match=r"episode-000000008 is not complete.*remove that folder"):
            run(path, "--resume")
        shutil.rmtree(tmp_path / "incomplete" / "best")
        with pytest.raises(FileNotFoundError, match=r"best is missing, the best model of this run: put it back"):
            run(path, "--resume")

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options, message",
        [
            (["--learning_rat", "1"], r"unknown option '--learning_rat'\. Did you mean 'learning_rate'\?"),
            (
                ["--dataset", "kinetics"],
                r"must be motion_shapes, puppets, folder or one of .*kinetics-100.*'kinetics'",
            ),
            (["--dataset", "hmdb51"], r"dataset 'hmdb51' needs videos"),
            (["--dataset", "folder", "--videos", "nowhere"], r"nowhere"),
            (["--way", "30"], r"30-way .*24"),
            (["--shot", "3"], r"3 shots and 1 queries a class need 4"),
            (["--num_episodes", "7"], r"num_episodes must be a multiple of episodes_per_step=2, got 7"),
            (["--optimizer", "adam"], r"optimizer must be adamw or sgd, got 'adam'"),
            (["--report_to", "paper"], r"report_to must be tensorboard, wandb, trackio or none, got 'paper'"),
            (["--validation_way", "8"], r"split 'validation': 8-way"),
            (["--test_way", "1"], r"split 'test': way must be at least 2"),
            (["--validation", "nothing"], r"validation must be split or none, got 'nothing'"),
            (["--test_episodes", "-1"], r"test_episodes must be at least 0, got -1"),
            (["--lr_scheduler", "reduce_lr_on_plateau"], r"reduce_lr_on_plateau needs a validation"),
            (["--gradient_checkpointing"], r"gradient_checkpointing: the backbone 'resnet' has none"),
            (["--adapter_config", "{"], r"adapter_config='\{' is no YAML or JSON"),
            (
                ["--backbone_config", "{model_type: resnet, layer_typ: basic}"],
                r"'layer_typ' for 'resnet'. Did you",
            ),
            (["--backbone_config", "{model_type: resnat}"], r"model_type 'resnat', which transformers does not know"),
            (["--mixed_precision", "fp8"], r"mixed_precision must be no, fp16 or bf16, got 'fp8'"),
        ],
    )
    def test_arguments(self, config, options, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run(config("bad"), *options)

    def test_config_files(self, config, tmp_path):
        with pytest.raises(ValueError, match=r"unknown field 'learningrate'\. Did you mean 'learning_rate'\?"):
            run(config("typo", learningrate=1))
        with pytest.raises(FileNotFoundError, match="there is no config file"):
            run(tmp_path / "missing.yaml")
        (tmp_path / "list.yaml").write_text("- 1")
        with pytest.raises(ValueError, match="must hold a mapping"):
            run(tmp_path / "list.yaml")

    def test_types_in_config_files(self, config):
        with pytest.raises(ValueError, match=r"has num_episodes=8.0, which must be int"):
            run(config("float", num_episodes=8.0))
        with pytest.raises(ValueError, match=r"has num_episodes=True, which must be int"):
            run(config("bool", num_episodes=True))

    def test_null_and_empty_lists_on_the_command_line(self, config):
        classes = (DataArguments, ModelArguments, TrainArguments)
        options = ["--config", str(config("set", max_grad_norm=1.0)), "--max_grad_norm", "null", "--motion_scales"]
        _, model, arguments = parse_arguments(classes, options)
        assert arguments.max_grad_norm is None and model.motion_scales == []

    def test_a_backbone_from_a_folder_is_no_repository(self, tmp_path, monkeypatch):
        (tmp_path / "runs" / "still").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert ModelArguments(backbone="runs/still").backbone == str(tmp_path / "runs" / "still")
        assert ModelArguments(backbone="org/still").backbone == "org/still"

    @pytest.mark.slow
    def test_resuming_with_other_labels(self, config, finished, tmp_path):
        path = config("relabelled", output_dir=str(finished[0]), clips_per_class=4)
        with pytest.raises(ValueError, match=r"labelled_videos was '90 for training.* and is '120 for training"):
            run(path, "--resume")

    def test_no_number_of_shots(self):
        with pytest.raises(ValueError, match="shot is empty"):
            parse_arguments((DataArguments, EvaluateArguments), ["--model", "org/model", "--shot"])

    def test_model_is_required(self):
        with pytest.raises(SystemExit):
            parse_arguments((DataArguments, EvaluateArguments), [])


@pytest.mark.parametrize("path", sorted((SCRIPTS / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse_and_fit_together(path):
    data, model, arguments = parse_arguments((DataArguments, ModelArguments, TrainArguments), ["--config", str(path)])
    DmgalConfig(**model.config_fields())
    if model.adapter_config is not None:
        MgaConfig(**model.adapter_config)
    assert not (data.dataset.startswith("ssv2") and arguments.horizontal_flip)  # a flip changes these labels
    assert arguments.output_dir == f"runs/{path.stem}"
    assert arguments.episodes_per_step % arguments.episodes_per_forward == 0
