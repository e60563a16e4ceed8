"""Backbones that are trained on still pictures: small, and as other commands need them."""

import importlib.util
from pathlib import Path

import pytest
import torch

from dmgal_hf import DmgalModel, DmgalVideoProcessor

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_still_puppets.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pretrain_still_puppets", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "paradigm"), [("resnet", "ft"), ("vit", "adapter")])
def test_a_backbone_learns_where_joints_are_and_becomes_a_model(script, kind, paradigm, tmp_path, capsys):
    script.main(script.PretrainArguments(output_dir=str(tmp_path), kind=kind, steps=40, batch_size=3, num_workers=0))
    found = [float(line.split(" puts ")[1].split(" %")[0]) for line in capsys.readouterr().out.splitlines()[:3]]
    assert len(found) == 3 and min(found) > 100 / 36 and max(found) > 25  # of the patches a joint lies in one
    model = DmgalModel.from_backbone(tmp_path, paradigm=paradigm, motion_reduction=2, num_frames=2).eval()
    processor = DmgalVideoProcessor.from_pretrained(tmp_path)
    frames = processor.resize_and_crop(torch.zeros(2, 3, 60, 80, dtype=torch.uint8))
    pixels = processor.normalize(torch.stack([frames, frames]))
    assert pixels.shape == (2, 2, 3, 48, 48)
    with torch.no_grad():
        output = model(support_pixel_values=pixels[None], support_labels=torch.tensor([[0, 1]]),
                       query_pixel_values=pixels[None])  # fmt: skip
    assert output.logits.shape == (1, 2, 2)


def test_an_unknown_kind_is_named(script, tmp_path):
    with pytest.raises(ValueError, match="kind must be one of resnet, vit, got 'cnn'"):
        script.main(script.PretrainArguments(output_dir=str(tmp_path), kind="cnn"))
