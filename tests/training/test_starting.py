"""Training that starts from a checkpoint: whole models and adapters alone, and what must fit them."""

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from training_runs import FIELDS, run
from transformers import ViTConfig, ViTModel

from dmgal_hf import DmgalModel, DmgalVideoProcessor, MgaConfig
from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments
from dmgal_hf.training.checkpoints import differing_fields
from dmgal_hf.training.starting import build_model, settle_arguments
from dmgal_hf.training.training import run_fields

# A run's own fields, without those that the checkpoint answers for.
NEW = {"backbone_config", "motion_reduction", "resize", "crop_size"}


def make_start(folder):
    """A DMGAL-FT checkpoint with its processor, as a run leaves it, whose weights no run would draw."""
    torch.manual_seed(7)
    arguments = ModelArguments(
        backbone_config=FIELDS["backbone_config"], motion_reduction=4, num_frames=4, mixer=False
    )
    model, processor = build_model(arguments, DataArguments(resize=36, crop_size=32, image_mean=0.3))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    make_start(folder)
    return folder


@pytest.fixture
def further(config, start):
    """A config file of a run that starts there, and names nothing of the model."""

    def write(name, **fields):
        path = config(name, init_from=str(start), num_episodes=4, validation="none", test_episodes=0)
        content = yaml.safe_load(path.read_text())
        content = {key: value for key, value in content.items() if key not in NEW} | fields
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_the_checkpoint_stands_in_for_what_is_not_given(start):
    data, model = settle_arguments(DataArguments(), ModelArguments(init_from=str(start)), TrainArguments())
    assert (model.paradigm, model.num_frames, model.mixer, model.motion_reduction) == ("ft", 4, False, 4)
    assert (data.resize, data.crop_size) == (36, 32)
    assert settle_arguments(data, model, TrainArguments()) == (data, model)
    network, processor = build_model(model, data)
    expected = load_file(start / "model.safetensors")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items() if name in expected
    )
    assert processor.image_mean == [0.3] * 3 and processor.num_frames == 4
    larger, _ = settle_arguments(DataArguments(crop_size=34), ModelArguments(init_from=str(start)), TrainArguments())
    assert (larger.resize, larger.crop_size) == (36, 34)


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_says_so_and_resumes(further, start, tmp_path, capsys):
    metrics = run(further("run"))
    assert f"Starts from {start}: paradigm ft, 4 frames a video" in capsys.readouterr().out
    fields = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (fields["num_frames"], fields["mixer"], fields["crop_size"]) == (4, False, 32)
    assert (
        "Training started from the weights of a local folder, checkpoint."
        in (tmp_path / "run" / "README.md").read_text()
    )
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before if before[name].dim() > 1}
    assert 0 < max(moved.values()) < 0.1  # trained, and not anew
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "episode-000000004")
    (tmp_path / "run" / "metrics.json").unlink()
    resumed = run(further("run"), "--resume")
    assert [record["loss"] for record in resumed["training"]["history"]] == [
        record["loss"] for record in metrics["training"]["history"]
    ]
    fields = {name: fields[name] for name in ("motion_reduction", "num_frames", "mixer", "resize", "crop_size")}
    anew = further("run", **fields, backbone_config=FIELDS["backbone_config"], init_from=None)
    with pytest.raises(ValueError, match=r"another run: .*init_from was '.*checkpoint' and is None"):
        run(anew, "--resume")


@pytest.mark.slow
def test_head_only_leaves_the_backbone_as_it_is(further, start, tmp_path):
    metrics = run(further("head", head_only=True))
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "head" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)  # nor its batch statistics
    ours = sum(tensor.numel() for name, tensor in DmgalModel.from_pretrained(start).named_parameters()
               if not name.startswith("backbone."))  # fmt: skip
    assert metrics["training"]["trainable_parameters"] == ours


@pytest.mark.slow
def test_the_backbone_has_a_learning_rate_of_its_own(further, start, tmp_path):
    def moved(name: str, **options) -> dict[bool, float]:
        run(further(name, **options))
        after = load_file(tmp_path / name / "model.safetensors")
        weights = [weight for weight in before if weight.endswith("weight")]
        return {
            of_backbone: max(
                (before[one] - after[one]).abs().max().item()
                for one in weights
                if one.startswith("backbone.") == of_backbone
            )
            for of_backbone in (True, False)
        }

    before = load_file(start / "model.safetensors")
    same, slower = moved("same"), moved("slower", backbone_learning_rate=1e-6)
    assert same[True] > 1e-4 and same[False] > 1e-4
    assert 0 < slower[True] < 1e-5 and slower[False] > 1e-4


# Adapters alone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       image_size=32, patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    DmgalVideoProcessor(size=36, crop_size=32, num_frames=4).save_pretrained(folder)
    return str(folder)


def few_shot(backbone):
    return DmgalModel.from_backbone(backbone, paradigm="adapter", num_frames=4).eval()


def bare(backbone):
    return ViTModel.from_pretrained(backbone, add_pooling_layer=False)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "base, adapters",
    [
        (bare, MgaConfig(reduction=2, cmga_layers=[0], init_weights=False)),
        (few_shot, MgaConfig(reduction=2, init_weights=False)),
        (bare, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)),
        (few_shot, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)),
    ],
    ids=["bare", "inside a DmgalModel", "LoRA", "LoRA inside a DmgalModel"],
)
def test_adapters_alone_are_where_training_starts(tmp_path, backbone, base, adapters):
    """Against peft's own loading into the frozen model."""
    get_peft_model(base(backbone), adapters).save_pretrained(tmp_path)
    arguments = settle_arguments(DataArguments(), ModelArguments(init_from=str(tmp_path)), TrainArguments())
    model, _ = build_model(arguments[1], arguments[0])
    expected = few_shot(backbone)
    (expected if base is few_shot else expected.backbone).load_adapter(tmp_path)
    generator = torch.Generator().manual_seed(1)
    videos = [torch.randn(1, n, 4, 3, 32, 32, generator=generator) for n in (2, 3)]
    logits = model.eval()(videos[0], torch.tensor([[0, 1]]), videos[1]).logits
    torch.testing.assert_close(logits, expected(videos[0], torch.tensor([[0, 1]]), videos[1]).logits)
    assert (logits - few_shot(backbone)(videos[0], torch.tensor([[0, 1]]), videos[1]).logits).abs().max() > 1e-4
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("mga_adapter" in name or "lora_" in name for name in trainable)
    model.save_pretrained(tmp_path / "whole")
    again = DmgalModel.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(again(videos[0], torch.tensor([[0, 1]]), videos[1]).logits, logits)
    assert settle_arguments(*arguments, TrainArguments()) == arguments


# What must fit


def settle(options, path=None):
    classes = (DataArguments, ModelArguments, TrainArguments)
    return settle_arguments(*parse_arguments(classes, [*(["--config", str(path)] if path else []), *options]))


class TestBadInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            (["--paradigm", "adapter"], "paradigm is 'ft' there and 'adapter' here"),
            (["--num_frames", "8"], "num_frames is 4 there and 8 here"),  # the default, but it was given
            (["--motion_reduction", "2"], "motion_reduction is 4 there and 2 here"),
            (["--no_motion_attention"], "cross_motion_attention is True there and False here; self_motion_attention"),
            (
                ["--mixer", "true", "--alignment", "otam"],
                "alignment is 'bi_mhm' there and 'otam' here; mixer is False",
            ),
            (
                ["--backbone_config", "{model_type: resnet, hidden_sizes: [8, 32]}"],
                r"backbone_config.hidden_sizes is \[8, 16\] there and \[8, 32\] here",
            ),
            (["--text_guidance"], "text_guidance is False there and True here"),
        ],
    )
    def test_another_model(self, start, options, message):
        with pytest.raises(ValueError, match=rf"checkpoint does not fit the arguments: {message}.*Leave these out"):
            settle(["--init_from", str(start), *options])

    def test_another_model_in_a_config_file(self, start, tmp_path):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"init_from": str(start), "num_frames": 8}))
        with pytest.raises(ValueError, match="num_frames is 4 there and 8 here"):
            settle([], tmp_path / "run.yaml")
        settle(["--num_frames", "4", "--backbone", "null", "--adapter_config", "null"], tmp_path / "run.yaml")

    def test_other_adapters(self, tmp_path, backbone):
        get_peft_model(bare(backbone), MgaConfig(reduction=2)).save_pretrained(tmp_path)
        start = ["--init_from", str(tmp_path)]
        for options, message in (
            (["--adapter_config", "{reduction: 4}"], "adapter_config.reduction is 2 there and 4 here"),
            (["--adapter_config", "{peft_type: LORA, r: 4}"], "adapter_config.peft_type is 'MGA' there and 'LORA'"),
            (["--num_frames", "8"], "num_frames is 4 there and 8 here"),
            (["--paradigm", "ft"], "paradigm is 'adapter' there and 'ft' here"),
            (["--backbone", "org/other"], "backbone is '.*vit' there and 'org/other' here"),
        ):
            with pytest.raises(ValueError, match=message):
                settle([*start, *options])
        settle([*start, "--adapter_config", "null"])
        settle([*start, "--adapter_config", "{reduction: 2}", "--paradigm", "adapter", "--backbone", backbone])
        with pytest.raises(ValueError, match="head_only is for paradigm ft: with adapter the backbone is frozen"):
            settle([*start, "--head_only"])
        with pytest.raises(
            ValueError, match="backbone_learning_rate: with paradigm adapter or head_only the backbone"
        ):
            settle([*start, "--backbone_learning_rate", "1e-4"])

    def test_no_checkpoint_of_dmgal(self, backbone, start, tmp_path):
        with pytest.raises(ValueError, match=r"vit is of type 'vit' and no checkpoint of DMGAL: give .* as backbone"):
            settle(["--init_from", backbone])
        get_peft_model(bare(backbone), MgaConfig(reduction=2)).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        for base, message in ((str(start), "a checkpoint of DMGAL: start from that"), (None, "do not say which")):
            (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": base}))
            with pytest.raises(ValueError, match=message):
                settle(["--init_from", str(tmp_path)])

    def test_text_for_a_checkpoint_without(self, start):
        arguments = settle(["--init_from", str(start), "--text_loss_weight", "1"])
        with pytest.raises(ValueError, match="text_loss_weight needs a model in which names take part as text, and"):
            build_model(arguments[1], arguments[0])


def test_states_of_before_a_field_was_there_go_on():
    now = run_fields(DataArguments(), ModelArguments(), TrainArguments(text_loss_weight=0.5))
    new = ("validation", "validation_way", "text_loss_weight", "text_guidance", "init_from", "head_only")
    before = {name: value for name, value in now.items() if name not in new}
    assert differing_fields(before, now, set()) == ["text_loss_weight was 0.0 and is 0.5"]
