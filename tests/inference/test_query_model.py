"""The query side with a fixed support: compiled whole, exported, saved and loaded, with the logits of the model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, ResNetConfig, ViTConfig, pipeline

from dmgal_hf import DmgalConfig, DmgalModel, DmgalQueryModel, DmgalVideoProcessor

RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8}  # fmt: skip
KINDS = {
    "ft": {"backbone_config": RESNET, "motion_reduction": 4},
    "clip": {"backbone_config": CLIPVisionConfig(**SIZES), "paradigm": "adapter", "adapter_config": {}},
    # hands no keyword arguments on to its blocks
    "vit": {
        "backbone_config": ViTConfig(**SIZES),
        "paradigm": "adapter",
        "adapter_config": {"support_pooling": 2},
        "alignment": "otam",
    },
    "lora": {"backbone_config": CLIPVisionConfig(**SIZES), "paradigm": "adapter"},
}
LABELS = torch.tensor([[0, 0, 1, 2, 2]])


def make_model(kind):
    """Away from its start, so that supports and queries matter to each other."""
    torch.manual_seed(0)
    model = DmgalModel(DmgalConfig(num_frames=4, **KINDS[kind]))
    for name, tensor in model.state_dict().items():
        if "gamma" in name or "mga_adapter" in name:
            tensor.add_(0.3 * torch.rand_like(tensor))
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    return model.eval()


@torch.no_grad()
def make_case(kind):
    """The module, query videos, and what the model says about them as one whole episode."""
    model, videos = make_model(kind), torch.randn(8, 4, 3, 32, 32)
    expected = model(videos[None, :5], LABELS, videos[None, 5:]).logits[0]
    return DmgalQueryModel(model, model.encode_support(videos[None, :5], LABELS)), videos[5:], expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ft", "vit", "lora"])
def test_export(tmp_path, kind):
    queries, videos, expected = make_case(kind)
    number = torch.export.Dim("videos", min=1, max=64)
    program = torch.export.export(queries, (videos[:2],), dynamic_shapes=({0: number},))
    torch.export.save(program, tmp_path / "queries.pt2")
    loaded = torch.export.load(tmp_path / "queries.pt2").module()
    with torch.no_grad():
        for some in (slice(3), slice(1)):
            torch.testing.assert_close(loaded(videos[some]), expected[some], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ft", "clip"])
def test_onnx(tmp_path, kind):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install onnx onnxscript onnxruntime")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    queries, videos, expected = make_case(kind)
    shapes = ({0: torch.export.Dim("videos", min=1, max=64)},)
    torch.onnx.export(queries, (videos[:2],), tmp_path / "queries.onnx", dynamo=True, dynamic_shapes=shapes)
    session = runtime.InferenceSession(tmp_path / "queries.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: videos.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ft", "clip"])
def test_compile_takes_it_whole(kind):
    queries, videos, expected = make_case(kind)
    compiled = torch.compile(queries, backend="aot_eager", fullgraph=True)  # traced, without a C++ compiler
    with torch.no_grad():
        torch.testing.assert_close(compiled(videos), expected, atol=1e-4, rtol=1e-5)


def test_of_a_pipeline():
    processor = DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)
    classifier = pipeline(
        "few-shot-video-classification", model=make_model("ft"), image_processor=processor, device="cpu"
    )
    clips = torch.randint(0, 256, (4, 6, 32, 32, 3), dtype=torch.uint8)
    classifier.fit({"push": [clips[0]], "pull": [clips[1], clips[2]]})
    with torch.no_grad():
        scores = classifier.query_model()(processor([clips[3]]).pixel_values)[0].softmax(-1)
    answer = {entry["label"]: entry["score"] for entry in classifier(clips[3])}
    assert [answer["push"], answer["pull"]] == pytest.approx(scores.tolist(), abs=1e-5)


def test_one_episode_only():
    model = make_model("ft")
    with torch.no_grad():
        support = model.encode_support(torch.randn(2, 3, 4, 3, 32, 32), torch.tensor([[0, 1, 2]] * 2))
    with pytest.raises(ValueError, match="those of 2 episodes"):
        DmgalQueryModel(model, support)
