"""The two halves of the model: what depends on a clip alone, and what depends on the episode."""

import pytest
import torch
from peft import get_peft_model
from test_modeling import BACKBONES, make_adapter_model, make_episodes, make_model

from dmgal_hf import MgaConfig

FIVE_SHOT = (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
VITS = [kind for kind in BACKBONES if kind != "resnet"]


@torch.no_grad()
def check_halves(model, labels=(0, 1, 1), **episodes):
    """Six clips encoded once serve two episodes; a clip is the support of one and the query of the other."""
    model.eval()
    support, _, query = make_episodes(1, labels, queries=3, **episodes)
    clips = torch.cat([support[0], query[0]])
    rows = torch.arange(len(clips)).expand(2, -1).clone()
    rows[1] = rows[1].roll(2)
    support_rows, query_rows = rows[:, : len(labels)], rows[:, len(labels) :]
    support_labels = torch.tensor([labels] * 2)
    expected = model(support_pixel_values=clips[support_rows], support_labels=support_labels,
                     query_pixel_values=clips[query_rows]).logits  # fmt: skip
    parts = [model.encode_clips(part) for part in clips.split(4)]
    kept = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert all(len(tensor) == len(clips) for tensor in kept.values())
    support = {name: tensor[support_rows] for name, tensor in kept.items() if not name.startswith("query.")}
    query = {name: tensor[query_rows] for name, tensor in kept.items() if not name.startswith("support.")}
    logits = model.score_clips(support, support_labels, query)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert expected.std(-1).max() > 1e-3  # the classes differ
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(0, 1), FIVE_SHOT, (0, 1, 1)], ids=["1-shot", "5-shot", "unequal shots"])
@pytest.mark.parametrize("kind", BACKBONES)
def test_full_training_models(kind, labels):
    kept = check_halves(make_model(BACKBONES[kind], motion_reduction=4), labels)
    assert set(kept) == {"features", "cross.motion", "support.cross.values"}


@pytest.mark.slow
@pytest.mark.parametrize("labels", [(0, 1), FIVE_SHOT, (0, 1, 1)], ids=["1-shot", "5-shot", "unequal shots"])
@pytest.mark.parametrize("kind", VITS)
def test_adapter_models(kind, labels):
    kept = check_halves(make_adapter_model(kind), labels)
    assert {"features", "query.prefix", "query.patches"} < set(kept)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(48, 48), (40, 32), (36, 44)])
@pytest.mark.parametrize("kind", BACKBONES)
def test_other_resolutions(kind, size):
    for model in [make_model(BACKBONES[kind])] + ([] if kind == "resnet" else [make_adapter_model(kind)]):
        clips = [torch.randn(1, n, 8, 3, *size, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]
        with torch.no_grad():
            labels = torch.tensor([[0, 1, 1]])
            expected = model(clips[0], labels, clips[1]).logits
            support, query = (
                {name: one[None] for name, one in model.encode_clips(videos[0]).items()} for videos in clips
            )
            logits = model.score_clips(support, labels, query, way=2)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"smga_layers": [], "cmga_layers": [0, 1]},
        {"smga_layers": [1], "cmga_layers": [0]},
        {"smga_layers": [], "cmga_layers": [1], "support_pooling": 2},
        {"smga_layers": [0], "cmga_layers": [1], "directions": "forward"},
    ],
)
def test_adapters_placed_by_config(fields):
    check_halves(make_adapter_model(adapter_config={"reduction": 2, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter_config": {"reduction": 2, "cmga_layers": []}},
        {"adapter_config": {"reduction": 2, "attention": False}},
        {"adapter_config": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}},
    ],
)
def test_descriptors_are_all_where_queries_read_nothing(fields):
    assert set(check_halves(make_adapter_model(**fields))) == {"features"}


@pytest.mark.parametrize("alignment", ["bi_mhm", "otam", "mean"])
def test_bare_backbones(alignment):
    assert set(check_halves(make_model(BACKBONES["clip"], paradigm="adapter", alignment=alignment))) == {"features"}


@pytest.mark.parametrize("fields", [{"self_motion_attention": False}, {"mixer": False}, {"alignment": "otam"}])
def test_switches(fields):
    check_halves(make_model(**fields))


def test_full_training_model_with_cmga_adapters_of_peft():
    model = get_peft_model(make_model(BACKBONES["vit"]), MgaConfig(reduction=2))
    for name, parameter in model.named_parameters():
        if ".up." in name or name.endswith("default.gamma"):
            torch.nn.init.normal_(parameter, std=0.3)
    assert {"cross.motion", "query.patches"} < set(check_halves(model))
    with model.disable_adapter():
        assert "query.patches" not in check_halves(model)


@torch.no_grad()
def test_only_what_an_episode_changes_runs_again():
    model = make_adapter_model("clip")
    clips = torch.randn(4, 8, 3, 32, 32)
    kept = {name: tensor[None] for name, tensor in model.encode_clips(clips).items()}
    frames = []
    for block in model.backbone.encoder.layers:
        block.base_layer.register_forward_hook(lambda module, args, output: frames.append(len(output)))
    model.score_clips(kept, torch.tensor([[0, 1, 2, 2]]), kept)
    assert frames == [4 * 8]  # the queries, in the last block alone


@torch.no_grad()
def test_a_missing_frame_or_a_wrong_shape():
    with pytest.raises(ValueError, match="num_frames=8"):
        make_model().encode_clips(torch.randn(2, 7, 3, 32, 32))
    with pytest.raises(ValueError, match="must be floating"):
        make_model().encode_clips(torch.zeros(2, 8, 3, 32, 32, dtype=torch.uint8))
