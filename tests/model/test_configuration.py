import json

import pytest
from transformers import AutoConfig, CLIPVisionConfig, ResNetConfig

from dmgal_hf import DmgalConfig
from dmgal_hf.model import configuration_dmgal


def test_json_round_trip(tmp_path):
    backbone = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=8
    )
    config = DmgalConfig(backbone_config=backbone, num_frames=4, alignment="otam", motion_scales=["full"], mixer=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DmgalConfig and type(loaded.backbone_config) is CLIPVisionConfig
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert (loaded.num_frames, loaded.alignment, loaded.motion_scales, loaded.mixer) == (4, "otam", ["full"], False)
    assert loaded.backbone_config.hidden_size == 32
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "dmgal" and stored["format_version"] == 1


def test_default_is_the_authors_resnet50():
    config = DmgalConfig()
    assert config.backbone_config.hidden_sizes == [256, 512, 1024, 2048]
    assert config.backbone_config.layer_type == "bottleneck"


def test_backbone_may_be_a_dict():
    config = DmgalConfig(backbone_config={"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1]})
    assert isinstance(config.backbone_config, ResNetConfig) and config.backbone_config.hidden_sizes == [8, 16]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"paradigm": "lora"}, r"paradigm must be one of ft, adapter, got 'lora'"),
        ({"alignment": "dtw"}, r"alignment .*bi_mhm, otam, mean.*'dtw'"),
        ({"motion_directions": "left"}, r"motion_directions .*both, forward, backward.*'left'"),
        ({"motion_scales": ["quarter"]}, r"motion_scales .*\['quarter'\]"),
        ({"motion_scales": ["full", "full"]}, r"motion_scales .*at most once"),
        ({"num_frames": 0}, r"num_frames .*at least 1, got 0"),
        ({"num_frames": True}, r"num_frames .*got True"),
        ({"motion_reduction": 2.5}, r"motion_reduction .*2\.5"),
        ({"attention_dropout": 1.0}, r"attention_dropout .*\[0, 1\).*1\.0"),
        ({"otam_smoothing": 0}, r"otam_smoothing must be more than 0, got 0"),
        ({"cosine_epsilon": -1}, r"cosine_epsilon .*-1"),
        ({"mixer": "yes"}, r"mixer must be true or false, got 'yes'"),
        ({"frame_pooling": "max"}, r"frame_pooling .*mean, cls.*'max'"),
        ({"frame_pooling": "cls"}, r"frame_pooling must be 'mean' with paradigm='ft'"),
        ({"adapter_config": {}}, r"adapter_config needs paradigm='adapter'"),
        (
            {"paradigm": "adapter", "adapter_config": {"reducton": 2}},
            r"'reducton' for MgaConfig\. Did you mean 'reduction'",
        ),
        ({"paradigm": "adapter", "adapter_config": {"width": 0}}, r"MgaConfig\.width=0"),
        ({"paradigm": "adapter", "adapter_config": {"peft_type": "IA3"}}, r"one of MGA, LORA, got 'IA3'"),
        (
            {"paradigm": "adapter", "adapter_config": {"peft_type": "LORA", "rank": 2}},
            r"no field 'rank' for LoraConfig\. Known fields: .*lora_alpha",
        ),
        (
            {"paradigm": "adapter", "adapter_config": {"peft_type": "LORA", "r": 2, "budget": {}}},
            r"budget .* stands in place of r, got budget=\{\} and r=2",
        ),
        ({"aligment": "otam"}, r"no field 'aligment' \(value 'otam'\)\. Did you mean 'alignment'\?"),
        ({"zzz": 1}, r"no field 'zzz'.*Known fields: .*num_frames"),
        ({"backbone_config": {"hidden_size": 3}}, r"backbone_config must be .*model_type"),
        ({"format_version": 99}, r"format version 99.*reads up to 1.*pip install -U"),
    ],
)
def test_bad_values_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DmgalConfig(**fields)


def test_what_a_file_or_a_tool_adds_is_kept(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_dmgal.logger, "warning_once", warned.append)
    config = DmgalConfig(num_frames=4)
    config.use_cache = False  # as transformers.Trainer does
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    added = {"batch_norm_eps": 0.5, "_of_a_tool": {"a": 1}, "quantization_config": {"bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(stored | added))
    assert not warned
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        DmgalConfig.from_json_file(tmp_path / "config.json"),
        DmgalConfig.from_dict(stored | added, num_frames=4),
    ):
        assert loaded.tie_word_embeddings is True and loaded.batch_norm_eps == 0.5 and loaded.num_frames == 4
        loaded.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert {name: again[name] for name in added} == added and again["tie_word_embeddings"] is True
    assert not warned


def test_what_looks_like_a_mistyped_field_is_warned_of(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(configuration_dmgal.logger, "warning_once", warned.append)
    config = DmgalConfig.from_dict({"model_type": "dmgal", "aligment": "otam"})
    assert config.alignment == "bi_mhm" and config.to_dict()["aligment"] == "otam"
    (message,) = warned
    assert "'aligment' (value 'otam')" in message and "Did you mean 'alignment'?" in message
    config.num_frame = 3
    assert len(warned) == 2 and "Did you mean 'num_frames'?" in warned[1]
    config.num_frames = 3
    assert len(warned) == 2
