"""S-MGA, mixer and C-MGA against the authors' recorded outputs and against plain versions with loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import FIXTURES, official_state_dict
from safetensors.torch import load_file
from transformers import ResNetConfig

from dmgal_hf import DmgalConfig
from dmgal_hf.hub.conversion import official_name
from dmgal_hf.model.motion_attention import (
    CrossMotionAttention,
    MotionFeatures,
    SelfMotionAttention,
    TemporalChannelMixer,
    sinusoidal_position_code,
)

MODULES = load_file(FIXTURES / "modules.safetensors")
OFFICIAL_PREFIX = {"self_attention": "Motion_Excitation", "mixer": "mlp_mix1", "cross_attention": "spa_mix2"}


def make_config(**kwargs):
    return DmgalConfig(backbone_config=ResNetConfig(hidden_sizes=[8, 16], depths=[1, 1]), **kwargs)


def random_module(module, seed=0):
    """Every weight, statistic and gamma away from its start, so that nothing cancels."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.5 * noise)
    return module


def load_official(module, part, attribute):
    state = official_state_dict(part)
    names = {name: official_name(f"{attribute}.{name}") for name in module.state_dict()}
    module.load_state_dict({k: state[v.removeprefix(OFFICIAL_PREFIX[attribute] + ".")] for k, v in names.items()})
    return module.eval()


@torch.no_grad()
def test_self_attention_matches_the_authors():
    module = load_official(SelfMotionAttention(make_config(), 32), "smga", "self_attention")
    output, _ = module(MODULES["smga.input"].unflatten(0, (2, 8)))
    torch.testing.assert_close(output.flatten(0, 1), MODULES["smga.output"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_mixer_matches_the_authors():
    module = load_official(TemporalChannelMixer(8, 32), "mixer", "mixer")
    output = module(MODULES["mixer.input"].unflatten(0, (2, 8)))
    torch.testing.assert_close(output, MODULES["mixer.output"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_attention_matches_the_authors():
    module = load_official(CrossMotionAttention(make_config(), 32), "cmga", "cross_attention")
    support = MODULES["cmga.support"].unflatten(0, (1, 3, 8))
    query = MODULES["cmga.query"].unflatten(0, (1, 2, 8))
    support_output, query_output, _ = module(support, query)
    torch.testing.assert_close(support_output[0], MODULES["cmga.support_output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(query_output[0], MODULES["cmga.query_output"], atol=1e-5, rtol=0)


# Plain versions: method.md read line by line, one video, frame and direction at a time.


def plain_norm(norm, maps):
    if norm.training:
        mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
    else:
        mean, var = norm.running_mean, norm.running_var
    maps = (maps - mean[:, None, None]) / torch.sqrt(var[:, None, None] + norm.eps)
    return maps * norm.weight[:, None, None] + norm.bias[:, None, None]


def plain_motion(module, maps):
    """(V, T, C, H, W) -> {direction: (V, T, c, H, W)}."""
    num_videos, num_frames, _, height, width = maps.shape
    bottleneck = plain_norm(module.bottleneck_norm, F.conv2d(maps.flatten(0, 1), module.bottleneck.weight))
    bottleneck = bottleneck.unflatten(0, (num_videos, num_frames))
    motions = {}
    for direction in module.directions:
        step = 1 if direction == "forward" else -1
        difference = torch.zeros_like(bottleneck)
        for v in range(num_videos):
            for t in range(num_frames):
                if 0 <= t + step < num_frames:
                    moved = F.conv2d(
                        bottleneck[v, t + step][None], module.neighbour.weight, padding=1, groups=module.width
                    )
                    difference[v, t] = moved[0] - bottleneck[v, t]
        difference = difference.flatten(0, 1)
        parts = [difference]
        if "half" in module.scales:
            half = plain_norm(
                module.half_norm, F.conv2d(F.avg_pool2d(difference, 2), module.half_conv.weight, padding=1)
            )
            rows = [i * half.shape[2] // height for i in range(height)]
            columns = [i * half.shape[3] // width for i in range(width)]
            parts.append(half[:, :, rows][..., columns])
        if "full" in module.scales:
            parts.append(plain_norm(module.full_norm, F.conv2d(difference, module.full_conv.weight, padding=1)))
        motion = F.conv2d(sum(parts) / len(parts), module.project.weight)
        motions[direction] = motion.unflatten(0, (num_videos, num_frames))
    return motions


def plain_self_attention(module, maps):
    output = maps.clone()
    motions = plain_motion(module.motion, maps)
    for v, video in enumerate(maps):
        for t, frame in enumerate(video):
            value = F.conv2d(frame[None], module.value.weight, padding=1, groups=len(frame))[0].flatten(1).T  # (P, C)
            attended = torch.zeros_like(value)
            for motion in motions.values():
                m = motion[v, t].flatten(1).T  # (P, c)
                m = m + module.position_scale * sinusoidal_position_code(*m.shape)
                attended += torch.softmax(m @ m.T / math.sqrt(m.shape[1]), 1) @ value / len(motions)
            output[v, t] = frame + module.gamma * attended.T.view_as(frame)
    return output


def plain_mixer(module, maps):
    output = maps.clone()
    for v in range(maps.shape[0]):
        for y in range(maps.shape[3]):
            for x in range(maps.shape[4]):
                patch = maps[v, :, :, y, x]  # (T, C)
                mixed = F.linear(F.relu(F.linear(patch.T, *module.temporal_in.parameters())),
                                 *module.temporal_out.parameters())  # fmt: skip
                patch = patch + mixed.T
                mixed = F.linear(F.relu(F.linear(patch, *module.channel_in.parameters())),
                                 *module.channel_out.parameters())  # fmt: skip
                output[v, :, :, y, x] = patch + mixed
    return output


def plain_cross_attention(module, support, query):
    """One episode: (S, T, C, H, W) and (Q, T, C, H, W)."""
    channels = support.shape[2]

    def value(frame):
        return F.conv2d(frame[None], module.value.weight, padding=1, groups=channels)[0]

    support_motion, query_motion = plain_motion(module.motion, support), plain_motion(module.motion, query)
    support_output, query_output = support.clone(), query.clone()
    for s, video in enumerate(support):
        for t, frame in enumerate(video):
            support_output[s, t] = frame + module.gamma_self * value(frame)
    for q, video in enumerate(query):
        for t, frame in enumerate(video):
            values = torch.cat([value(video[t]).flatten(1).T for video in support])  # (S·P, C)
            attended = torch.zeros(frame[0].numel(), channels)
            for direction in module.motion.directions:
                keys = torch.cat([module.norm(m[t].flatten(1).T) for m in support_motion[direction]])
                m = module.norm(query_motion[direction][q, t].flatten(1).T)
                scores = torch.softmax(m @ keys.T / math.sqrt(m.shape[1]), 1)
                attended += scores @ values / len(module.motion.directions)
            cross = attended.T.view_as(frame)
            query_output[q, t] = frame + module.gamma_self * value(frame) + module.gamma_cross * cross
    return support_output, query_output


CASES = [
    {},
    {"motion_directions": "forward"},
    {"motion_directions": "backward", "motion_scales": ["full"]},
    {"motion_scales": []},
    {"motion_scales": ["half"], "position_scale": 0.7},
]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("fields", CASES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_modules_match_plain_versions(fields, training):
    config = make_config(motion_reduction=4, attention_dropout=0, position_dropout=0, num_frames=3, **fields)
    generator = torch.Generator().manual_seed(1)
    support = torch.randn(3, 3, 16, 5, 6, generator=generator)
    query = torch.randn(2, 3, 16, 5, 6, generator=generator)

    module = random_module(SelfMotionAttention(config, 16)).train(training)
    output, attention = module(support)
    torch.testing.assert_close(output, plain_self_attention(module, support), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 3, 30))

    module = random_module(CrossMotionAttention(config, 16)).train(training)
    support_output, query_output, attention = module(support[None], query[None])
    support_plain, query_plain = plain_cross_attention(module, support, query)
    torch.testing.assert_close(support_output[0], support_plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(query_output[0], query_plain, atol=1e-4, rtol=1e-4)
    assert attention.shape == (1, 2, 3, 30, 3, 30)
    torch.testing.assert_close(attention.sum((-1, -2)), torch.ones(1, 2, 3, 30))

    module = random_module(TemporalChannelMixer(3, 16))
    torch.testing.assert_close(module(support), plain_mixer(module, support), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_described_queries_are_the_means_of_their_maps():
    module = random_module(CrossMotionAttention(make_config(motion_reduction=4), 16)).eval()
    support, query = torch.randn(2, 3, 4, 16, 4, 5), torch.randn(2, 2, 4, 16, 4, 5)
    support_described, keys = module.encode_support(support)
    support_maps, maps, attention = module(support, query)
    torch.testing.assert_close(support_described, support_maps.mean((-1, -2)), atol=1e-5, rtol=1e-5)
    described, same_attention = module.describe(query, keys, output_attentions=True)
    torch.testing.assert_close(described, maps.mean((-1, -2)), atol=1e-5, rtol=1e-5)
    assert torch.equal(attention, same_attention)
    described, none = module.describe(query, keys)
    torch.testing.assert_close(described, maps.mean((-1, -2)), atol=1e-5, rtol=1e-5)
    assert none is None


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("fields", CASES, ids=str)
@pytest.mark.parametrize("size", [(4, 5), (2, 2)])
def test_mixed_maps_are_described_without_being_formed(fields, size):
    config = make_config(motion_reduction=4, **fields)
    mixer = random_module(TemporalChannelMixer(4, 16), seed=1)
    module = random_module(CrossMotionAttention(config, 16)).eval()
    support, maps = torch.randn(2, 3, 4, 16, *size), torch.randn(4, 4, 16, *size)
    keys = module.encode_support(support)[1]
    queries = plain_mixer(mixer, maps).unflatten(0, (2, 2))
    plain = [plain_cross_attention(module, *videos)[1].mean((-1, -2)) for videos in zip(support, queries)]
    described, none = module.describe(mixer.mix(maps), keys)
    torch.testing.assert_close(described, torch.stack(plain), atol=1e-4, rtol=1e-4)
    assert none is None
    same, attention = module.describe(mixer.mix(maps), keys, output_attentions=True)
    expected, expected_attention = module.describe(mixer(maps).unflatten(0, (2, 2)), keys, output_attentions=True)
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention, expected_attention, atol=1e-5, rtol=1e-5)


def test_mixed_maps_are_preferred_where_they_spare_work():
    module = CrossMotionAttention(make_config(motion_reduction=4), 16)
    assert module.prefers_mixed((8, 16, 7, 7))
    assert not module.prefers_mixed((8, 16, 3, 3)), "nine sums of nine patches spare nothing"
    assert not module.prefers_mixed((1, 16, 4, 4)), "one frame does not pay for the product of weights"


def test_queries_that_take_turns_get_the_same_descriptors_and_gradients(monkeypatch):
    module = random_module(CrossMotionAttention(make_config(motion_reduction=4, attention_dropout=0), 16))
    support, query = torch.randn(2, 3, 4, 16, 4, 5), torch.randn(2, 5, 4, 16, 4, 5)

    def describe_and_differentiate():
        leaves = [support.clone().requires_grad_(), query.clone().requires_grad_(), *module.parameters()]
        described, _ = module.describe(leaves[1], module.encode_support(leaves[0])[1])
        return described, torch.autograd.grad(described.square().sum(), leaves)

    together, gradients = describe_and_differentiate()
    sizes = []
    attention_of = module._attention
    monkeypatch.setattr(module, "_attention", lambda *args: sizes.append(args[0].shape[3]) or attention_of(*args))
    # One query of these has 2 directions x 2 episodes x 4 frames x 20 patches x 60 patches of the supports.
    monkeypatch.setattr("dmgal_hf.model.motion_attention.SCORES_AT_A_TIME", 2 * 2 * 2 * 4 * 20 * 60)
    in_turns, same_gradients = describe_and_differentiate()
    assert sizes[:3] == [2, 2, 1] and sorted(sizes[3:]) == [1, 2, 2]  # forward, then anew for the gradients
    torch.testing.assert_close(in_turns, together)
    torch.testing.assert_close(same_gradients, gradients, atol=1e-3, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("at_a_time", [1, 2, 5, 10, 1000])  # queries in one frame: parts of one, or several frames
def test_without_gradients_frames_take_turns_with_the_same_descriptors(monkeypatch, at_a_time):
    module = random_module(CrossMotionAttention(make_config(motion_reduction=4), 16)).eval()
    support, query = torch.randn(2, 3, 4, 16, 4, 5), torch.randn(2, 5, 4, 16, 4, 5)
    keys = module.encode_support(support)[1]
    expected = module.attend(query, keys)[0].mean((-1, -2))
    one = 2 * 20 * 60  # directions, patches, patches of the supports
    monkeypatch.setattr("dmgal_hf.model.motion_attention.SCORES_IN_CACHE", at_a_time * one // torch.get_num_threads())
    torch.testing.assert_close(module.describe(query, keys)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 5, 30])  # of the norm: the largest score is 72 or less but for the last
def test_descriptors_hold_where_scores_are_large(scale):
    module = random_module(CrossMotionAttention(make_config(motion_reduction=4), 16)).eval()
    module.norm.weight.fill_(scale)
    module.norm.bias.zero_()
    support, query = torch.randn(2, 3, 4, 16, 4, 5), torch.randn(2, 5, 4, 16, 4, 5)
    keys = module.encode_support(support)[1]
    expected = module.attend(query, keys)[0].mean((-1, -2))
    torch.testing.assert_close(module.describe(query, keys)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_attention_follows_the_support_it_is_told_of():
    """The attention's support axis is in the order of the supports, and episodes do not see each other."""
    module = random_module(CrossMotionAttention(make_config(motion_reduction=4), 16)).eval()
    support, query = torch.randn(2, 3, 4, 16, 4, 4), torch.randn(2, 1, 4, 16, 4, 4)
    _, query_output, attention = module(support, query)
    order = [2, 0, 1]
    _, same_output, permuted = module(support[:, order], query)
    torch.testing.assert_close(same_output, query_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted, attention[:, :, :, :, order], atol=1e-6, rtol=1e-5)
    support[1] += torch.randn_like(support[1])
    torch.testing.assert_close(module(support, query)[1][0], query_output[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(module(support, query)[1][1], query_output[1], atol=1e-2)


@torch.no_grad()
def test_motion_is_zero_beyond_the_ends_and_for_a_still_video():
    module = random_module(MotionFeatures(make_config(motion_reduction=4, motion_scales=[]), 16)).eval()
    forward, backward = module(torch.randn(2, 4, 16, 5, 5))
    assert not forward[:, -1].any() and not backward[:, 0].any()
    assert forward[:, :-1].any() and backward[:, 1:].any()
    module.neighbour.weight.zero_()[:, :, 1, 1] = 1  # the identity: what stands still shows no motion
    still = torch.randn(2, 1, 16, 5, 5).expand(2, 4, 16, 5, 5)
    assert module(still).abs().max() < 1e-5


@torch.no_grad()
def test_modules_start_as_the_identity_apart_from_the_mixer():
    from dmgal_hf import DmgalModel

    model = DmgalModel(make_config(motion_reduction=4)).eval()
    maps = torch.randn(2, 8, 16, 4, 4)
    assert torch.equal(model.self_attention(maps)[0], maps)
    support_output, query_output, _ = model.cross_attention(maps[None], maps[None])
    assert torch.equal(support_output[0], maps) and torch.equal(query_output[0], maps)


def test_position_code_of_odd_width():
    code = sinusoidal_position_code(10, 7)
    assert code.shape == (10, 7)
    torch.testing.assert_close(code[:, 0], torch.sin(torch.arange(10.0)))
    torch.testing.assert_close(code[:, 6], torch.sin(torch.arange(10.0) / 10000 ** (6 / 7)))


def test_too_small_maps_and_channels_are_named():
    with pytest.raises(ValueError, match=r"1x1.*motion_scales"):
        MotionFeatures(make_config(motion_reduction=4), 16)(torch.randn(1, 2, 16, 1, 1))
    with pytest.raises(ValueError, match=r"motion_reduction.*16 channels.*got 32"):
        MotionFeatures(make_config(motion_reduction=32), 16)
