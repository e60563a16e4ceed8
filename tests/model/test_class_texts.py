import shutil

import pytest
import torch
from towers import FAMILIES, VISION, make_tokenizer, make_towers, save_towers
from transformers import CLIPVisionConfig, CLIPVisionModel, ResNetConfig, ResNetModel

from dmgal_hf import DmgalConfig, DmgalModel

LABELS = ["push left", "pull_right", "lift"]


@pytest.fixture
def towers_folder(tmp_path):
    save_towers(tmp_path / "clip", "clip")
    return tmp_path / "clip"


def pooling(family):
    return "cls" if "clip" in family else "mean"


def make_model(folder, family="clip", **fields):
    fields = {"paradigm": "adapter", "text_guidance": True, "frame_pooling": pooling(family), **fields}
    return DmgalModel.from_backbone(folder, **fields).eval()


def make_episode(frames=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    support, query = (torch.randn(1, videos, frames, 3, 32, 32, generator=generator) for videos in (3, 2))
    return support, torch.tensor([[0, 1, 2]]), query


def picture_inputs(family, frames):
    if family != "siglip2":
        return {"pixel_values": frames}
    patches = torch.stack([
        torch.stack([
            frame[:, top : top + 8, left : left + 8].permute(1, 2, 0).flatten()
            for top in range(0, 32, 8)
            for left in range(0, 32, 8)
        ])
        for frame in frames
    ])  # fmt: skip
    return {"pixel_values": patches, "spatial_shapes": torch.tensor([[4, 4]] * len(frames)),
            "pixel_attention_mask": torch.ones(len(frames), 16, dtype=torch.long)}  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_text_scores_are_those_of_the_two_towers(tmp_path, family):
    """Of one frame those of the model of transformers itself; of several those of the mean embedding."""
    towers = save_towers(tmp_path, family)
    model = make_model(tmp_path, family, text_templates=["{}"])
    texts = ["push left", "pull right", "lift"]
    padding = {"padding": "max_length"} if "siglip" in family else {"padding": True}
    tokens = make_tokenizer(family)(texts, return_tensors="pt", **padding)
    if "siglip" in family:
        tokens.pop("attention_mask")
    tokens.pop("token_type_ids", None)
    text_embeds = model.embed_class_names(LABELS)
    for frames in (1, 3):
        support, labels, query = make_episode(frames)
        output = model(support, labels, query, text_embeds=text_embeds[None])
        if frames == 1:
            expected = towers(**tokens, **picture_inputs(family, query.flatten(0, 2))).logits_per_image
        else:
            pictures = towers.get_image_features(**picture_inputs(family, query.flatten(0, 2))).pooler_output
            video = torch.nn.functional.normalize(pictures.unflatten(0, (2, 3)).mean(1), dim=-1)
            text = torch.nn.functional.normalize(towers.get_text_features(**tokens).pooler_output, dim=-1)
            expected = video @ text.T * towers.logit_scale.exp() + getattr(towers, "logit_bias", 0)
        torch.testing.assert_close(output.text_logits[0], expected, atol=1e-5, rtol=0)
        assert expected[0].std() > 1e-3  # a tower that reads the texts


@torch.no_grad()
def test_prototypes_are_means_over_templates_or_descriptions(towers_folder):
    towers, tokenizer = make_towers("clip"), make_tokenizer()
    model = make_model(towers_folder, text_templates=["a video of {}.", "a photo of {}."])
    found = model.embed_class_names(LABELS, {"lift": "a hand lifts the cup off a table"})

    def embed(*texts):
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        features = towers.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
        return torch.nn.functional.normalize(features, dim=-1).mean(0)

    expected = [embed(f"a video of {label}.", f"a photo of {label}.") for label in ("push left", "pull right")]
    torch.testing.assert_close(found, torch.stack([*expected, embed("a hand lifts the cup off a table")]))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("alignment", ["bi_mhm", "otam", "mean"])
def test_clips_and_texts_together(towers_folder, alignment):
    """The logits are log-probabilities of both, weighted; where text is off they are those of a model without it."""
    plain = make_model(towers_folder, text_guidance=False, alignment=alignment)
    model = make_model(towers_folder, alignment=alignment, text_weight=0.5, score_temperature=2.0)
    support, labels, query = make_episode()
    expected = plain(support, labels, query).logits
    assert torch.equal(model(support, labels, query).logits, expected)

    text_embeds = model.embed_class_names(LABELS)[None]
    output = model(support, labels, query, text_embeds=text_embeds)
    by_clips, by_text = (expected / 2).softmax(-1), output.text_logits.softmax(-1)
    product = by_clips * by_text**0.5
    torch.testing.assert_close((output.logits / 2).softmax(-1), product / product.sum(-1, keepdim=True))
    kept = model.encode_support(support, labels)
    torch.testing.assert_close(model(query_pixel_values=query, support=kept, text_embeds=text_embeds).logits,
                               output.logits)  # fmt: skip
    torch.testing.assert_close(model.text_logits(output.query_embeds, text_embeds), output.text_logits)
    assert output.support_embeds.shape == (1, 3, 20)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("alignment", ["bi_mhm", "otam", "mean"])
def test_a_class_of_text_alone(towers_folder, alignment):
    """Its clips say what chance says among the classes that have clips."""
    model = make_model(towers_folder, alignment=alignment)
    support, _, query = make_episode()
    labels = torch.tensor([[0, 2, 2]])
    output = model(support, labels, query, text_embeds=model.embed_class_names(LABELS)[None])
    two = model(support, torch.tensor([[0, 1, 1]]), query).logits.softmax(-1)
    by_clips = torch.stack([two[..., 0], torch.full_like(two[..., 0], 0.5), two[..., 1]], -1)
    expected = (by_clips * output.text_logits.softmax(-1)).log()
    torch.testing.assert_close(output.logits.log_softmax(-1), expected.log_softmax(-1))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_hold_the_head_and_name_the_text_tower_or_hold_it(tmp_path, family):
    save_towers(tmp_path / "towers", family)
    model = make_model(tmp_path / "towers", family)
    text_embeds = model.embed_class_names(LABELS)[None]
    expected = model(*make_episode(), text_embeds=text_embeds).logits
    model.save_pretrained(tmp_path / "named")
    model.save_pretrained(tmp_path / "whole", with_text_tower=True)
    assert model.config.text_model == str(tmp_path / "towers")
    assert not (tmp_path / "named" / "text_tower").exists()
    DmgalModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "again")
    for name in ("named", "whole", "again"):
        loaded = DmgalModel.from_pretrained(tmp_path / name)
        assert not any(one.requires_grad for one in loaded.parameters())
        assert torch.equal(loaded.embed_class_names(LABELS)[None], text_embeds)
        assert torch.equal(loaded(*make_episode(), text_embeds=text_embeds).logits, expected)
        if name == "named":
            shutil.rmtree(tmp_path / "towers")
            with pytest.raises(OSError, match=r"text tower .*towers/? cannot be read.*set model.config.text_model"):
                loaded.embed_class_names(LABELS)


def test_paradigm_ft_trains_all_but_the_head_of_the_texts(towers_folder, tmp_path):
    model = make_model(towers_folder, paradigm="ft", frame_pooling="mean", num_frames=3).train()
    text_embeds = model.embed_class_names(LABELS)[None]
    output = model(*make_episode(), labels=torch.tensor([[0, 1]]), text_embeds=text_embeds)
    output.loss.backward()
    model.save_pretrained(tmp_path / "saved")
    for one in (model, DmgalModel.from_pretrained(tmp_path / "saved")):
        assert one.backbone.encoder.layers[0].mlp.fc1.weight.requires_grad
        assert not any(weight.requires_grad for weight in one.text_head.parameters())
    assert model.backbone.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_what_cannot_be_compared_with_texts(towers_folder, tmp_path):
    with pytest.raises(ValueError, match="'resnet' has none: leave text_guidance"):
        DmgalModel(DmgalConfig(text_guidance=True))
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ValueError, match="'resnet' has none"):
        make_model(tmp_path / "resnet")
    with pytest.raises(ValueError, match="is the vision tower alone"):
        make_model(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    without = make_model(towers_folder, text_guidance=False)
    with pytest.raises(ValueError, match="no text head: build it with"):
        without.embed_class_names(LABELS)
    support, labels, query = make_episode()
    with pytest.raises(ValueError, match="text_embeds: this model has no text head"):
        without(support, labels, query, text_embeds=torch.zeros(1, 3, 20))
    model = make_model(towers_folder)
    with pytest.raises(ValueError, match=r"must have the shape \(1, 3, E\).* got \(1, 2, 20\)"):
        model(query_pixel_values=query, support=model.encode_support(support, labels),
              text_embeds=torch.zeros(1, 2, 20))  # fmt: skip
    with pytest.raises(ValueError, match=r"support_labels must lie in 0..1, got 2"):
        model(support, labels, query, text_embeds=torch.zeros(1, 2, 20))
    model.config.text_model, model.name_or_path = None, ""
    with pytest.raises(ValueError, match="does not know its text tower: set"):
        model.embed_class_names(LABELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels, descriptions, message",
    [
        (["Push", "push"], None, "'Push' and 'push' read the same"),
        (["push_left", "push left"], None, "read the same"),
        (["push", "  "], None, "the label '  ' is empty"),
        (["push", "pull " * 20], None, "is 26 tokens long and the text tower reads 16"),
        (["push", "pull"], {"pull": "a " * 15}, "is 17 tokens long"),
        (["push", "pull"], {"lift": "a hand lifts a cup"}, r"'lift', which is no class; the classes are \['push'"),
        (["push", "pull"], {"pull": " "}, "description of 'pull' must be a text"),
    ],
)
def test_names_that_are_no_texts(towers_folder, labels, descriptions, message):
    with pytest.raises(ValueError, match=message):
        make_model(towers_folder).embed_class_names(labels, descriptions)


def test_names_alike_with_descriptions_are_told_apart(towers_folder):
    embeds = make_model(towers_folder).embed_class_names(["Push", "push"], {"Push": "push left"})
    assert not torch.allclose(embeds[0], embeds[1])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_weight": -1}, r"text_weight must lie in \[0, inf\), got -1"),
        ({"text_weight": float("inf")}, "text_weight must lie"),
        ({"text_weight": float("nan")}, "text_weight must lie"),
        ({"text_guidance": 1}, "text_guidance must be true or false"),
        ({"text_templates": []}, "text_templates must list"),
        ({"text_templates": "a {}"}, "text_templates must list"),
        ({"text_templates": ["a video"]}, "one '{}' for the label, got 'a video'"),
    ],
)
def test_fields_of_text(fields, message):
    with pytest.raises(ValueError, match=message):
        DmgalConfig(**fields)


def test_from_backbone_says_that_its_head_is_untrained():
    backbone = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.warns(UserWarning, match='random weights on this backbone, to be trained; paradigm="adapter"'):
        DmgalModel.from_backbone(backbone, motion_reduction=4)
