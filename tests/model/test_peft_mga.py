"""The adapters of the PEFT method `mga`: what they compute, how episode facts reach them, what they refuse."""

import copy
import importlib
import json
import threading

import pytest
import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    ResNetConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from dmgal_hf.model import modeling_mga
from dmgal_hf.model.motion_adapters import CmgaAdapter, SmgaAdapter, episode_layout
from dmgal_hf.peft import CmgaLayer, MgaConfig, MgaModel, SmgaLayer, SupportCache

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = {
    "clip": (CLIPVisionConfig(**SIZES), 1),
    "vit": (ViTConfig(**SIZES), 1),
    "dinov2": (Dinov2Config(**SIZES), 1),
    "dinov2_with_registers": (Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3), 4),
    "dinov3": (DINOv3ViTConfig(**SIZES, num_register_tokens=2), 3),
    "siglip": (SiglipVisionConfig(**SIZES, vision_use_head=False), 0),
}


def backbone(family="clip", seed=0):
    torch.manual_seed(seed)
    return AutoModel.from_config(FAMILIES[family][0]).eval()


def adapted(family="clip", model=None, **fields):
    """A backbone whose adapters change much (unlike fresh ones)."""
    model = get_peft_model(backbone(family) if model is None else model, MgaConfig(init_weights=False, **fields))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "mga_adapter" in name:
            nn.init.normal_(parameter, std=0.5 if "conv" in name else 0.3)
    return model.eval()


def frames(*leading, side=32, seed=2):
    return torch.randn(*leading, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(model, pixel_values, **facts):
    """Last hidden states of videos (..., T, 3, H, W), as (..., T, tokens, D)."""
    output = model(pixel_values.flatten(0, -4), **facts).last_hidden_state
    return output.view(*pixel_values.shape[:-3], *output.shape[1:])


# What the adapters compute, written out frame by frame, video by video and episode by episode.


def plain_depthwise(weight, grid):
    """3x3 depthwise convolution with zero padding of grid (h, w, d) with weight (d, 1, 3, 3)."""
    rows, columns, _ = grid.shape
    result = torch.zeros_like(grid)
    for row in range(rows):
        for column in range(columns):
            for i in range(3):
                for j in range(3):
                    y, x = row + i - 1, column + j - 1
                    if 0 <= y < rows and 0 <= x < columns:
                        result[row, column] += weight[:, 0, i, j] * grid[y, x]
    return result


def plain_video(adapter, patches, grid):
    """Values (T, P, d) and normalised motion per direction (T, P, d) of one video's patches (T, P, D)."""
    z = patches @ adapter.down.weight.T + adapter.down.bias
    num_frames, _, width = z.shape

    def spatial(convolution):
        return torch.stack([plain_depthwise(convolution.weight, f.view(*grid, width)).view(-1, width) for f in z])

    around, values = spatial(adapter.motion_conv), spatial(adapter.value_conv)
    motions = []
    for step in [{"forward": 1, "backward": -1}[direction] for direction in adapter.directions]:
        motion = torch.zeros_like(z)
        for t in range(num_frames):
            if 0 <= t + step < num_frames:
                motion[t] = around[t + step] - z[t]
        motions.append(motion)
    values = values + torch.cat(motions, -1) @ adapter.motion_value.weight.T
    for t in range(num_frames):
        for tap, other in enumerate((t - 1, t, t + 1)):
            if 0 <= other < num_frames:
                values[t] += adapter.time_conv.weight[:, 0, tap, 0] * z[other]
    if not adapter.attention:
        return values, None
    norm = adapter.motion_norm
    return values, [F.layer_norm(m, (width,), norm.weight, norm.bias, norm.eps) for m in motions]


def plain_read(motions, keys, values):
    """Mean over directions of softmax(M K^T / sqrt(d)) V for one frame."""
    reads = [torch.softmax(m @ k.T / m.shape[-1] ** 0.5, -1) @ values for m, k in zip(motions, keys, strict=True)]
    return sum(reads) / len(reads)


def plain_pool(tokens, grid, side):
    """(S·P, d) -> (S·squares, d)."""
    squares = []
    for frame in tokens.view(-1, *grid, tokens.shape[-1]):
        for row in range(0, grid[0], side):
            for column in range(0, grid[1], side):
                squares.append(frame[row : row + side, column : column + side].mean((0, 1)))
    return torch.stack(squares)


def plain_adapter(adapter, patches, grid, num_support=None):
    """Change of the patches (B, V, T, P, D); `num_support` has one number an episode, `None` for the Smga form."""
    changes = torch.empty_like(patches)
    for b, episode in enumerate(patches):
        videos = [plain_video(adapter, video, grid) for video in episode]
        for v, (values, motions) in enumerate(videos):
            y = values.clone()
            for t in range(values.shape[0]):
                if not adapter.attention:
                    continue
                mine = [m[t] for m in motions]
                if num_support is None:
                    y[t] += adapter.gamma * plain_read(mine, mine, values[t])
                elif v >= num_support[b]:
                    supports = videos[: num_support[b]]
                    keys = [torch.cat([s[1][g][t] for s in supports]) for g in range(len(mine))]
                    values_read = torch.cat([s[0][t] for s in supports])
                    if adapter.support_pooling > 1:
                        keys = [plain_pool(k, grid, adapter.support_pooling) for k in keys]
                        values_read = plain_pool(values_read, grid, adapter.support_pooling)
                    y[t] += adapter.gamma * plain_read(mine, keys, values_read)
            changes[b, v] = F.gelu(y) @ adapter.up.weight.T + adapter.up.bias
    return changes


def random_adapter(adapter_class, prefix, **fields):
    torch.manual_seed(3)
    adapter = adapter_class(12, prefix, MgaConfig(init_weights=False, width=6, **fields)).double().eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.6)
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(
    ("adapter_class", "num_support"),
    [(SmgaAdapter, None), (SmgaAdapter, (2, 2)), (CmgaAdapter, None), (CmgaAdapter, (2, 2)), (CmgaAdapter, (3, 1))],
)
@pytest.mark.parametrize(
    "fields",
    [{}, {"directions": "forward"}, {"directions": "backward"}, {"attention": False}, {"support_pooling": 2}],
    ids=str,
)
def test_adapters_compute_their_equations(adapter_class, num_support, fields, prefix):
    adapter = random_adapter(adapter_class, prefix, **fields)
    grid = (2, 3)
    hidden = torch.randn(2, 3, 4, prefix + 6, 12, dtype=torch.float64)  # (B, V, T, tokens, D)
    layout = episode_layout(24, 6, 4, num_support, grid)
    change, _ = adapter(hidden.flatten(0, 2), layout)
    cross = num_support if adapter_class is CmgaAdapter else None
    expected = plain_adapter(adapter, hidden[..., prefix:, :], grid, cross)
    torch.testing.assert_close(change.view_as(expected), expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().mean() > 0.1


def test_a_video_of_one_frame_has_no_motion_but_gradients_for_every_weight():
    adapter = random_adapter(SmgaAdapter, 0)
    change, _ = adapter(torch.randn(3, 4, 12, dtype=torch.float64), episode_layout(3, 4, 1))
    change.sum().backward()
    assert change.isfinite().all()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert adapter.motion_conv.weight.grad.abs().sum() == 0


# In the five families of backbones.


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_no_bit(family):
    model = backbone(family)
    videos = frames(5, 4)
    with torch.no_grad():
        before = tokens(model, videos)
        model = get_peft_model(model, MgaConfig(num_frames=4)).eval()
        assert torch.equal(tokens(model, videos), before)
        assert torch.equal(tokens(model, videos, num_support=2), before)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_and_prefix_tokens_pass_untouched(family):
    model = adapted(family, num_frames=2)
    layers = [module for module in model.modules() if isinstance(module, (SmgaLayer, CmgaLayer))]
    assert [type(layer) for layer in layers] == [SmgaLayer, SmgaLayer, CmgaLayer]
    prefix = FAMILIES[family][1]
    assert {layer.mga_adapter["default"].num_prefix_tokens for layer in layers} == {prefix}
    seen = []
    layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layers[0].base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(frames(4))
    entering, adapted_tokens = seen
    assert torch.equal(entering[:, :prefix], adapted_tokens[:, :prefix])
    assert (entering[:, prefix:] != adapted_tokens[:, prefix:]).float().mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("support_pooling", [1, 3])
def test_episode_facts_reach_the_layers(family, support_pooling):
    """Two episodes at once are as each alone, also from a cache, and queries depend on their own supports only."""
    model = adapted(family, support_pooling=support_pooling)
    videos = frames(2, 5, 4)
    with torch.no_grad():
        together = tokens(model, videos, num_frames=4, num_support=[3, 2])
        for episode, num_support in enumerate((3, 2)):
            alone = tokens(model, videos[episode], num_frames=4, num_support=num_support)
            torch.testing.assert_close(together[episode], alone, rtol=1e-4, atol=1e-5)
        changed = videos.clone()
        changed[0, 0] += 1  # a support of the first episode
        changed = tokens(model, changed, num_frames=4, num_support=[3, 2])
        assert (changed - together)[0, 3:].abs().amax((1, 2, 3)).min() > 1e-3
        torch.testing.assert_close(changed[1], together[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(changed[0, 1:3], together[0, 1:3], rtol=1e-4, atol=1e-5)

        cache = SupportCache()
        supports = tokens(model, videos[:, :3], num_frames=4, num_support=[3, 3], support_cache=cache)
        queries = tokens(model, videos[:, 3:], num_frames=4, num_support=[0, 0], support_cache=cache)
        together = tokens(model, videos, num_frames=4, num_support=[3, 3])
        torch.testing.assert_close(torch.cat((supports, queries), 1), together, rtol=1e-4, atol=1e-5)
        plain = tokens(model, videos, num_frames=4)
        assert (plain - together)[:, 3:].abs().max() > 1e-3


def test_without_facts_the_configured_frames_and_the_form_within_a_video_are_used():
    model = adapted(num_frames=4)
    smga_only = adapted(num_frames=4, cmga_layers=[])
    smga_only.load_state_dict(model.state_dict())
    videos = frames(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(tokens(model, videos), tokens(smga_only, videos, num_frames=4))
        assert not torch.allclose(tokens(model, videos), tokens(model, videos, num_frames=2))
        one_by_one = torch.stack([tokens(model, video) for video in videos])
        torch.testing.assert_close(tokens(model, videos), one_by_one, rtol=1e-4, atol=1e-5)


def test_frames_that_are_not_square():
    torch.manual_seed(0)
    model = adapted(model=AutoModel.from_config(DINOv3ViTConfig(**SIZES)), num_frames=2)
    pixel_values = torch.randn(4, 3, 16, 32)
    with torch.no_grad():
        wide = model(pixel_values, patch_grid=(2, 4)).last_hidden_state
        assert not torch.allclose(wide, model(pixel_values, patch_grid=(4, 2)).last_hidden_state)
        with pytest.raises(ValueError, match="8 patch tokens of a frame make no square grid"):
            model(pixel_values)
        with pytest.raises(ValueError, match="does not hold the 8 patch tokens"):
            model(pixel_values, patch_grid=(3, 3))


def test_block_lists_and_numbers():
    def kinds(**fields):
        model = get_peft_model(backbone(), MgaConfig(**fields))
        names = {SmgaLayer: "s", CmgaLayer: "c"}
        return "".join(names.get(type(block), "-") for block in model.base_model.model.encoder.layers)

    assert kinds() == "ssc"
    assert kinds(cmga_layers=[]) == "sss"
    assert kinds(smga_layers=[]) == "--c"
    assert kinds(smga_layers=[-2], cmga_layers=[]) == "-s-"
    assert kinds(smga_layers=[0], cmga_layers=[1, 2]) == "scc"
    assert kinds(target_modules=["layers.0", "layers.2"]) == "s-c"
    assert kinds(target_modules=r"encoder\.layers\.[01]") == "sc-"


def test_a_vision_model_inside_another_model():
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 20, "max_position_embeddings": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=8))
    model = get_peft_model(clip, MgaConfig())
    assert model.base_model.targeted_module_names == [f"vision_model.encoder.layers.{i}" for i in range(3)]

    classifier = adapted(model=ViTForImageClassification(ViTConfig(**SIZES, num_labels=4)), num_frames=2)
    videos = frames(6)
    with torch.no_grad():
        logits = classifier(videos, num_support=1).logits
        assert not torch.allclose(logits, classifier(videos).logits)


def test_hidden_states_and_attentions_are_still_recorded():
    model = adapted(num_frames=2)
    output = model(frames(4), num_support=1, output_hidden_states=True)
    assert len(output.hidden_states) == 4


class PlainBlock(nn.Module):
    """A block as in many repositories: no keyword arguments."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class PlainTransformer(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.blocks = nn.Sequential(*[PlainBlock(width) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2))


def plain_transformer(**fields):
    torch.manual_seed(0)
    return adapted(model=PlainTransformer(), target_modules=r"blocks\.\d+", num_prefix_tokens=0, **fields)


def test_models_that_do_not_hand_keywords_on():
    model = plain_transformer(num_frames=2)
    videos = frames(5, 4)
    with torch.no_grad():
        joint = model(videos.flatten(0, 1), num_frames=4, num_support=3).unflatten(0, (5, 4))
        cache = SupportCache()
        model(videos[:3].flatten(0, 1), num_frames=4, num_support=3, support_cache=cache)
        queries = model(videos[3:].flatten(0, 1), num_frames=4, num_support=0, support_cache=cache)
        torch.testing.assert_close(queries.unflatten(0, (2, 4)), joint[3:], rtol=1e-4, atol=1e-5)
        # Facts end with their call, also one that fails, and a copy of the model has facts of its own.
        default = model(videos.flatten(0, 1), num_frames=2)
        with pytest.raises(ValueError, match="does not divide"):
            model(videos.flatten(0, 1), num_frames=7)
        torch.testing.assert_close(model(videos.flatten(0, 1)), default)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(videos.flatten(0, 1), num_frames=4, num_support=3).unflatten(0, (5, 4)), joint)
    restored = model.unload()
    with pytest.raises(TypeError, match="num_frames"):
        restored(videos.flatten(0, 1), num_frames=4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [adapted, plain_transformer], ids=["clip", "plain"])
def test_calls_in_several_threads_keep_their_facts(make):
    model = make(num_frames=2)
    videos = frames(24)
    calls = [{"num_frames": 2}, {"num_frames": 4, "num_support": 2}, {"num_frames": 3, "num_support": [1, 2]}, {}]

    def features(facts):
        with torch.no_grad():
            output = model(videos, **facts)
        return output if torch.is_tensor(output) else output.last_hidden_state

    expected = [features(facts) for facts in calls]
    start = threading.Barrier(len(calls))
    outcomes = [[] for _ in calls]

    def work(number):
        start.wait()
        outcomes[number].extend(features(calls[number]) for _ in range(8))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for wanted, got in zip(expected, outcomes, strict=True):
        assert len(got) == 8
        for features_of_a_call in got:
            torch.testing.assert_close(features_of_a_call, wanted, rtol=1e-4, atol=1e-5)


# The cache of supports.


def test_support_cache_as_file_and_with_unequal_episodes(tmp_path):
    model = adapted()
    videos = frames(2, 5, 4)
    cache = SupportCache()
    with torch.no_grad():
        # The videos after an episode's supports are its queries, so unequal episodes fill up with any video.
        tokens(model, videos[:, :3], num_frames=4, num_support=[3, 1], support_cache=cache)
        assert list(cache) == ["encoder.layers.2.default"]
        assert cache["encoder.layers.2.default"]["values"].shape == (2, 4, 3 * 16, 8)
        save_file(cache.tensors(), tmp_path / "cache.safetensors")
        loaded = SupportCache.from_tensors(load_file(tmp_path / "cache.safetensors"))
        assert loaded.num_support == (3, 1)
        queries = tokens(model, videos[:, 3:], num_frames=4, num_support=[0, 0], support_cache=loaded)
        joint = tokens(model, videos, num_frames=4, num_support=[3, 1])
        torch.testing.assert_close(queries, joint[:, 3:], rtol=1e-4, atol=1e-5)
    assert loaded.to(torch.float64) is loaded
    assert all(tensor.dtype == torch.float64 for tensor in loaded["encoder.layers.2.default"].values())


def test_pooled_supports_take_less_room_and_are_read_as_such_only():
    videos = frames(5, 4)
    pooled, cache = adapted(support_pooling=2), SupportCache()
    tokens(pooled, videos[:3], num_frames=4, num_support=3, support_cache=cache)
    assert {tensor.shape for tensor in cache["encoder.layers.2.default"].values()} == {(1, 4, 3 * 4, 8)}
    with pytest.raises(
        ValueError, match=r"filled for 4 patches a frame, but these queries have 16\..*support_pooling"
    ):
        tokens(adapted(), videos[3:], num_frames=4, num_support=0, support_cache=cache)


def test_gradients_flow_through_the_cache():
    model = adapted()
    videos = frames(5, 4)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    joint = gradients(tokens(model, videos, num_frames=4, num_support=3)[3:].square().mean())
    cache = SupportCache()
    tokens(model, videos[:3], num_frames=4, num_support=3, support_cache=cache)
    queries = tokens(model, videos[3:], num_frames=4, num_support=0, support_cache=cache)
    cached = gradients(queries.square().mean())
    assert joint.keys() == cached.keys()
    for name, gradient in joint.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-3, atol=1e-4)


def test_wrong_use_of_the_cache():
    model = adapted()
    videos = frames(4, 4)
    with pytest.raises(ValueError, match=r"num_support=\[0\].*filled `support_cache`"):
        tokens(model, videos, num_frames=4, num_support=0)
    with pytest.raises(ValueError, match=r"holds nothing for 'encoder\.layers\.2\.default'"):
        tokens(model, videos, num_frames=4, num_support=0, support_cache=SupportCache())
    cache = SupportCache()
    tokens(model, videos, num_frames=4, num_support=4, support_cache=cache)
    with pytest.raises(ValueError, match="filled for 1 episodes, but these queries have 2"):
        tokens(model, videos, num_frames=4, num_support=[0, 0], support_cache=cache)
    with pytest.raises(ValueError, match="filled for 4 frames a video, but these queries have 2"):
        tokens(model, videos, num_frames=2, num_support=0, support_cache=cache)


# Bad input.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_frames": 3}, "num_frames=3 does not divide the batch of 8 images"),
        ({"num_frames": 0}, "num_frames=0"),
        ({"num_frames": 2, "num_support": 5}, r"num_support=\[5\]: each of these episodes has 4 videos"),
        ({"num_frames": 2, "num_support": [1, 3]}, r"num_support=\[1, 3\]: each of these episodes has 2 videos"),
        ({"num_frames": 2, "num_support": [1, -1]}, "give between 0 and 2"),
        ({"num_frames": 2, "num_support": [1, 0]}, "an episode without supports"),
        ({"num_frames": 2, "num_support": [1, 1, 1]}, "names 3 episodes, but the 4 videos"),
        ({"num_frames": 2, "num_support": [0.5]}, "give one integer an episode"),
        ({"num_frames": 2, "patch_grid": 4}, "patch_grid=4"),
    ],
)
def test_facts_that_cannot_be(facts, message):
    with pytest.raises(ValueError, match=message):
        adapted()(frames(8), **facts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "MgaConfig.width=0"),
        ({"reduction": 2.5}, "MgaConfig.reduction=2.5"),
        ({"support_pooling": 0}, "MgaConfig.support_pooling=0: give an integer of at least 1"),
        ({"num_frames": -1}, "MgaConfig.num_frames=-1"),
        ({"num_prefix_tokens": -1}, "MgaConfig.num_prefix_tokens=-1"),
        ({"directions": "up"}, "MgaConfig.directions='up': allowed are backward, both, forward"),
        ({"activation": "bump"}, "MgaConfig.activation='bump': allowed are .*gelu"),
        ({"attention": 1}, "MgaConfig.attention=1: give True or False"),
        ({"dropout": 1.0}, "MgaConfig.dropout=1.0"),
        ({"target_modules": []}, "MgaConfig.target_modules="),
        ({"smga_layers": "0"}, "MgaConfig.smga_layers='0'"),
        ({"cmga_layers": [1, 1]}, "names a block twice"),
        ({"smga_layers": [], "cmga_layers": []}, "adapts nothing"),
        ({"format_version": 7}, "format_version=7.*reads versions up to 1.*Upgrade dmgal-hf"),
    ],
)
def test_config_values_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        MgaConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cmga_layers": [3]}, r"cmga_layers names block 3, but this backbone has 3 blocks \(-3 to 2\)"),
        ({"smga_layers": [0, 2]}, "names block 2 for both adapters"),
        ({"target_modules": "nothing"}, "Target modules nothing not found"),
        ({"target_modules": r".*\.fc1"}, "matches 'encoder.layers.0.mlp.fc1' .* which is no transformer block"),
        ({"reduction": 64}, "MgaConfig.reduction=64 leaves nothing of the backbone's width of 32"),
    ],
)
def test_configs_that_do_not_fit_the_backbone(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(backbone(), MgaConfig(**fields))


def test_backbones_without_patch_tokens():
    torch.manual_seed(0)
    resnet = AutoModel.from_config(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="A backbone without patch tokens, such as a ResNet"):
        get_peft_model(resnet, MgaConfig())
    with pytest.raises(ValueError, match=r"num_prefix_tokens is None.*PlainTransformer"):
        get_peft_model(PlainTransformer(), MgaConfig(target_modules=r"blocks\.\d+"))


# The configuration as a file, and the registration.


def test_config_file_round_trip(tmp_path):
    config = MgaConfig(target_modules=["layers.1", "layers.0"], cmga_layers=[1], width=5, directions="forward")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MgaConfig
    assert loaded == config

    path = tmp_path / "adapter_config.json"
    newer = json.loads(path.read_text()) | {"format_version": 2, "field_of_the_future": 1}
    path.write_text(json.dumps(newer))
    with (
        pytest.warns(UserWarning, match="field_of_the_future"),
        pytest.raises(ValueError, match="format_version=2, but the installed dmgal-hf reads versions up to 1"),
    ):
        PeftConfig.from_pretrained(tmp_path)


def test_peft_knows_the_method():
    assert PeftType("MGA") is PeftType.MGA is PeftType["MGA"]
    assert "MGA" in list(PeftType)
    assert list(PeftType).count("MGA") == 1
    assert copy.deepcopy(PeftType.MGA) is PeftType.MGA
    assert json.dumps(PeftType.MGA) == '"MGA"'
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] is MgaModel


def test_reloading_registers_once_more():
    old = (modeling_mga.MgaModel, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.MGA])
    names = {name: value for name, value in vars(modeling_mga).items() if not name.startswith("__")}
    try:
        reloaded = importlib.reload(modeling_mga)
        assert reloaded.MgaModel is not old[0]
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] is reloaded.MgaModel
        assert list(PeftType).count("MGA") == 1
    finally:
        vars(modeling_mga).update(names)  # the other tests hold the classes of before
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] = old[0]


def test_a_taken_name_is_refused_with_its_owner():
    class RivalModel:
        prefix = "mga_"

    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] = RivalModel
    try:
        with pytest.raises(RuntimeError, match=r"'mga' .*is taken by .*RivalModel"):
            modeling_mga.register_mga()
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] is RivalModel
    finally:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.MGA] = MgaModel
