import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from dmgal_hf.data.transforms import (
    MEAN_GREY,
    ClipAugmentation,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    horizontal_flip,
    to_grayscale,
)
from dmgal_hf.model.video_processing_dmgal import resize_short_side

FACTORS = [0.0, 0.4, 0.5, 0.93, 1.0, 1.2, 1.5, 2.0]


def random_clip(num_frames=3, height=24, width=30, seed=0):
    """Frames of different brightness and contrast, with some grey, black and white pixels: (T, 3, H, W) uint8."""
    generator = np.random.default_rng(seed)
    clip = generator.integers(0, 256, (num_frames, 3, height, width))
    clip = clip * generator.uniform(0.3, 1, (num_frames, 1, 1, 1)) + generator.uniform(0, 70, (num_frames, 1, 1, 1))
    clip[:, :, 0] = generator.integers(0, 256, (num_frames, 1, width))
    clip[:, :, 1, :2] = [0, 255]
    return torch.from_numpy(clip.clip(0, 255).astype(np.uint8))


def frame_by_frame(clip, function):
    """`function`, from a PIL image to a PIL image, on one frame after the other."""
    images = [function(Image.fromarray(frame.permute(1, 2, 0).numpy())) for frame in clip]
    return torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])


def largest_difference(first, second):
    return (first.int() - second.int()).abs().max().item()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    "adjust, enhance",
    [
        (adjust_brightness, ImageEnhance.Brightness),
        (adjust_contrast, ImageEnhance.Contrast),
        (adjust_saturation, ImageEnhance.Color),
    ],
)
def test_adjustments_are_those_of_pil(adjust, enhance, factor):
    clip = random_clip()
    before = clip.clone()
    result = adjust(clip, factor)
    assert result.dtype == torch.uint8 and torch.equal(clip, before)
    assert largest_difference(result, frame_by_frame(clip, lambda image: enhance(image).enhance(factor))) <= 1
    if factor == 1:
        assert torch.equal(result, clip)


def test_grayscale_is_exactly_that_of_pil():
    clip = random_clip()
    assert torch.equal(to_grayscale(clip), frame_by_frame(clip, lambda image: image.convert("L")))
    assert torch.equal(adjust_saturation(clip, 0.0), to_grayscale(clip))


def plain_hue(clip, shift):
    result = torch.empty(clip.shape, dtype=torch.float64)
    for frame in range(clip.shape[0]):
        for row in range(clip.shape[2]):
            for column in range(clip.shape[3]):
                hue, saturation, value = colorsys.rgb_to_hsv(*(clip[frame, :, row, column].tolist()))
                color = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
                result[frame, :, row, column] = torch.tensor(color)
    return result


@pytest.mark.parametrize("shift", [-0.5, -0.25, -0.1, 0.0, 0.07, 0.25, 0.5])
def test_hue_is_that_of_colorsys(shift):
    clip = random_clip(2, 9, 11)
    result = adjust_hue(clip, shift)
    assert (result - plain_hue(clip, shift)).abs().max() < 0.5 + 1e-4  # rounded, and no more
    assert torch.equal(to_grayscale(clip), adjust_hue(to_grayscale(clip), shift))
    if shift == 0:
        assert torch.equal(result, clip)


def test_hue_turns_red_to_green_to_blue():
    red, green, blue = (torch.eye(3, dtype=torch.uint8)[n].mul(200).view(1, 3, 1, 1) for n in range(3))
    assert torch.equal(adjust_hue(red, 1 / 3), green) and torch.equal(adjust_hue(green, 1 / 3), blue)
    assert torch.equal(adjust_hue(red, -1 / 3), blue)


def test_memory_layout_does_not_matter():
    clip = random_clip()
    channels_last = clip.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for function in (to_grayscale, lambda c: adjust_hue(c, 0.2), lambda c: adjust_contrast(c, 1.4)):
        assert torch.equal(function(clip), function(channels_last))


def test_flip_mirrors_every_frame():
    clip = random_clip()
    assert torch.equal(
        horizontal_flip(clip), frame_by_frame(clip, lambda image: image.transpose(Image.FLIP_LEFT_RIGHT))
    )


def test_random_crop_reaches_every_position_equally():
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(7), indexing="ij")
    clip = torch.stack([rows, columns, rows]).to(torch.uint8).expand(2, 3, 6, 7)
    augment, generator, counts = ClipAugmentation((4, 4), resize=6), seeded(0), torch.zeros(3, 4)
    for _ in range(1200):
        crop = augment(clip, generator)
        top, left = crop[0, 0, 0, 0].item(), crop[0, 1, 0, 0].item()
        assert torch.equal(crop, clip[:, :, top : top + 4, left : left + 4])
        counts[top, left] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 expected each, standard deviation 9.6


def test_random_erasing_fills_one_rectangle_in_all_frames():
    clip = torch.full((3, 3, 40, 40), 7, dtype=torch.uint8)
    never, sometimes, always = (ClipAugmentation(40, 40, random_erasing=chance) for chance in (0.0, 0.5, 1.0))
    erased, areas = 0, []
    for seed in range(300):
        result = sometimes(clip, seeded(seed))
        assert result.dtype == torch.uint8 and clip.eq(7).all()
        filled = result == MEAN_GREY
        assert torch.equal(filled, filled[:1, :1].expand_as(filled)) and result[~filled].eq(7).all()
        if filled.any():
            erased += 1
            rows, columns = filled[0, 0].any(1).nonzero().flatten(), filled[0, 0].any(0).nonzero().flatten()
            assert filled[0, 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            height, width = len(rows), len(columns)
            assert height == rows[-1] - rows[0] + 1 and width == columns[-1] - columns[0] + 1
            assert 0.25 <= height / width <= 4
            areas.append(height * width / 1600)
    assert 115 < erased < 185  # 150 expected, standard deviation 8.7
    assert 0.018 < min(areas) < 0.05 and 0.27 < max(areas) < 0.35
    assert all(torch.equal(never(clip, seeded(seed)), clip) for seed in range(20))
    assert all((always(clip, seeded(seed)) == MEAN_GREY).any() for seed in range(20))


def test_every_frame_gets_the_same():
    frame = random_clip(1, 40, 52)
    clip = frame.expand(5, -1, -1, -1)
    augment = ClipAugmentation.for_query(crop_size=24, resize=32, horizontal_flip=True)
    for seed in range(20):
        result = augment(clip, seeded(seed))
        assert result.shape == (5, 3, 24, 24) and result.is_contiguous()
        assert torch.equal(result, result[:1].expand_as(result))


def test_a_clip_is_augmented_as_its_frames_are():
    clip = random_clip(4, 40, 52)
    augment = ClipAugmentation.for_query(crop_size=24, resize=32, horizontal_flip=True)
    for seed in range(10):
        alone = [augment(clip[n : n + 1], seeded(seed)) for n in range(4)]
        assert torch.equal(augment(clip, seeded(seed)), torch.cat(alone))


def test_support_is_resized_and_cropped_at_random():
    clip = random_clip(2, 40, 52)
    resized = resize_short_side(clip, 32)
    windows = [resized[..., top : top + 24, left : left + 24] for top in range(9) for left in range(18)]
    augment = ClipAugmentation.for_support(crop_size=24, resize=32)
    found = set()
    for seed in range(30):
        result = augment(clip, seeded(seed))
        matches = [number for number, window in enumerate(windows) if torch.equal(window, result)]
        assert len(matches) == 1
        found.update(matches)
    assert len(found) > 15


def test_same_state_same_result_and_the_same_number_of_draws_whatever_the_clip():
    augment = ClipAugmentation.for_query(crop_size=16, resize=20, horizontal_flip=True)
    clips = [random_clip(2, 40, 52), random_clip(5, 90, 21, seed=1), torch.zeros(1, 3, 20, 20, dtype=torch.uint8)]
    for seed in range(10):
        generators = [seeded(seed) for _ in clips]
        results = [augment(clip, generator) for clip, generator in zip(clips, generators, strict=True)]
        assert torch.equal(results[0], augment(clips[0], seeded(seed)))
        assert all(torch.equal(generators[0].get_state(), other.get_state()) for other in generators)
        plain = seeded(seed)
        ClipAugmentation.for_support(crop_size=4, resize=8)(clips[1], plain)
        assert torch.equal(generators[0].get_state(), plain.get_state())


def test_one_option_leaves_the_others_as_they_were():
    clip = random_clip(2, 40, 52)
    with_flip = ClipAugmentation.for_query(crop_size=24, resize=32, horizontal_flip=True)
    without = ClipAugmentation(24, 32, grayscale=0.3, color_jitter=(0.5, 0.5, 0.5, 0.25))
    with_flip.random_erasing = 0.0
    flipped = 0
    for seed in range(60):
        first, second = with_flip(clip, seeded(seed)), without(clip, seeded(seed))
        if not torch.equal(first, second):
            flipped += 1
            assert torch.equal(first, horizontal_flip(second))
    assert 15 < flipped < 45


def test_flip_is_off_unless_asked_for():
    clip = torch.arange(0, 240, 8, dtype=torch.uint8).expand(2, 3, 30, 30)
    for augment in (
        ClipAugmentation(30, 30),
        ClipAugmentation.for_support(30, 30),
        ClipAugmentation.for_query(30, 30, horizontal_flip=False),
    ):
        augment.random_erasing = 0.0
        for seed in range(30):
            rows = augment(clip, seeded(seed)).float().diff(dim=-1)
            assert rows.min() >= 0 and rows.max() > 0
    with pytest.raises(TypeError, match="horizontal_flip"):
        ClipAugmentation.for_query(30, 30)


@pytest.mark.slow
@pytest.mark.parametrize("number, adjust", enumerate([adjust_brightness, adjust_contrast, adjust_saturation]))
def test_jitter_spans_its_range(number, adjust):
    strengths = [0.0] * 4
    strengths[number] = 0.5
    clip = random_clip(1, 16, 16)
    candidates = {factor: adjust(clip, factor) for factor in np.linspace(0.5, 1.5, 101)}
    augment, factors = ClipAugmentation(16, 16, color_jitter=strengths), []
    for seed in range(60):
        result = augment(clip, seeded(seed))
        factor = min(candidates, key=lambda factor: (candidates[factor].int() - result.int()).abs().sum())
        assert largest_difference(candidates[factor], result) <= 2
        factors.append(factor)
    assert min(factors) < 0.6 and max(factors) > 1.4 and abs(np.mean(factors) - 1) < 0.12


def test_jitter_is_applied_in_every_order():
    clip = random_clip(1, 16, 16)
    augment = ClipAugmentation(16, 16, color_jitter=(0.9, 0.9, 0, 0))
    first, second = 0, 0
    for seed in range(40):
        result = augment(clip, seeded(seed))
        only_brightness = ClipAugmentation(16, 16, color_jitter=(0.9, 0, 0, 0))
        only_contrast = ClipAugmentation(16, 16, color_jitter=(0, 0.9, 0, 0))
        brightness_first = only_contrast(only_brightness(clip, seeded(seed)), seeded(seed))
        contrast_first = only_brightness(only_contrast(clip, seeded(seed)), seeded(seed))
        assert torch.equal(result, brightness_first) or torch.equal(result, contrast_first)
        first += not torch.equal(result, contrast_first)
        second += not torch.equal(result, brightness_first)
    assert first > 8 and second > 8


def test_grayscale_takes_its_share():
    clip = random_clip(1, 16, 16)
    augment = ClipAugmentation(16, 16, grayscale=0.3)
    results = [augment(clip, seeded(seed)) for seed in range(200)]
    gray = sum(torch.equal(result, to_grayscale(clip)) for result in results)
    assert 40 < gray < 80 and sum(torch.equal(result, clip) for result in results) == 200 - gray


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"crop_size": 300}, "`crop_size` is 300; allowed is 1 pixel to .* 256"),
        ({"crop_size": 0}, "`crop_size` is 0"),
        ({"crop_size": (20, 300)}, r"`crop_size` is \(20, 300\)"),
        ({"horizontal_flip": 0.5}, "`horizontal_flip` is 0.5"),
        ({"grayscale": 1.5}, "`grayscale` is 1.5; allowed is a probability"),
        ({"random_erasing": -0.1}, "`random_erasing` is -0.1"),
        ({"color_jitter": (0.5, 0.5, 0.5)}, r"`color_jitter` is \(0.5, 0.5, 0.5\); allowed are four"),
        ({"color_jitter": (0.5, 0.5, 0.5, 0.6)}, "hue at most 0.5"),
        ({"resample": 7}, "`resample` is 7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipAugmentation(**{"crop_size": 224, **arguments})


def test_bad_input_is_named():
    clip = random_clip()
    for function in (to_grayscale, horizontal_flip, lambda c: adjust_hue(c, 0.1), lambda c: adjust_brightness(c, 1.0)):
        with pytest.raises(ValueError, match=r"torch.float32 of shape"):
            function(clip.float())
    with pytest.raises(ValueError, match=r"the factor is -0.1"):
        adjust_contrast(clip, -0.1)
    with pytest.raises(ValueError, match=r"the hue shift is 0.6"):
        adjust_hue(clip, 0.6)
    with pytest.raises(TypeError, match=r"torch.Generator, not a int"):
        ClipAugmentation(8, 8)(clip, 0)
