import pytest
import torch
from official import LOGITS, official_frames, official_state_dict
from transformers import ResNetConfig

from dmgal_hf import DmgalConfig, DmgalModel
from dmgal_hf.hub import conversion as convert


def save_official(tmp_path, state, **others):
    path = tmp_path / "checkpoint.pt"
    torch.save(
        {"iteration": 1, "model_state_dict": state, "optimizer_state_dict": {}, "scheduler": {}, **others}, path
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_whole_models_reproduce_the_authors_logits(tmp_path, arch):
    golden = LOGITS[arch]
    model = convert.convert_official_checkpoint(save_official(tmp_path, official_state_dict(arch)))
    frames = golden["num_frames"]
    support = official_frames(f"{arch}.support", golden["way"] * golden["shot"] * frames)
    query = official_frames(f"{arch}.query", golden["num_query"] * frames)
    with torch.no_grad():
        output = model(
            support.unflatten(0, (1, -1, frames)),
            torch.tensor([golden["support_labels"]]),
            query.unflatten(0, (1, -1, frames)),
        )
    torch.testing.assert_close(output.logits[0], torch.tensor(golden["logits"]), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_converted_model_round_trips_to_the_authors_tensors(tmp_path):
    state = official_state_dict("resnet18")
    back = convert.official_state_dict(convert.convert_official_checkpoint(save_official(tmp_path, state)))
    assert back.keys() == state.keys()
    for name in state.keys() - {"Motion_Excitation.pe.pe"}:
        assert torch.equal(back[name], state[name]), name
    position, channel = torch.arange(49)[:, None], torch.arange(0, 64, 2)
    angle = position / 10000 ** (channel / 64)
    code = back["Motion_Excitation.pe.pe"]
    torch.testing.assert_close(code[0, :, 0::2], 0.1 * torch.sin(angle), atol=1e-6, rtol=0)
    torch.testing.assert_close(code[0, :, 1::2], 0.1 * torch.cos(angle), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_multi_gpu_and_bare_state_dicts_convert_too(tmp_path):
    state = official_state_dict("resnet18")
    parallel = {name.replace("resnet.", "resnet.module.", 1): tensor for name, tensor in state.items()}
    torch.save(parallel, tmp_path / "bare.pt")
    first = convert.convert_official_checkpoint(tmp_path / "bare.pt").state_dict()
    second = convert.convert_official_checkpoint(save_official(tmp_path, state)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_missing_and_unknown_keys_are_named(tmp_path):
    state = official_state_dict("resnet18")
    del state["mlp_mix1.fc_d2.bias"]
    state["transformers.0.k_linear.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"Missing keys: mlp_mix1\.fc_d2\.bias.*Unknown keys: transformers\.0\.k_lin"):
        convert.convert_official_checkpoint(save_official(tmp_path, state))


@pytest.mark.slow
def test_foreign_files_are_refused(tmp_path):
    torch.save({"state": {"weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no state dict"):
        convert.convert_official_checkpoint(tmp_path / "other.pt")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"Missing keys: .*resnet\.0\.weight.*Unknown keys: fc\.weight"):
        convert.convert_official_checkpoint(tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read"):
        convert.convert_official_checkpoint(tmp_path / "text.pt")
    state = official_state_dict("resnet18")
    state["resnet.5.0.conv1.weight"] = torch.zeros(128, 64, 5, 5)
    with pytest.raises(ValueError, match=r"resnet\.5\.0\.conv1\.weight \(128, 64, 5, 5\)"):
        convert.convert_official_checkpoint(save_official(tmp_path, state))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("code ran",))

    with pytest.raises(ValueError, match="weights_only"):
        convert.convert_official_checkpoint(save_official(tmp_path, official_state_dict("smga"), extra=Payload()))


def test_the_scale_of_the_position_code_comes_along(tmp_path):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
    model = DmgalModel(DmgalConfig(backbone_config=resnet, motion_reduction=2, position_scale=0.25)).eval()
    torch.nn.init.constant_(model.self_attention.gamma, 1.0)
    back = convert.convert_official_checkpoint(save_official(tmp_path, convert.official_state_dict(model)))
    assert back.config.position_scale == 0.25
    generator = torch.Generator().manual_seed(0)
    support, query = (torch.randn(1, n, 8, 3, 64, 64, generator=generator) for n in (2, 1))
    with torch.no_grad():
        logits = [one(support, torch.tensor([[0, 1]]), query).logits for one in (model, back)]
    assert torch.equal(*logits)


def test_a_resnet_that_theirs_would_compute_otherwise_does_not_go_back():
    model = DmgalModel(DmgalConfig(backbone_config=ResNetConfig(hidden_act="gelu", depths=[1, 1, 1, 1])))
    with pytest.raises(ValueError, match="ResNet has hidden_act='relu', this one 'gelu'"):
        convert.official_state_dict(model)


@pytest.mark.slow
def test_only_complete_models_go_back(tmp_path):
    model = DmgalModel(DmgalConfig(mixer=False))
    with pytest.raises(ValueError, match="mixer=False"):
        convert.official_state_dict(model)
