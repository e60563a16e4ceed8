import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ResNetConfig,
    ResNetModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
)

from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8}  # fmt: skip
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
BACKBONES = {
    "resnet": RESNET,
    "vit": ViTConfig(**SMALL),
    "clip": CLIPVisionConfig(**SMALL),
    "dinov2": Dinov2Config(**SMALL),
    "dinov2_registers": Dinov2WithRegistersConfig(**SMALL),
    "dinov3": DINOv3ViTConfig(**SMALL, num_register_tokens=3),
    "siglip": SiglipVisionConfig(**SMALL),
}


def make_model(backbone=RESNET, seed=0, **fields):
    """A model in eval mode with every gamma and statistic away from its start."""
    torch.manual_seed(seed)
    model = DmgalModel(DmgalConfig(backbone_config=backbone, **fields)).eval()
    for name, tensor in model.state_dict().items():
        if "gamma" in name or ("norm" in name and tensor.is_floating_point()):
            tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def make_episodes(episodes=2, labels=(0, 1, 1), queries=2, frames=8, size=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(episodes, len(labels), frames, 3, size, size, generator=generator)
    query = torch.randn(episodes, queries, frames, 3, size, size, generator=generator)
    return support, torch.tensor([labels] * episodes), query


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", BACKBONES)
def test_any_backbone(tmp_path, kind):
    model = make_model(BACKBONES[kind], motion_reduction=4)
    support, support_labels, query = make_episodes()
    output = model(support, support_labels, query)
    assert output.logits.shape == (2, 2, 2) and output.loss is None and torch.isfinite(output.logits).all()
    assert output.support_features.shape[:3] == (2, 3, 8) and output.query_features.shape[:3] == (2, 2, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is DmgalModel and not loaded.training
    assert torch.equal(loaded(support, support_labels, query).logits, output.logits)


@torch.no_grad()
def test_clip_descriptors_come_after_the_final_norm():
    model = make_model(BACKBONES["clip"], self_motion_attention=False, mixer=False, cross_motion_attention=False)
    support, labels, query = make_episodes()
    tokens = model.backbone(query.flatten(0, 2)).last_hidden_state
    expected = model.backbone.post_layernorm(tokens)[:, 1:].mean(1).view(2, 2, 8, 32)
    torch.testing.assert_close(model(support, labels, query).query_features, expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (48, 40), (64, 32)])
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_any_frame_size(kind, size):
    model = make_model(BACKBONES[kind], motion_reduction=4)
    support, query = torch.randn(1, 2, 8, 3, *size), torch.randn(1, 1, 8, 3, *size)
    maps = model(support, torch.tensor([[0, 1]]), query, output_hidden_states=True).hidden_states
    expected = (size[0] // 8, size[1] // 8)
    assert all(state.shape[-2:] == expected for state in maps) and len(maps) == 3


@torch.no_grad()
def test_episodes_of_a_batch_are_as_if_alone():
    model = make_model()
    support, _, query = make_episodes(3, labels=(0,) * 5)
    labels = torch.tensor([[0, 1, 2, 2, 2], [2, 1, 0, 0, 1], [1, 1, 1, 0, 2]])
    together = model(support, labels, query).logits
    for b in range(3):
        alone = model(support[b : b + 1], labels[b : b + 1], query[b : b + 1]).logits
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_queries_do_not_see_each_other_and_support_order_does_not_matter():
    model = make_model()
    support, labels, query = make_episodes(1, labels=(0, 0, 1, 1, 2), queries=3)
    logits = model(support, labels, query).logits
    torch.testing.assert_close(model(support, labels, query[:, 1:2]).logits, logits[:, 1:2], atol=1e-5, rtol=1e-5)
    order = [4, 1, 3, 0, 2]
    torch.testing.assert_close(model(support[:, order], labels[:, order], query).logits, logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3, 11])
def test_any_number_of_frames(frames):
    support, labels, query = make_episodes(frames=frames)
    assert make_model(num_frames=frames)(support, labels, query).logits.shape == (2, 2, 2)
    assert make_model(mixer=False)(support, labels, query).logits.shape == (2, 2, 2)


@torch.no_grad()
def test_kept_supports_give_the_same_logits(tmp_path):
    model = make_model()
    support, labels, query = make_episodes()
    logits = model(support, labels, query).logits
    kept = model.encode_support(support, labels)
    calls = []
    model.backbone.register_forward_hook(lambda module, args, output: calls.append(output[0].shape[0]))
    assert torch.equal(model(query_pixel_values=query, support=kept).logits, logits)
    assert calls == [2 * 2 * 8]  # the frames of the queries alone
    kept.save(tmp_path / "support.safetensors")
    loaded = DmgalSupport.load(tmp_path / "support.safetensors")
    assert loaded.way == 2
    assert torch.equal(model(query_pixel_values=query, support=loaded).logits, logits)
    half = loaded.to(torch.bfloat16)
    assert half.features.dtype == torch.bfloat16 and half.labels.dtype == torch.int64


def test_queries_in_eval_mode_are_described_from_mixed_maps():
    model = make_model(motion_reduction=4)
    support, labels, query = make_episodes(size=48)
    formed = []
    model.mixer.register_forward_hook(lambda *_: formed.append("mixer"))
    with torch.no_grad():
        kept = model.encode_support(support, labels)
    formed.clear()

    def logits_and_gradients(**options):
        logits = model(query_pixel_values=query, support=kept, **options).logits
        return logits, torch.autograd.grad(logits[..., 0].sum(), list(model.mixer.parameters()))

    logits, gradients = logits_and_gradients()
    assert not formed
    plain_logits, plain_gradients = logits_and_gradients(output_hidden_states=True)
    assert formed == ["mixer"]
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-4, rtol=1e-3)
    model.train()(query_pixel_values=query, support=kept)
    assert formed == ["mixer"] * 2


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"motion_reduction": 4},
        {"motion_directions": "forward"},
        {"motion_directions": "backward"},
        {"motion_scales": [], "cross_motion_attention": False},
        {"self_motion_attention": False},
        {"paradigm": "adapter", "backbone": BACKBONES["vit"]},
        {"mixer": False, "num_frames": 1},
    ],
)
def test_windows_of_a_long_video_are_scored_as_each_by_itself(fields):
    model = make_model(**fields)
    length = fields.get("num_frames", 8)
    support, labels, _ = make_episodes(episodes=1, frames=length)
    kept = model.encode_support(support, labels)
    video = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    starts = torch.tensor([0, 2, 4, 20 - length, 3, 4])
    logits = model.score_windows(model.encode_frames(video), starts, kept)
    queries = torch.stack([video[start : start + length] for start in starts])[None]
    expected = model(query_pixel_values=queries, support=kept).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(set(expected[:, 0].tolist())) == 5  # as the windows differ


@torch.no_grad()
def test_windows_outside_the_video_or_of_several_episodes():
    model = make_model()
    kept = model.encode_support(*make_episodes()[:2])
    maps = torch.rand(10, 16, 4, 4)
    with pytest.raises(ValueError, match="supports of one episode, got those of 2"):
        model.score_windows(maps, torch.tensor([0]), kept)
    kept = model.encode_support(*make_episodes(episodes=1)[:2])
    with pytest.raises(ValueError, match=r"starts must be between 0 and 2, as there are 10 frames .* got \[0, 3\]"):
        model.score_windows(maps, torch.tensor([0, 3]), kept)


def test_loss_and_gradients():
    model = make_model().train()
    support, labels, query = make_episodes()
    query_labels = torch.tensor([[0, 1], [1, 0]])
    output = model(support, labels, query, labels=query_labels)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), query_labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing


@torch.no_grad()
def test_attentions_and_tuples_on_request():
    model = make_model(BACKBONES["vit"])
    support, labels, query = make_episodes()
    output = model(support, labels, query, output_attentions=True)
    shapes = {name: tuple(attention.shape) for name, attention in output.attentions.items()}
    assert shapes == {
        "support_self": (2, 3, 8, 16, 16),
        "query_self": (2, 2, 8, 16, 16),
        "cross": (2, 2, 8, 16, 3, 16),
    }
    logits, *_ = model(support, labels, query, return_dict=False)
    assert torch.equal(logits, output.logits)


@torch.no_grad()
def test_switches_leave_modules_out():
    model = make_model(self_motion_attention=False, mixer=False, cross_motion_attention=False)
    assert not [name for name in model.state_dict() if not name.startswith("backbone.")]
    support, labels, query = make_episodes()
    output = model(support, labels, query, output_attentions=True)
    assert output.attentions == {}
    maps = model.backbone(query.flatten(0, 2)).last_hidden_state
    torch.testing.assert_close(output.query_features, maps.mean((-1, -2)).view(2, 2, 8, 16))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BACKBONES, "convnext", "convnextv2"])
def test_all_that_is_trainable_gets_a_gradient(kind):
    """A parameter that gets none would stop DistributedDataParallel."""
    stages = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    config = BACKBONES.get(kind) or {"model_type": kind, **stages}
    model = DmgalModel(DmgalConfig(backbone_config=config, motion_reduction=4)).train()
    support, labels, query = make_episodes(episodes=1)
    model(support, labels, query, labels=torch.zeros(1, 2, dtype=torch.int64)).loss.backward()
    assert not [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]


def test_a_given_backbone_stays_as_it_is():
    backbone = CLIPVisionModel(BACKBONES["clip"])
    adapted = get_peft_model(backbone, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    torch.nn.init.constant_(backbone.post_layernorm.weight, 3.0)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = DmgalModel.from_backbone(adapted, paradigm="adapter")
    after = model.backbone.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match=r"adapters of its own, which config.json does not describe"):
        model.save_pretrained("nowhere")


@pytest.mark.parametrize("paradigm", ["ft", "adapter"])
def test_the_backbone_of_a_checkpoint_starts_another_model(tmp_path, paradigm):
    trained = make_model(paradigm=paradigm, mixer=False, motion_reduction=4)
    trained.save_pretrained(tmp_path)
    model = DmgalModel.from_backbone(tmp_path, paradigm="ft", motion_reduction=4)
    expected, found = trained.backbone.state_dict(), model.backbone.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert model.mixer is not None and all(one.requires_grad for one in model.parameters())


def test_a_backbone_with_adapters_in_it_starts_no_other_model(tmp_path):
    make_model(BACKBONES["vit"], paradigm="adapter", adapter_config={"reduction": 2}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has adapters in it: give the backbone that they were trained for"):
        DmgalModel.from_backbone(tmp_path, paradigm="ft")


@torch.no_grad()
def test_backbones_in_half_precision(tmp_path):
    """Stored so, they are loaded in full; an object in it gets the rest of the model in the same."""
    backbone = ResNetModel(RESNET).to(torch.bfloat16)
    backbone.save_pretrained(tmp_path)
    support, labels, query = make_episodes(episodes=1)
    model = DmgalModel.from_backbone(tmp_path, motion_reduction=4)
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    model(support, labels, query)
    model = DmgalModel.from_backbone(backbone, motion_reduction=4)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    model(support.bfloat16(), labels, query.bfloat16())


@torch.no_grad()
def test_the_dtype_in_a_backbone_config_is_that_of_somebody_elses_weights():
    """As in a config.json of weights that were stored in half precision."""
    config = DmgalConfig(backbone_config={**RESNET.to_dict(), "dtype": "bfloat16"}, motion_reduction=4)
    model = DmgalModel(config).eval()
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    support, labels, query = make_episodes(episodes=1)
    assert model(support, labels, query).logits.isfinite().all()
    model = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_backbones_that_do_not_fit():
    with pytest.raises(ValueError, match="type 'bert', no model of pictures"):
        DmgalModel(DmgalConfig(backbone_config={"model_type": "bert"}))
    swin = {"model_type": "swin", "image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
            "window_size": 4}  # fmt: skip
    with pytest.raises(ValueError, match="'swin' returns 16 tokens for 8 x 8 patches: choose one"):
        make_model(swin, paradigm="adapter")(*make_episodes(episodes=1))


@pytest.mark.slow
def test_from_backbone(tmp_path):
    torch.manual_seed(0)
    backbone = ResNetModel(RESNET)
    backbone.save_pretrained(tmp_path / "resnet")
    for source in (backbone, tmp_path / "resnet", str(tmp_path / "resnet")):
        model = DmgalModel.from_backbone(source, num_frames=4)
        assert model.config.num_frames == 4
        for name, tensor in backbone.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[name], tensor), name

    clip = CLIPModel(CLIPConfig(vision_config=SMALL, text_config={**SMALL, "vocab_size": 99, "eos_token_id": 1}))
    clip.save_pretrained(tmp_path / "clip")
    vision = clip.vision_model.state_dict()
    for source in (clip, tmp_path / "clip"):
        model = DmgalModel.from_backbone(source)
        assert model.config.backbone_config.model_type == "clip_vision_model"
        loaded = model.backbone.state_dict()
        assert vision.keys() == loaded.keys() and all(torch.equal(vision[k], loaded[k]) for k in vision)

        assert model.backbone.config._attn_implementation == "sdpa"

    ViTModel(BACKBONES["vit"]).save_pretrained(tmp_path / "vit")
    names = DmgalModel.from_backbone(tmp_path / "vit").state_dict()
    assert not [name for name in names if "pooler" in name]  # it would never get a gradient


@torch.no_grad()
def test_dtypes(tmp_path):
    model = make_model()
    support, labels, query = make_episodes()
    logits = model(support, labels, query).logits
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.backbone.dtype == torch.bfloat16
    output = half(support.bfloat16(), labels, query.bfloat16())
    torch.testing.assert_close(output.logits, logits, atol=0.05, rtol=0.05)


def test_attention_implementation_reaches_the_backbone():
    model = DmgalModel._from_config(DmgalConfig(backbone_config=BACKBONES["vit"]), attn_implementation="eager")
    assert model.backbone.config._attn_implementation == "eager"


def test_gradient_checkpointing_gives_the_same_gradients():
    support, labels, query = make_episodes()
    gradients = []
    for checkpointing in (False, True):
        model = make_model(BACKBONES["vit"], attention_dropout=0, position_dropout=0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(support, labels, query, labels=labels[:, :2]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("train_first", [False, True])
def test_blocks_of_a_frozen_backbone_are_checkpointed_whenever_it_is_asked_for(train_first):
    model = make_model(BACKBONES["clip"], paradigm="adapter", adapter_config={})
    support, labels, query = make_episodes()
    steps = [model.gradient_checkpointing_enable, model.train]
    for step in reversed(steps) if train_first else steps:
        step()
    runs, last = [], model.backbone.encoder.layers[-1].base_layer
    last.self_attn.register_forward_pre_hook(lambda *_: runs.append(last.self_attn.training))
    model(support, labels, query, labels=labels[:, :2]).loss.backward()
    assert runs == [False, False]  # computed again for the gradient, without the dropout of training


class TestBadInput:
    model = make_model()
    support, labels, query = make_episodes()

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"query_pixel_values": None}, "query_pixel_values is missing"),
            ({"support_pixel_values": None}, "Pass either support_pixel_values.*neither"),
            (
                {"support_pixel_values": support[0]},
                r"support_pixel_values must have the shape \(episodes, .*leading 1",
            ),
            ({"query_pixel_values": query[..., 0]}, "query_pixel_values must have the shape"),
            ({"query_pixel_values": query.transpose(2, 3)}, "query_pixel_values must have the shape"),
            ({"query_pixel_values": (query * 255).byte()}, "query_pixel_values must be floating.*uint8"),
            ({"query_pixel_values": query[:, :0]}, "query_pixel_values is empty"),
            ({"query_pixel_values": query[:, :, :4]}, "query_pixel_values has 4 frames a video.*num_frames=8"),
            ({"query_pixel_values": query[:1]}, "query_pixel_values has 1 episodes.*supports have 2"),
            ({"support_labels": None}, r"support_labels is missing.*\(2, 3\)"),
            ({"support_labels": labels[:, :2]}, r"support_labels must have the shape \(2, 3\).*got \(2, 2\)"),
            ({"support_labels": labels.float()}, "support_labels must be int64, got torch.float32"),
            ({"support_labels": labels - 1}, "support_labels must be 0 or more, got -1"),
            ({"support_labels": labels * 2}, "episode 0 has no support of class 1"),
            ({"labels": torch.tensor([[0, 2], [0, 0]])}, r"labels must lie in 0\.\.1.*got 0\.\.2"),
            ({"labels": torch.tensor([[0], [0]])}, r"labels must have the shape \(2, 2\)"),
            ({"support": DmgalSupport(torch.zeros(2, 3, 8, 16), labels, 2, {})}, "both"),
        ],
    )
    def test_calls(self, change, message):
        inputs = {
            "support_pixel_values": self.support,
            "support_labels": self.labels,
            "query_pixel_values": self.query,
            **change,
        }
        with pytest.raises(ValueError, match=message):
            self.model(**inputs)

    def test_foreign_support_file(self, tmp_path):
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"other\.safetensors holds no supports"):
            DmgalSupport.load(tmp_path / "other.safetensors")


ADAPTER_BACKBONES = [kind for kind in BACKBONES if kind != "resnet"]


def make_adapter_model(kind="clip", seed=0, adapter_config=None, **fields):
    torch.manual_seed(seed)
    adapter_config = {"reduction": 2} if adapter_config is None else adapter_config
    model = DmgalModel(
        DmgalConfig(backbone_config=BACKBONES[kind], paradigm="adapter", adapter_config=adapter_config, **fields)
    ).eval()
    for name, parameter in model.named_parameters():
        if ".up." in name or name.endswith("default.gamma"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class TestAdapterParadigm:
    @pytest.mark.slow
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ADAPTER_BACKBONES)
    def test_round_trip_and_kept_supports(self, tmp_path, kind):
        model = make_adapter_model(kind)
        support, labels, query = make_episodes()
        logits = model(support, labels, query).logits
        kept = model.encode_support(support, labels)
        assert torch.equal(model(query_pixel_values=query, support=kept).logits, logits)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(support, labels, query).logits, logits)
        trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trainable and all(".mga_adapter." in name for name in trainable)
        kept.save(tmp_path / "support.safetensors")
        kept = DmgalSupport.load(tmp_path / "support.safetensors")
        assert torch.equal(loaded(query_pixel_values=query, support=kept).logits, logits)

    @torch.no_grad()
    def test_queries_read_the_supports_of_their_episode_alone(self):
        model = make_adapter_model(adapter_config={"reduction": 2, "smga_layers": []})
        support, labels, query = make_episodes()
        features = model(support, labels, query).query_features
        support[1] = torch.randn_like(support[1])
        changed = model(support, labels, query).query_features
        torch.testing.assert_close(changed[0], features[0], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(changed[1], features[1], atol=1e-3)
        alone = model(support[1:], labels[1:], query[1:]).query_features
        torch.testing.assert_close(changed[1:], alone, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_pooled_supports_can_be_selected(self):
        model = make_adapter_model(adapter_config={"reduction": 2, "support_pooling": 2})
        support, labels, query = make_episodes(labels=(0, 0, 1, 2, 2))
        index = [3, 0, 2]
        few = model.encode_support(support[:, index], labels[:, index])
        logits = model(query_pixel_values=query, support=few).logits
        selected = model.encode_support(support, labels).select(index)
        torch.testing.assert_close(
            model(query_pixel_values=query, support=selected).logits, logits, atol=1e-5, rtol=1e-5
        )
        unpooled = make_adapter_model(adapter_config={"reduction": 2})
        unpooled_logits = unpooled(support[:, index], labels[:, index], query).logits
        assert not torch.allclose(unpooled_logits, logits, atol=1e-3)

    @torch.no_grad()
    def test_fresh_adapters_change_nothing(self):
        support, labels, query = make_episodes()
        plain = DmgalModel(DmgalConfig(backbone_config=BACKBONES["clip"], paradigm="adapter")).eval()
        adapted = DmgalModel.from_backbone(plain.backbone, paradigm="adapter", adapter_config={"reduction": 2}).eval()
        expected = plain(support, labels, query).logits
        assert torch.equal(adapted(support, labels, query).logits, expected)

    @torch.no_grad()
    def test_class_token_descriptors(self):
        model = make_adapter_model("clip", frame_pooling="cls")
        _, _, query = make_episodes()
        model.eval()
        kept = model.encode_support(query, torch.tensor([[0, 1], [0, 1]]))
        tokens = model.backbone(query.flatten(0, 2), num_frames=8, num_support=[2, 2])
        torch.testing.assert_close(kept.features.flatten(0, 2), tokens.pooler_output)
        for kind in ("siglip", "resnet"):
            with pytest.raises(ValueError, match="frame_pooling='cls' needs a backbone with a class token"):
                DmgalModel(DmgalConfig(backbone_config=BACKBONES[kind], paradigm="adapter", frame_pooling="cls"))

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_only_adapters_train_and_the_backbone_stays_in_eval_mode(self, checkpointing):
        backbone = ViTConfig(**SMALL, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
        torch.manual_seed(0)
        model = DmgalModel(
            DmgalConfig(backbone_config=backbone, paradigm="adapter", adapter_config={"reduction": 2, "dropout": 0.5})
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        frozen = [m for name, m in model.backbone.named_modules() if isinstance(m, torch.nn.Dropout)
                  and "mga_adapter" not in name]  # fmt: skip
        assert frozen and not any(module.training for module in frozen)
        adapters = [m for name, m in model.named_modules() if name.endswith(".mga_adapter.default.dropout")]
        assert len(adapters) == 2 and all(module.training for module in adapters)
        support, labels, query = make_episodes()
        model(support, labels, query, labels=labels[:, :2]).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("mga_adapter" in name), name

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["clip", "dinov2"])
    def test_lora_of_equal_size(self, tmp_path, kind):
        def count(adapter_config):
            model = make_adapter_model(kind, adapter_config=adapter_config)
            return sum(one.numel() for one in model.parameters() if one.requires_grad), model

        budget, _ = count({"reduction": 2})
        asked = {"peft_type": "LORA", "budget": {"reduction": 2}, "lora_dropout": 0.5}
        used, model = count(asked)
        chosen = model.config.adapter_config
        assert "budget" not in chosen and chosen["lora_alpha"] == chosen["r"] and "budget" in asked
        of_rank_one, _ = count({**chosen, "r": 1})
        assert used == of_rank_one * chosen["r"] <= budget < of_rank_one * (chosen["r"] + 1)

        support, labels, query = make_episodes()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (".lora_" in name), name
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.train()
        model(support, labels, query, labels=labels[:, :2]).loss.backward()
        assert all((one.grad is not None) == one.requires_grad for one in model.parameters())
        assert {m.training for m in model.backbone.modules() if isinstance(m, torch.nn.Dropout)} >= {True}
        assert not any(m.training for n, m in model.backbone.named_modules() if n.endswith("base_layer"))
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(support, labels, query).logits, model.eval()(support, labels, query).logits)
        assert sum(one.numel() for one in loaded.parameters() if one.requires_grad) == used

    def test_lora_that_no_budget_is_enough_for(self):
        with pytest.raises(ValueError, match=r"LoRA of rank 1 has [\d,]+ parameters, more than the budget of [\d,]+"):
            budget = {"width": 1, "smga_layers": [0], "cmga_layers": []}
            make_adapter_model(adapter_config={"peft_type": "LORA", "budget": budget})

    def test_gradients_reach_the_supports_of_the_cmga_adapter(self):
        model = make_adapter_model().train()
        support, labels, query = make_episodes(1, labels=(0, 1))
        support.requires_grad_()
        model(support, labels, query).query_features.sum().backward()
        assert support.grad.abs().sum() > 0

    def test_adapter_only_checkpoints_through_peft(self, tmp_path):
        from peft import PeftModel, get_peft_model

        from dmgal_hf import MgaConfig

        support, labels, query = make_episodes()
        plain = DmgalModel(DmgalConfig(backbone_config=BACKBONES["clip"], paradigm="adapter")).eval()
        plain.save_pretrained(tmp_path / "plain")
        model = get_peft_model(plain, MgaConfig(reduction=2)).eval()
        for name, parameter in model.named_parameters():
            if ".up." in name or name.endswith("default.gamma"):
                torch.nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            logits = model(support_pixel_values=support, support_labels=labels, query_pixel_values=query).logits
            kept = model.encode_support(support, labels)
            assert torch.equal(model(query_pixel_values=query, support=kept).logits, logits)
        model.save_pretrained(tmp_path / "adapter")
        files = {path.name for path in (tmp_path / "adapter").iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        again = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "plain"), tmp_path / "adapter").eval()
        with torch.no_grad():
            inputs = {"support_pixel_values": support, "support_labels": labels, "query_pixel_values": query}
            assert torch.equal(again(**inputs).logits, logits)
            with again.disable_adapter():
                unadapted = again(**inputs).logits
            base = AutoModel.from_pretrained(tmp_path / "plain")
            assert torch.equal(unadapted, base(**inputs).logits) and not torch.equal(unadapted, logits)

    def test_resnet_takes_no_adapters(self):
        with pytest.raises(ValueError, match="ResNet, cannot take MGA adapters"):
            DmgalModel(DmgalConfig(backbone_config=RESNET, paradigm="adapter", adapter_config={}))
