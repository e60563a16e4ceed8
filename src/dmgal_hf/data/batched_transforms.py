"""
[`ClipAugmentation`] of many clips at once, in few operations that no host waits for: for a GPU.

With the same draws it does the same as [`ClipAugmentation.apply`] clip by clip: the colours by the same steps to the
same bits; resizing in float32, which torch does in fixed point on a CPU: one grey level apart at most, bicubic two.
"""

import torch

from ..model.video_processing_dmgal import short_side_size
from .transforms import MEAN_GREY, ClipAugmentation, Drawn, hue_starts, luma_of, turn_hue

_UNCHANGED = (1.0, 0.0, 0.0)  # a blend with factor 1
_NUM_BLENDS = 7  # gray, three before the hue is turned, three after


def as_numbers(drawn: Drawn, height: int, width: int, augmentation: ClipAugmentation) -> torch.Tensor:
    """
    What was drawn for a clip of `height` x `width` pixels, as [`augment_clips`] takes it.

    Gray and every adjustment but hue blend the frames with a grey, factor · (frame - grey) + grey, where the grey is
    0, the mean luma of the frame, or the luma of every pixel. So in whatever order, a clip undergoes at most three
    blends, a turn of the hue and at most three blends; what it lacks is a blend that changes nothing.

    Returns:
        float64 of shape `(35,)`: height and width before and after resizing; top, left and flip; factor, part of the
        mean and part of the luma of seven blends; three starts of the hue; the erased rectangle.
    """
    blends, position, shift = [_UNCHANGED] * _NUM_BLENDS, 1, 0.0
    if drawn.gray:
        blends[0] = (0.0, 0.0, 1.0)
    for number, amount in drawn.colors:
        if number == 3:
            shift, position = amount, 4
        else:
            blends[position] = (amount, float(number == 1), float(number == 2))
            position += 1
    resized = short_side_size(height, width, augmentation.resize)
    numbers = [height, width, *resized, drawn.top, drawn.left, drawn.flip]
    numbers += [number for blend in blends for number in blend]
    return torch.tensor([*numbers, *hue_starts(shift), *(drawn.erased or (0, 0, 0, 0))], dtype=torch.float64)


def augment_clips(clips: torch.Tensor, numbers: torch.Tensor, augmentation: ClipAugmentation) -> torch.Tensor:
    """
    Does with every clip what was drawn for it, on whatever device the clips are.

    Args:
        clips (`torch.ByteTensor` of shape `(V, T, 3, H, W)`): frames, each clip in the top left of H x W pixels.
        numbers (`torch.Tensor` of shape `(V, 35)`): [`as_numbers`] of every clip, float64, on the same device.
        augmentation ([`ClipAugmentation`]): what it was drawn by.

    Returns:
        `torch.ByteTensor` of shape `(V, T, 3, crop height, crop width)`.
    """
    sizes, blends, starts, rectangles = numbers.split((7, 3 * _NUM_BLENDS, 3, 4), 1)
    frames = _resize_and_crop(clips, sizes, augmentation)
    blends = blends.float().unflatten(1, (_NUM_BLENDS, 3, 1, 1, 1, 1)).movedim(0, 2)  # (7, 3, V, 1, 1, 1, 1)
    if augmentation.grayscale > 0:
        _blend(frames, *blends[0])
    *strengths, hue = augmentation.color_jitter
    before, after = (blends[1:4], blends[4:]) if any(strengths) else ((), ())
    for blend in before:
        _blend(frames, *blend)
    if hue > 0:
        frames = turn_hue(frames, starts.float()[..., None, None, None].unbind(1)).round_().clamp_(0, 255)
        for blend in after:
            _blend(frames, *blend)
    if augmentation.random_erasing > 0:
        frames.masked_fill_(_inside(rectangles, *frames.shape[-2:])[:, None, None], MEAN_GREY)
    return frames.to(torch.uint8)


def _blend(frames: torch.Tensor, factor: torch.Tensor, on_mean: torch.Tensor, on_luma: torch.Tensor) -> None:
    """Blends (V, T, 3, H, W) grey levels in place, each clip with its own (V, 1, 1, 1, 1) numbers."""
    luma = luma_of(frames)
    # A sum of whole numbers in float64 is exact in any order.
    mean = luma.sum((-2, -1), keepdim=True, dtype=torch.float64).div_(luma.shape[-2] * luma.shape[-1])
    grey = luma.mul_(on_luma).add_(mean.add_(0.5).floor_().float().mul_(on_mean))
    frames.sub_(grey).mul_(factor).add_(grey).round_().clamp_(0, 255)


def _resize_and_crop(clips: torch.Tensor, sizes: torch.Tensor, augmentation: ClipAugmentation) -> torch.Tensor:
    """
    (V, T, 3, H, W) uint8 -> (V, T, 3, h, w) float32 grey levels.

    An antialiased resize is a product with one matrix along each side, a crop takes some of their columns, a mirror
    turns them round: two products for clips of any sizes. Across first, rounded after each, halves up, as PIL and
    torch do it.
    """
    heights, widths, resized_heights, resized_widths, tops, lefts, flips = sizes.unbind(1)
    rows = torch.arange(augmentation.height, dtype=torch.float64, device=clips.device)
    columns = torch.arange(augmentation.width, dtype=torch.float64, device=clips.device)
    columns = torch.where(flips[:, None] > 0, columns.flip(0), columns)
    across = _resampling(widths, resized_widths, columns + lefts[:, None], clips.shape[-1], augmentation.resample)
    down = _resampling(heights, resized_heights, rows + tops[:, None], clips.shape[-2], augmentation.resample)
    frames = clips.to(torch.float32, memory_format=torch.contiguous_format).flatten(1, 3)  # (V, T·3·H, W)
    frames = (frames @ across).add_(0.5).floor_().clamp_(0, 255)
    frames = frames.unflatten(1, (-1, clips.shape[-2]))  # (V, T·3, H, w)
    frames = (down.mT[:, None] @ frames).add_(0.5).floor_().clamp_(0, 255)
    return frames.unflatten(1, clips.shape[1:3])


def _resampling(
    lengths: torch.Tensor, resized: torch.Tensor, taken: torch.Tensor, longest: int, resample: int
) -> torch.Tensor:
    """
    The weights of torch's antialiased `interpolate` (and PIL's).

    Args:
        lengths, resized (`torch.Tensor` of shape `(V,)`): pixels of a side before and after.
        taken (`torch.Tensor` of shape `(V, n)`): which pixels of the resized side are wanted.
        longest (`int`): length of the axis that the sides lie on.
        resample (`int`): 2 for bilinear, 3 for bicubic.

    Returns:
        float32 of shape `(V, longest, n)`: every column sums to 1.
    """
    scale = (lengths / resized)[:, None, None]
    pixels = torch.arange(longest, dtype=torch.float64, device=lengths.device)[:, None] + 0.5
    distance = ((pixels - scale * (taken[:, None] + 0.5)) / scale.clamp(min=1)).abs_()
    if resample == 2:
        weights = (1 - distance).clamp_(min=0)
    else:  # Keys' cubic with a = -0.5, as PIL has it
        near, far = (1.5 * distance - 2.5) * distance**2 + 1, ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * (pixels < lengths[:, None, None])
    return (weights / weights.sum(1, keepdim=True)).float()


def _inside(rectangles: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(V, 4) top, left, height and width -> (V, height, width), true inside."""
    tops, lefts, heights, widths = rectangles[..., None].unbind(1)
    rows, columns = (torch.arange(size, device=rectangles.device) for size in (height, width))
    rows, columns = (rows >= tops) & (rows < tops + heights), (columns >= lefts) & (columns < lefts + widths)
    return rows[:, :, None] & columns[:, None]
