"""What keeps a GPU busy, as far as a CPU can tell: no host reads, whole graphs, one pass, half precision."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, DINOv3ViTConfig, ResNetConfig, ViTConfig, pipeline

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor
from dmgal_hf.inference.query_scores import QueryScores, score_queries
from dmgal_hf.model.motion_attention import CrossMotionAttention, SelfMotionAttention

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8}  # fmt: skip
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
KINDS = {
    "ft": {"backbone_config": RESNET, "motion_reduction": 4},
    "clip": {"backbone_config": CLIPVisionConfig(**SIZES), "paradigm": "adapter", "adapter_config": {}},
    # hands no keyword arguments on to its blocks
    "vit": {
        "backbone_config": ViTConfig(**SIZES),
        "paradigm": "adapter",
        "adapter_config": {"support_pooling": 2},
        "alignment": "otam",
        "frame_pooling": "cls",
    },
    "dinov3": {
        "backbone_config": DINOv3ViTConfig(**SIZES, num_register_tokens=3),
        "paradigm": "adapter",
        "adapter_config": {},
        "alignment": "mean",
    },
}
EPISODES = {
    "support_pixel_values": torch.randn(2, 3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    "support_labels": torch.tensor([[0, 1, 1], [1, 0, 0]]),
    "query_pixel_values": torch.randn(2, 2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    "labels": torch.tensor([[0, 1], [1, 1]]),
    "way": 2,
}


def make_model(kind, training=False):
    """Away from its start, so that supports and queries matter to each other."""
    torch.manual_seed(0)
    model = DmgalModel(DmgalConfig(num_frames=4, **KINDS[kind])).train(training)
    for name, tensor in model.state_dict().items():
        if "gamma" in name or "mga_adapter" in name:
            tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def with_kept_supports(model):
    with torch.no_grad():
        support = model.encode_support(EPISODES["support_pixel_values"], EPISODES["support_labels"], 2)
    return {"query_pixel_values": EPISODES["query_pixel_values"], "labels": EPISODES["labels"], "support": support}


class Operations(TorchDispatchMode):
    """Notes every operation and its result, and fails where a value comes to the host."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in self.READS, f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result):
            self.seen.append((name, tuple(result.shape), result.dtype))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_a_query_read_no_value(kind, training):
    model = make_model(kind, training)
    for inputs in (EPISODES, with_kept_supports(model)):
        with Operations():
            loss = model(**inputs).loss
            loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_forward_is_one_graph(kind):
    model = make_model(kind, training=True)
    for inputs in (EPISODES, with_kept_supports(model)):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        results = []
        for module in (model, compiled):
            torch.manual_seed(0)  # of the dropout
            results.append(module(**inputs))
        torch.testing.assert_close(results[1].logits, results[0].logits)
        torch.testing.assert_close(results[1].loss, results[0].loss)


def test_way_may_be_given_and_must_fit():
    model = make_model("ft")
    supports = EPISODES["support_pixel_values"], EPISODES["support_labels"]
    with torch.no_grad():
        assert model.encode_support(*supports).way == model.encode_support(*supports, way=2).way == 2
        with pytest.raises(ValueError, match="use every class from 0 to 2: episode 0 has no support of class 2"):
            model.encode_support(*supports, way=3)
        with pytest.raises(ValueError, match=r"support_labels must lie in 0..0, got 1"):
            model.encode_support(*supports, way=1)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_frozen_backbone_sees_supports_and_queries_in_one_pass(kind):
    model = make_model(kind, training=True)
    passes = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    together = model(**EPISODES)
    together.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    support = model.encode_support(EPISODES["support_pixel_values"], EPISODES["support_labels"])
    apart = model(query_pixel_values=EPISODES["query_pixel_values"], labels=EPISODES["labels"], support=support)
    apart.loss.backward()
    assert passes == [2 * 5 * 4, 2 * 3 * 4, 2 * 2 * 4]
    torch.testing.assert_close(together.logits, apart.logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov3"])
def test_adapters_put_no_tokens_together_anew(kind):
    model = make_model(kind, training=True)
    with Operations() as operations:
        model(**EPISODES).loss.backward()
    tokens = 16 + {"clip": 1, "vit": 1, "dinov3": 4}[kind]
    joins = ("cat", "stack", "slice_scatter")
    whole = [name for name, shape, _ in operations.seen if name in joins and shape[-2:] == (tokens, 32)]
    assert len(whole) <= 1  # that of the class token and the patches, before the first block


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_backbone_held_in_bfloat16_computes_in_it_and_so_do_its_adapters(kind):
    model = make_model(kind)
    with torch.no_grad():
        expected = model(**EPISODES).logits
        for parameter in model.backbone.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        held = dict(model.named_parameters())
        with Operations() as operations, torch.autocast("cpu", torch.bfloat16):
            logits = model(**EPISODES).logits
    assert {p.dtype for p in held.values() if p.requires_grad} == {torch.float32}
    products = ("mm", "addmm", "convolution", "_scaled_dot_product_flash_attention_for_cpu")
    assert {dtype for name, _, dtype in operations.seen if name in products} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    # Rounding to 8 bits, of distances summed over 2 x 4 frames.
    assert (logits - expected).abs().max() < 0.05 and not torch.equal(logits, expected)


class Products(TorchDispatchMode):
    """Notes, of every product in bfloat16, how far apart the rows (or columns) of each matrix lie in memory."""

    def __init__(self):
        super().__init__()
        self.strides = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            matrices = [one for one in (*args[-2:], result) if one.dtype == torch.bfloat16]
            self.strides += [max(one.stride()[-2:]) for one in matrices]
        return result


def test_products_of_49_patches_have_aligned_rows_in_bfloat16_and_the_same_results():
    torch.manual_seed(0)
    config = DmgalConfig(backbone_config=RESNET, motion_reduction=4, num_frames=8, attention_dropout=0.0,
                         position_dropout=0.0)  # fmt: skip
    smga, cmga = SelfMotionAttention(config, 64), CrossMotionAttention(config, 64)
    for module in (smga, cmga):
        for name, parameter in module.named_parameters():
            if "gamma" in name:
                torch.nn.init.constant_(parameter, 0.5)
    support, query = torch.randn(1, 3, 8, 64, 7, 7), torch.randn(1, 2, 8, 64, 7, 7)

    def describe():
        supports, queries = (smga(maps[0])[0][None] for maps in (support, query))
        features, keys = cmga.encode_support(supports)
        described, _ = cmga.describe(queries, keys)
        (features.float().square().mean() + described.float().square().mean()).backward()
        gradients = [parameter.grad.clone() for parameter in (*smga.parameters(), *cmga.parameters())]
        smga.zero_grad(), cmga.zero_grad()
        return described.detach().float(), torch.cat([gradient.flatten() for gradient in gradients])

    expected, expected_gradients = describe()
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        described, gradients = describe()
    assert len(products.strides) > 20 and all(stride % 8 == 0 for stride in products.strides)
    assert (described - expected).norm() < 0.01 * expected.norm()
    assert (gradients - expected_gradients).norm() < 0.1 * expected_gradients.norm()


@pytest.fixture
def nowhere(monkeypatch):
    """A device that has no values, so that each that is read is an error; autocast does not know it."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    return "meta"


@torch.no_grad()
def test_an_episode_of_the_processor_is_scored_without_reading_its_labels(nowhere):
    model = make_model("ft").to(nowhere)
    clip = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    episode = DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)(support={"a": clip, "b": clip}, query=clip)
    assert "way" not in episode.to("cpu")  # every entry is a tensor that may be stacked
    episode = episode.to(nowhere)
    assert model(**episode).logits.shape == (1, 1, 2)
    del episode["way"]
    with pytest.raises(RuntimeError, match="meta"):
        model(**episode)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"self_motion_attention": False}])
def test_windows_of_a_stream_are_scored_without_reading_a_value(nowhere, fields):
    model = DmgalModel(DmgalConfig(num_frames=4, **KINDS["ft"], **fields)).eval()
    support = model.encode_support(EPISODES["support_pixel_values"][:1], EPISODES["support_labels"][:1]).to(nowhere)
    maps = model.to(nowhere).encode_frames(torch.zeros(10, 3, 32, 32, device=nowhere))
    assert model.score_windows(maps, torch.tensor([0, 2, 6]), support).shape == (3, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device to replay queries on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_replayed_on_a_gpu_are_scored_as_plain_ones(kind, dtype):
    model, scores = make_model(kind).to("cuda", dtype), QueryScores()
    queries = torch.randn(3, 3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
    with torch.no_grad():
        for seed in range(2):  # other supports, and then other weights
            videos = torch.randn(1, 3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            support = model.encode_support(videos.to("cuda", dtype), torch.tensor([[0, 1, 1]], device="cuda"), way=2)
            for change in (0.0, 0.02):
                for parameter in model.parameters():
                    parameter += change
                for several in queries:
                    for number in (3, 1):
                        inputs = (model, support, None, several[:number])
                        torch.testing.assert_close(scores(*inputs), score_queries(*inputs), atol=2e-3, rtol=2e-3)
            assert len(scores.replayed.graphs) == 2 and not scores.replayed.failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device to replay queries on")
def test_replayed_queries_of_several_threads_and_of_a_model_that_moved():
    """Threads share one memory; a model that comes back from the CPU lies elsewhere."""
    model, scores = make_model("clip").cuda(), QueryScores()
    videos = torch.randn(6, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        support = model.encode_support(videos[None, :2], torch.tensor([[0, 1]], device="cuda"), way=2)

    @torch.no_grad()
    def score(number):
        return scores(model, support, None, videos[number : number + 1]).cpu()

    with torch.no_grad():
        expected = [score_queries(model, support, None, videos[n : n + 1]).cpu() for n in range(2, 6)] * 10
    with ThreadPoolExecutor(4) as threads:
        torch.testing.assert_close(list(threads.map(score, [2, 3, 4, 5] * 10)), expected, atol=1e-4, rtol=1e-4)
    model.cpu()
    kept = torch.empty(1 << 22, device="cuda").fill_(torch.nan)  # where the weights may have been
    model.cuda()
    for number in (2, 3, 4):
        torch.testing.assert_close(score(number), expected[number - 2], atol=1e-4, rtol=1e-4)
    assert len(kept) and not scores.replayed.failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device to replay queries on")
@pytest.mark.parametrize("kind", ["ft", "clip"])
def test_the_pipeline_on_a_gpu_replays_and_answers_as_ever(kind):
    clips = list(np.random.default_rng(0).integers(0, 256, (9, 6, 32, 32, 3), dtype=np.uint8))
    processor, found = DmgalVideoProcessor(num_frames=4, size=32, crop_size=32), []
    for switch in (True, False):
        classifier = pipeline(
            "few-shot-video-classification", model=make_model(kind), image_processor=processor, device="cuda",
            cuda_graphs=switch,
        )  # fmt: skip
        classifier.fit({"a": clips[:2], "b": clips[2:3]})
        answers = [*classifier(clips[4:], batch_size=2), *classifier(clips[4:])]
        found.append([{one["label"]: one["score"] for one in answer} for answer in answers])
        assert isinstance(classifier._score, QueryScores) == switch
    assert all(one == pytest.approx(other, abs=1e-4) for one, other in zip(*found, strict=True))
