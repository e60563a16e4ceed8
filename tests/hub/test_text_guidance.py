"""Checkpoints with text guidance on the Hub: what is uploaded, and what the card says."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_runs import CHECKPOINT
from hub_server import TOKEN, LocalHub
from towers import save_towers

from dmgal_hf import DmgalModel
from dmgal_hf.hub.cards import render_model_card
from dmgal_hf.hub.upload import collect_files


@pytest.fixture
def model(tmp_path):
    save_towers(tmp_path / "clip", "clip")
    fields = {"paradigm": "adapter", "text_guidance": True, "frame_pooling": "cls", "num_frames": 4}
    return DmgalModel.from_backbone(tmp_path / "clip", **fields)


def save(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)
    shutil.copy(CHECKPOINT / "preprocessor_config.json", folder)
    return folder


def test_a_text_tower_that_only_this_machine_has_is_not_named(tmp_path, model):
    with pytest.raises(ValueError, match=r"where nobody else finds it: save .* with_text_tower=True"):
        collect_files(save(model, tmp_path / "run"))


def test_the_card_tells_of_text(tmp_path, model):
    card = render_model_card(save(model, tmp_path / "whole", with_text_tower=True)).content
    assert "the text tower in this repository" in card and '"a photo of {}."' in card and "of weight 1.0" in card
    model.config.text_model = "openai/clip-vit-base-patch16"
    card = render_model_card(save(model, tmp_path / "named")).content
    assert "the text tower of openai/clip-vit-base-patch16 embeds each name" in card
    assert "text tower" not in render_model_card(CHECKPOINT).content


@pytest.mark.slow
def test_a_checkpoint_with_its_own_text_tower_is_whole_on_the_hub(tmp_path, model):
    """Pushed, loaded by its source alone without dmgal_hf, and its class names embedded as before."""
    folder = save(model, tmp_path / "whole", with_text_tower=True)
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('org/text', trust_remote_code=True)\n"
        "assert 'dmgal_hf' not in sys.modules\n"
        f"torch.save(model.embed_class_names(['push', 'pull']), {str(tmp_path / 'embeds.pt')!r})\n"
    )
    push = f"from dmgal_hf.hub.upload import push_to_hub; push_to_hub({str(folder)!r}, 'org/text', token={TOKEN!r})"
    with LocalHub() as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        for command in (["-c", push], [str(script)]):
            result = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
            assert result.returncode == 0, result.stderr
        files = hub.files("org/text")
    assert {"text_tower/model.safetensors", "text_tower/tokenizer.json", "class_texts.py"} <= files.keys()
    found = torch.load(tmp_path / "embeds.pt", weights_only=True)
    torch.testing.assert_close(found, model.embed_class_names(["push", "pull"]))
