"""Weights come back from a checkpoint as they were saved, whatever the kind of backbone."""

import copy

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


def assert_same(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    trains = [{name for name, weight in one.named_parameters() if weight.requires_grad} for one in (model, other)]
    assert trains[0] == trains[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_saved_model_comes_back_and_saves_the_same_file(kind, tmp_path):
    saved = save(kind, tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(loaded, saved)
    assert not any(report.values())
    buffers = dict(saved.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in loaded.named_buffers())
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "vit", "resnet"])
def test_another_dtype_and_several_files(kind, tmp_path):
    saved = save(kind, tmp_path / "one")
    saved.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        loaded = AutoModel.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert next(loaded.parameters()).dtype == torch.bfloat16
        assert_same(loaded, saved.to(torch.bfloat16))


def test_what_does_not_fit_is_reported_and_initialised(tmp_path):
    saved = save("resnet", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["mixer.temporal_in.weight"]
    weights["stray"] = torch.zeros(1)
    weights["self_attention.gamma"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert report["missing_keys"] == {"mixer.temporal_in.weight"} and report["unexpected_keys"] == {"stray"}
    assert {name for name, *_ in report["mismatched_keys"]} == {"self_attention.gamma"}
    assert loaded.self_attention.gamma == 0
    assert torch.equal(loaded.mixer.temporal_in.weight, torch.eye(loaded.config.num_frames))
    for model in (loaded, saved):
        del model.mixer.temporal_in.weight, model.self_attention.gamma
    assert_same(loaded, saved)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path)


def test_a_state_dict_may_stand_in_for_the_files():
    model = build("clip")
    loaded = DmgalModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same(loaded, model)


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov2"])
def test_the_input_embeddings_are_those_of_the_backbone(kind):
    model = build(kind)
    embeddings = model.get_input_embeddings()
    assert embeddings is model.backbone.get_input_embeddings()
    other = copy.deepcopy(embeddings)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and model.backbone.get_input_embeddings() is other
