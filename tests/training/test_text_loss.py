"""Training with names as text: the loss beside that of the episode, and what a run with it leaves behind."""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from towers import make_tokenizer, save_towers
from training_runs import run, run_forked, sharded_command
from transformers import AutoModel, AutoProcessor, ResNetConfig, ResNetModel

from dmgal_hf import DmgalModel, DmgalVideoProcessor
from dmgal_hf.training.episode_learner import EpisodeLearner

# Numbers with gaps, as novel classes lie between them in a list of all.
BASE = {1: "push left", 2: "pull_right", 5: "lift"}
ADAPTER = {"paradigm": "adapter", "adapter_config": {"reduction": 2}, "frame_pooling": "cls"}


def make_batch(frames=4, seed=0):
    """Two episodes of two classes, a support and two queries each; what EpisodeVideos gives a learner."""
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randint(256, (2, n, frames, 3, 32, 32), dtype=torch.uint8, generator=generator) for n in (2, 4)]
    return {
        "support_pixel_values": pixels[0], "support_labels": torch.tensor([[0, 1], [0, 1]]),
        "support_classes": torch.tensor([[5, 1], [2, 5]]),
        "query_pixel_values": pixels[1], "labels": torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
        "query_classes": torch.tensor([[5, 5, 1, 1], [2, 2, 5, 5]]),
    }  # fmt: skip


def make_learner(folder, weight, **fields):
    model = DmgalModel.from_backbone(folder, num_frames=4, text_guidance=True, **{**ADAPTER, **fields})
    return EpisodeLearner(model, DmgalVideoProcessor.from_pretrained(folder), 6, 0.0, weight, BASE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_loss_is_the_cross_entropy_of_the_scores_of_both_towers(tmp_path, family):
    """By transformers' own model: the cosine of the mean frame with the text of every base class."""
    towers, batch = save_towers(tmp_path, family), make_batch()
    fields = {"text_templates": ["{}"], "frame_pooling": "cls" if family == "clip" else "mean"}
    plain, learner = (make_learner(tmp_path, weight, **fields).eval() for weight in (0.0, 0.7))
    with torch.no_grad():
        without, with_text = plain(batch)[0], learner(batch)[0]
        padding = {"padding": True} if family == "clip" else {"padding": "max_length"}
        tokens = make_tokenizer(family)(["push left", "pull right", "lift"], return_tensors="pt", **padding)
        tokens = {name: value for name, value in tokens.items() if name == "input_ids" or family == "clip"}
        tokens.pop("token_type_ids", None)
        text = torch.nn.functional.normalize(towers.get_text_features(**tokens).pooler_output, dim=-1)
        losses = []
        for part in ("support", "query"):
            frames = learner.processor.normalize(batch[f"{part}_pixel_values"]).flatten(0, 2)
            videos = towers.get_image_features(pixel_values=frames).pooler_output.unflatten(0, (-1, 4)).mean(1)
            scores = torch.nn.functional.normalize(videos, dim=-1) @ text.T * towers.logit_scale.exp()
            scores = scores + getattr(towers, "logit_bias", 0)
            places = torch.tensor([sorted(BASE).index(number) for number in batch[f"{part}_classes"].flatten()])
            losses.append(torch.nn.functional.cross_entropy(scores, places, reduction="none"))
    expected = 0.7 * torch.cat(losses).mean()
    torch.testing.assert_close(with_text - without, expected, atol=1e-5, rtol=0)
    assert expected > 0.1


@pytest.mark.slow
def test_it_trains_the_adapters_alone_and_falls(tmp_path):
    save_towers(tmp_path, "clip")
    learner, batch = make_learner(tmp_path, 10.0).train(), make_batch()
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    assert not any("text_embeds" in name for name in before)  # names and text tower give it again
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, 0.01), []
    for _ in range(15):
        loss, output = learner(batch)
        losses.append((loss - output.loss).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 10 * math.log(3) < losses[0]  # better than chance in the end
    changed = {name for name, tensor in learner.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".mga_adapter." in name for name in changed)


@pytest.mark.slow
def test_a_run_with_text_leaves_a_model_that_knows_its_text_tower(config, tmp_path):
    """Also where it is sharded, and where it starts from a checkpoint that brings the tower."""
    save_towers(tmp_path / "clip", "clip")
    path = config("text", **ADAPTER, backbone=str(tmp_path / "clip"), backbone_config=None, text_loss_weight=0.5,
                  num_episodes=4, num_frames=4)  # fmt: skip
    history = run(path)["training"]["history"]
    model = AutoModel.from_pretrained(tmp_path / "text")
    assert model.config.text_guidance and model.config.text_model == str(tmp_path / "clip")
    assert model.embed_class_names(["push left", "lift"]).shape == (2, 20)
    assert torch.equal(model.text_head.logit_scale, torch.tensor(1.5))
    assert yaml.safe_load((tmp_path / "text" / "config.yaml").read_text())["text_guidance"] is True
    card = (tmp_path / "text" / "README.md").read_text()
    assert "Names of classes take part as text" in card and "named the base class of every clip by text" in card
    saved = load_file(tmp_path / "text" / "checkpoints" / "episode-000000004" / "model.safetensors")
    assert not any("text_embeds" in name or "text_model" in name for name in saved)

    launch = [*sharded_command(path), "--output_dir", str(tmp_path / "sharded"), "--validation", "none"]
    result = run_forked(launch)
    assert result.returncode == 0, result.stdout
    sharded = json.loads((tmp_path / "sharded" / "metrics.json").read_text())["training"]["history"]
    assert [record["loss"] for record in sharded] == pytest.approx([record["loss"] for record in history], rel=1e-3)

    model.save_pretrained(tmp_path / "whole", with_text_tower=True)
    AutoProcessor.from_pretrained(tmp_path / "text").save_pretrained(tmp_path / "whole")
    start = {"init_from": str(tmp_path / "whole"), "backbone_config": None, "text_loss_weight": 0.5}
    run(config("further", **start, num_episodes=2, test_episodes=0, validation="none"))
    assert AutoModel.from_pretrained(tmp_path / "further").embed_class_names(["lift"]).shape == (1, 20)
    assert (tmp_path / "further" / "text_tower" / "model.safetensors").is_file()


class TestBadInput:
    @pytest.mark.parametrize("name", ["text_loss_weight", "class_loss_weight"])
    @pytest.mark.parametrize("value", ["-0.1", "inf", "nan"])
    def test_weights(self, config, name, value):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, inf\), got {value}"):
            run(config("bad"), f"--{name}", value)

    def test_no_text_tower(self, config, tmp_path):
        with pytest.raises(ValueError, match="text_loss_weight need a pretrained backbone with a text tower"):
            run(config("random"), "--text_loss_weight", "1")
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
        DmgalVideoProcessor().save_pretrained(tmp_path / "resnet")
        with pytest.raises(ValueError, match=r"needs a backbone with a text tower .* and 'resnet' has none"):
            run(config("pictures", backbone=str(tmp_path / "resnet"), backbone_config=None, text_loss_weight=1.0))

    def test_nothing_that_text_could_train(self, config):
        with pytest.raises(ValueError, match="text_loss_weight trains the backbone alone, which head_only keeps"):
            run(config("frozen"), "--text_loss_weight", "1", "--head_only")

    def test_numbered_classes(self, tmp_path):
        save_towers(tmp_path, "clip")
        model = DmgalModel.from_backbone(tmp_path, text_guidance=True, **ADAPTER)
        for numbered in ({0: "0", 1: "17"}, {3: "train0", 4: "train63"}, {0: "class 1", 1: "class 2"}):
            with pytest.raises(ValueError, match=r"the base classes are numbered \(.*class_labels"):
                EpisodeLearner(model, DmgalVideoProcessor(), 6, 0.0, 1.0, numbered)
