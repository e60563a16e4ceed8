"""Whole runs whose steps are replayed, on a stand-in for a GPU: they end as plain ones do, to the last bit."""

import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from card_on_the_cpu import pretend_card
from torch.utils._python_dispatch import TorchDispatchMode
from towers import save_towers
from training_runs import assert_same_end, run

from dmgal_hf import DmgalModel, DmgalVideoProcessor
from dmgal_hf.data.cuda_graphs import ReplayedCall
from dmgal_hf.training import training_run
from dmgal_hf.training.acceleration import why_not_replayed
from dmgal_hf.training.arguments import TrainArguments, parse_arguments
from dmgal_hf.training.episode_learner import EpisodeLearner

ADAPTER = {"paradigm": "adapter", "adapter_config": {"reduction": 2}, "num_frames": 4, "backbone_config": None}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 16, "image_size": 32, "patch_size": 16}  # fmt: skip


@pytest.fixture
def any_precision():
    AcceleratorState._reset_state()  # one a process
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(training_run, "why_not_replayed", lambda *_: None)
    return pretend_card(monkeypatch)


def warnings_of_graphs(caplog):
    return [record.message for record in caplog.records if record.name == "dmgal_hf.data.cuda_graphs"]


@pytest.mark.slow
def test_a_run_of_accumulated_steps_with_class_loss_ends_as_the_plain_one(card, finished, config, tmp_path, caplog):
    """With dropout, running statistics of batch norms, and validations between."""
    run(config("replayed", keep_checkpoints=4))
    assert_same_end(tmp_path / "replayed", finished[0])
    # Gradients lie somewhere after the first of 8 episodes; the third is captured, and tried as the fourth is.
    assert card == {"captured": 1, "replayed": 2 + 6} and warnings_of_graphs(caplog) == []
    # A run that was interrupted ends so, too.
    shutil.copytree(tmp_path / "replayed", tmp_path / "resumed")
    for episodes in (6, 8):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"episode-{episodes:09d}")
    run(config("resumed"), "--resume")
    assert card["captured"] == 2
    assert_same_end(tmp_path / "resumed", finished[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {**ADAPTER, "mixed_precision": "bf16", "text_loss_weight": 0.5, "max_grad_norm": 0.1},
        # Of the backbone the last norm is not used: what has no gradient is to get none.
        {"backbone_config": VIT, "optimizer": "sgd", "weight_decay": 0.5, "motion_reduction": 2},
    ],
    ids=["adapters, text, bfloat16", "vit"],
)
def test_other_runs_end_as_the_plain_ones(any_precision, card, config, tmp_path, fields, caplog):
    if "text_loss_weight" in fields:
        save_towers(tmp_path / "clip", "clip")
        fields = {**fields, "backbone": str(tmp_path / "clip")}
    fields = {**fields, "test_episodes": 0, "validation": "none"}
    run(config("plain", **fields, cuda_graphs=False))
    assert card == {"captured": 0, "replayed": 0}
    run(config("replayed", **fields))
    assert card == {"captured": 1, "replayed": 2 + 6} and warnings_of_graphs(caplog) == []
    assert_same_end(tmp_path / "replayed", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["capture", "replay"])
def test_a_gpu_that_cannot_replay_is_said_once_and_changes_nothing(
    card, finished, config, tmp_path, monkeypatch, caplog, fault
):
    def fail(*_):
        if fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end" if fault == "capture" else "replay", fail)
    with caplog.at_level(logging.WARNING):
        run(config("run"))
    assert_same_end(tmp_path / "run", finished[0])
    reason = {"capture": "not permitted", "replay": "differs from the plain call"}[fault]
    assert [message.count(reason) for message in warnings_of_graphs(caplog)] == [1]


@pytest.mark.slow
def test_where_nothing_can_be_replayed_only_who_asks_hears_of_it(config, capsys):
    fields = {"num_episodes": 2, "validation": "none", "test_episodes": 0}
    run(config("by default", **fields))
    assert "cuda_graphs" not in capsys.readouterr().out
    run(config("asked for", **fields, cuda_graphs=True))
    assert "cuda_graphs: steps run plainly, as these are of CUDA devices, and this is cpu." in capsys.readouterr().out


class OnTheDevice(TorchDispatchMode):
    """Fails where a value goes to the host, or numbers of Python's come from there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::lift_fresh"), "waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_with_all_losses_neither_reads_a_value_nor_brings_one(tmp_path):
    save_towers(tmp_path, "clip")
    fields = {"paradigm": "adapter", "adapter_config": {"reduction": 2}, "text_guidance": True, "num_frames": 4}
    model, processor = DmgalModel.from_backbone(tmp_path, **fields), DmgalVideoProcessor.from_pretrained(tmp_path)
    learner = EpisodeLearner(model, processor, 3, 0.5, 0.5, {0: "push left", 2: "lift"}).train()
    videos = torch.zeros(1, 2, 4, 3, 32, 32, dtype=torch.uint8)
    batch = dict.fromkeys(("support_pixel_values", "query_pixel_values"), videos)
    batch |= dict.fromkeys(("support_labels", "labels"), torch.tensor([[0, 1]]))
    batch |= dict.fromkeys(("support_classes", "query_classes"), torch.tensor([[0, 2]]))
    with OnTheDevice():
        learner(batch, way=2)[0].backward()


@pytest.mark.parametrize(("options", "value"), [([], None), ([""], True), (["false"], False), (["null"], None)])
def test_the_switch_has_a_default_beside_on_and_off(options, value):
    argv = ["--cuda_graphs", *filter(None, options)] if options else []
    (arguments,) = parse_arguments((TrainArguments,), argv)
    assert arguments.cuda_graphs is value


def test_what_keeps_steps_from_being_replayed():
    gpu = {"device": torch.device("cuda"), "distributed_type": DistributedType.NO, "scaler": None}

    def reason(gradient_checkpointing=False, **fields):
        return why_not_replayed(SimpleNamespace(**{**gpu, **fields}), gradient_checkpointing)

    assert reason() is None
    assert "processes wait" in reason(distributed_type=DistributedType.MULTI_GPU)
    assert "gradient_checkpointing" in reason(gradient_checkpointing=True)
    assert "fp16" in reason(scaler=object())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device to replay steps on")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_a_gpu_is_replayed_and_learns_as_the_plain_one(config, any_precision, monkeypatch, caplog, precision):
    captured, capture = [], ReplayedCall._capture
    monkeypatch.setattr(ReplayedCall, "_capture", lambda *inputs: captured.append(1) or capture(*inputs))
    fields = {"mixed_precision": precision, "num_episodes": 20, "validation": "none", "test_episodes": 0}
    histories = [
        run(config(name, **fields, cuda_graphs=switch))["training"]["history"]
        for name, switch in (("plain", False), ("replayed", None))
    ]
    assert captured == [1] and warnings_of_graphs(caplog) == []
    for plain, replayed in zip(*histories, strict=True):
        assert replayed["loss"] == pytest.approx(plain["loss"], rel=1e-3 if precision == "no" else 0.1)
