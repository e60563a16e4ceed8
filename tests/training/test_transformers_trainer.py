"""A DmgalModel in transformers' own Trainer, with the arguments that a user gives to any model."""

import numpy as np
import pytest
import torch
from training_runs import FIELDS
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor
from dmgal_hf.data import EpisodeCollator, EpisodeVideos, load_motion_shapes, sample_episodes


@pytest.mark.slow
@pytest.mark.parametrize("paradigm", ["ft", "adapter"])
def test_it_trains_evaluates_saves_and_loads(paradigm, cache_dir, tmp_path):
    torch.manual_seed(0)
    backbone = FIELDS["backbone_config"]
    fields = {"motion_reduction": 4}
    if paradigm == "adapter":
        backbone = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "patch_size": 8,
                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}  # fmt: skip
        fields = {"adapter_config": {"width": 8}}
    model = DmgalModel(DmgalConfig(backbone_config=backbone, paradigm=paradigm, num_frames=4, **fields))
    processor = DmgalVideoProcessor(num_frames=4, size=36, crop_size=32)
    videos = load_motion_shapes(clips_per_class=3, cache_dir=cache_dir)
    episodes = {
        split: EpisodeVideos(
            videos[split], sample_episodes(videos[split]["label"], 3, 1, 2, number, seed=0), processor
        )
        for split, number in (("train", 4), ("validation", 5))
    }  # fmt: skip

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2, report_to="none",
            save_steps=2, use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        ),
        data_collator=EpisodeCollator(processor),
        train_dataset=episodes["train"],
        eval_dataset=episodes["validation"],
        processing_class=processor,
        compute_metrics=accuracy,
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    prediction = trainer.predict(episodes["validation"])
    assert prediction.predictions.shape == (5, 6, 3) and prediction.label_ids.shape == (5, 6)
    for number in range(5):
        inputs = EpisodeCollator(processor)([episodes["validation"][number]])
        with torch.no_grad():
            expected = model.eval()(**inputs).logits[0].numpy()
        np.testing.assert_allclose(prediction.predictions[number], expected, atol=1e-5)
        assert prediction.label_ids[number].tolist() == inputs["labels"][0].tolist()
    assert trainer.evaluate()["eval_accuracy"] == prediction.metrics["test_accuracy"]

    loaded, read = (auto.from_pretrained(tmp_path / "checkpoint-2") for auto in (AutoModel, AutoProcessor))
    assert read.to_dict() == processor.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    loaded.save_pretrained(tmp_path / "again")
    assert type(AutoModel.from_pretrained(tmp_path / "again")) is DmgalModel


def test_columns_that_were_removed_are_named():
    with pytest.raises(ValueError, match="without support_labels: set remove_unused_columns=False"):
        EpisodeCollator(DmgalVideoProcessor())([{"support_pixel_values": 0, "query_pixel_values": 0, "labels": 0}])
