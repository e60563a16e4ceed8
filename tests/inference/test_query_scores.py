"""Replayed queries, on a stand-in for a GPU: they are those of the plain call, whatever has changed."""

import copy
import logging
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from card_on_the_cpu import pretend_card
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import CLIPVisionConfig, ResNetConfig, ViTConfig, pipeline

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor, MgaConfig
from dmgal_hf.inference import query_scores
from dmgal_hf.inference.pipeline import TASK
from dmgal_hf.inference.query_scores import QueryScores, score_queries

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8}  # fmt: skip
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
KINDS = {
    "ft": {"backbone_config": RESNET, "motion_reduction": 4},
    "clip": {"backbone_config": CLIPVisionConfig(**SIZES), "paradigm": "adapter", "adapter_config": {}},
    # hands no keyword arguments on to its blocks: hooks of ours do
    "vit": {"backbone_config": ViTConfig(**SIZES), "paradigm": "adapter", "adapter_config": {}, "alignment": "otam"},
    "lora": {"backbone_config": ViTConfig(**SIZES), "paradigm": "adapter",
             "adapter_config": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}},
    "text": {"backbone_config": CLIPVisionConfig(**SIZES, projection_dim=16), "paradigm": "adapter",
             "text_guidance": True},
}  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(query_scores, "may_replay", lambda device: True)
    return pretend_card(monkeypatch)


def make_model(kind):
    torch.manual_seed(0)
    model = DmgalModel(DmgalConfig(num_frames=4, **KINDS[kind])).eval()
    for name, tensor in model.state_dict().items():
        if "gamma" in name or "mga_adapter" in name or "lora" in name:
            tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def videos(number, seed=0):
    return torch.randn(number, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def kept(model, seed=1):
    pixel_values = videos(4, seed)[None].to(model.dtype)
    with torch.no_grad():
        return model.encode_support(pixel_values, torch.tensor([[0, 1, 1, 0]]))


class Queries:
    """The same queries again and again, each time compared with the plain call."""

    def __init__(self, model):
        self.model, self.support, self.scores = model, kept(model), QueryScores()
        self.text_embeds = None if model.text_head is None else torch.rand(2, 16)

    @torch.no_grad()
    def __call__(self, number=2, seed=0):
        pixel_values = videos(number, seed).to(self.model.dtype)
        scores = self.scores(self.model, self.support, self.text_embeds, pixel_values)
        assert torch.equal(scores, score_queries(self.model, self.support, self.text_embeds, pixel_values))
        return scores


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_queries_are_scored_as_plain_ones(card, kind):
    queries = Queries(make_model(kind))
    for seed in range(3):
        for number in (2, 1):
            queries(number, seed)
    queries(3)  # comes once
    # At its second call each number is captured, and then and at the third it is tried.
    assert card == {"captured": 2, "replayed": 2 * (2 + 2)}


def other_supports(queries):
    queries.support = kept(queries.model, seed=5)


def other_way(queries):
    queries.support = queries.support.select([0, 1, 2])


def update(queries):
    for parameter in queries.model.parameters():
        parameter.data += 0.01


def load(queries, assign):
    state = {
        name: tensor * 1.01 if tensor.is_floating_point() else tensor
        for name, tensor in queries.model.state_dict().items()
    }
    queries.model.load_state_dict(state, assign=assign)


def move(queries):
    queries.model.double()
    queries.support = kept(queries.model)


def read_otherwise(queries):
    queries.model.config.alignment = "mean"


def disable(queries):
    queries.model.backbone.encoder.layers[-1].enable_adapters(False)


def add_adapter(queries):
    layer = queries.model.backbone.encoder.layers[0]
    layer.update_layer("other", MgaConfig(init_weights=False, num_frames=4, width=3), 32, 1, False)
    layer.set_adapter("other")
    layer.eval()


def replace_block(queries):
    layers = queries.model.backbone.encoder.layers
    layers[0].base_layer = copy.deepcopy(layers[1].base_layer)


load_in_place, load_instead = partial(load, assign=False), partial(load, assign=True)
IN_PLACE = (update, load_in_place)
SEEN_FIRST = (other_supports, other_way, move)  # of all else, once a replay has begun: it counts for nothing
CHANGES = {
    "ft": [other_supports, other_way, update, load_in_place, load_instead, move, read_otherwise],
    "clip": [other_supports, update, load_instead, move, disable, add_adapter, replace_block],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind in CHANGES for change in CHANGES[kind]])
def test_nothing_of_before_is_answered_after_a_change(card, kind, change):
    queries = Queries(make_model(kind))
    before = [queries() for _ in range(3)][-1]
    assert card == {"captured": 1, "replayed": 2 + 2}
    change(queries)
    after = [queries() for _ in range(3)][-1]  # each equals the plain call
    assert not torch.equal(before, after)
    # And is a replay in the end: of the same graph, which reads weights where they lie, or of another.
    again = 7 if change in IN_PLACE else 8 + (change not in SEEN_FIRST)
    assert card == {"captured": 1 if change in IN_PLACE else 2, "replayed": again}


def test_a_lora_adapter_of_another_strength_is_seen(card):
    model = DmgalModel(DmgalConfig(num_frames=4, backbone_config=ViTConfig(**SIZES), paradigm="adapter")).eval()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    queries = Queries(model)
    before = [queries() for _ in range(3)][-1]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 3  # in place
    assert not torch.allclose(before, queries()) and card["captured"] == 1


def hook(model):
    model.calls = []
    model.backbone.register_forward_hook(lambda *_: model.calls.append(1))


def compile_whole(model):
    model.compile(backend="eager")


def compile_part(model):
    model.backbone = torch.compile(model.backbone, backend="eager")


def offload(model):
    model.backbone.forward = model.backbone.forward  # as accelerate's hooks do


def train(model):
    model.self_attention.train()


@pytest.mark.parametrize("make", [hook, compile_whole, compile_part, offload, train])
def test_what_a_replay_would_miss_runs_plainly(card, make):
    model = make_model("ft")
    make(model)
    scores, support = QueryScores(), kept(make_model("ft"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _ in range(3):
            scores(model, support, None, videos(2))
    assert card["captured"] == 0
    assert make is not hook or len(model.calls) == 3


def test_only_the_usual_stream_of_a_gpu_is_replayed_and_no_mode(monkeypatch):
    streams, gpu = {"current": 0, "default": 0}, torch.device("cuda", 0)
    for name in streams:
        monkeypatch.setattr(torch.cuda, f"{name}_stream", lambda device, name=name: streams[name])
    assert query_scores.may_replay(gpu) and not query_scores.may_replay(torch.device("cpu"))
    with torch.inference_mode():
        assert not query_scores.may_replay(gpu)
    streams["current"] = 1
    assert not query_scores.may_replay(gpu)
    streams["current"] = 0
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not query_scores.may_replay(gpu)


def make_classifier(kind, cuda_graphs=True):
    """As on a GPU, but for the device."""
    processor = DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)
    classifier = pipeline(
        TASK, model=make_model(kind), image_processor=processor, device="cpu", cuda_graphs=cuda_graphs
    )
    assert classifier._score is score_queries
    if cuda_graphs:
        classifier._score = QueryScores()
    return classifier


def clips(number, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (number, 6, 32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["ft", "clip"])
def test_the_pipeline_replays_and_answers_as_ever(card, kind):
    classifiers = [make_classifier(kind, switch) for switch in (True, False)]
    answers = []
    for classifier in classifiers:
        found = []
        for seed in (0, 50):
            classifier.fit({"a": clips(2, seed), "b": clips(1, seed + 1)})
            found.append(classifier(clips(7, 2), batch_size=2))  # three pairs, and one
            found += [classifier(clip) for clip in clips(3, 3)]
            classifier.add({"c": clips(2, seed + 4)})
            found += [classifier(clip) for clip in clips(3, 3)]
        answers.append(found)
    assert answers[0] == answers[1] and answers[0][3] != answers[0][10]
    assert card["captured"] == 6  # pairs and single ones twice, and single ones after add()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(classifiers[0])))
    assert twin(clips(3, 3)[-1]) == answers[0][-1]


def test_windows_of_a_stream_are_replayed_where_each_goes_through_the_whole_model(card, tmp_path):
    from test_pipeline import write_video

    path, found = write_video(tmp_path / "long.mp4", 50, frames=45, fps=10), []
    for switch in (True, False):
        classifier = make_classifier("clip", switch).fit({"a": clips(2), "b": clips(1, 1)})
        found.append(list(classifier.stream(path, batch_size=1)))
    assert found[0] == found[1] and card["captured"] == 1 and card["replayed"] > 2


@pytest.mark.parametrize("fault", ["capture", "replay"])
def test_a_gpu_that_cannot_replay_is_said_once_and_changes_no_answer(card, monkeypatch, caplog, fault):
    def fail(*_):
        if fault == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end" if fault == "capture" else "replay", fail)
    queries = Queries(make_model("ft"))
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            queries(1 + number % 2)
    reason = {"capture": "not permitted", "replay": "differs from the plain call"}[fault]
    assert [record.message.count(reason) for record in caplog.records] == [1]
    assert not torch.cuda.default_generators[None].capturing  # or else no random number could be drawn any more
