"""Weights that take the short way into the model against transformers' own way, which a device map asks for."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPVisionConfig, Dinov2Config, ResNetConfig, ViTConfig

from dmgal_hf import DmgalConfig, DmgalModel

VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
ADAPTER = {"paradigm": "adapter", "adapter_config": {"width": 8}}
CONFIGS = {
    "resnet": {
        "backbone_config": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    },
    "clip": {"backbone_config": CLIPVisionConfig(**VIT), **ADAPTER},
    "vit": {"backbone_config": ViTConfig(**VIT), **ADAPTER},  # its files have other names than the model
    "dinov2": {"backbone_config": Dinov2Config(**VIT, use_swiglu_ffn=True), **ADAPTER},  # and join two weights
    "frozen": {"backbone_config": ViTConfig(**VIT), "paradigm": "adapter"},
}


def build(kind):
    torch.manual_seed(0)
    return DmgalModel(DmgalConfig(**CONFIGS[kind]))


def save(kind, folder):
    model = build(kind)
    with torch.no_grad():
        for weight in model.state_dict().values():
            weight.copy_(torch.randint(-8, 8, weight.shape) / 4 if weight.is_floating_point() else 7)
    model.save_pretrained(folder)
    return model


def load(folder, **kwargs):
    """The model and the report of the short way and of transformers'."""
    both = [AutoModel.from_pretrained(folder, output_loading_info=True, **kwargs, **way)
            for way in ({}, {"device_map": "cpu"})]  # fmt: skip
    return [model for model, _ in both], [report for _, report in both]


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    trains = [{name for name, weight in one.named_parameters() if weight.requires_grad} for one in (model, other)]
    assert trains[0] == trains[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_both_ways_give_the_saved_model_and_save_the_same_file(kind, tmp_path):
    saved = save(kind, tmp_path)
    (short, long), reports = load(tmp_path)
    assert_same(short, saved)
    assert_same(short, long)
    assert reports[0] == reports[1] and not any(reports[0].values())
    buffers = dict(long.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in short.named_buffers())
    short.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["clip", "vit", "resnet"])
def test_another_dtype_and_several_files(kind, tmp_path):
    saved = save(kind, tmp_path / "one")
    saved.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        (short, long), _ = load(tmp_path / folder, dtype=torch.bfloat16)
        assert_same(short, long)
        assert next(short.parameters()).dtype == torch.bfloat16


def test_what_does_not_fit_is_reported_and_initialised_as_in_transformers(tmp_path):
    save("resnet", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["mixer.temporal_in.weight"]
    weights["stray"] = torch.zeros(1)
    weights["self_attention.gamma"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (short, long), reports = load(tmp_path, ignore_mismatched_sizes=True)
    assert reports[0] == reports[1]
    assert reports[0]["missing_keys"] == {"mixer.temporal_in.weight"} and reports[0]["unexpected_keys"] == {"stray"}
    assert {name for name, *_ in reports[0]["mismatched_keys"]} == {"self_attention.gamma"}
    for model in (short, long):
        assert model.self_attention.gamma == 0 and 0 < model.mixer.temporal_in.weight.abs().max() < 1
        del model.mixer.temporal_in.weight
    assert_same(short, long)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path)


def test_a_state_dict_may_stand_in_for_the_files():
    model = build("clip")
    loaded = DmgalModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same(loaded, model)
