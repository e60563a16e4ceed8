"""
The training augmentation of the published recipe, on uint8 clips, in pure torch.

A clip is a uint8 tensor (T, 3, H, W), RGB. Whatever is drawn is drawn once a clip and applied to all of its frames, so
that motion stays motion. Random numbers come from the given generator alone, and every transform draws the same number
of them whatever the clip shows and whatever the outcome: the same generator state gives the same result.

The colour operations are PIL's (factor 1 changes nothing), rounded to the nearest grey level. They compute so that no
order of summation and no fused instruction can change a result: it is the same on every machine.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..model.video_processing_dmgal import check_clip, resize_short_side, short_side_size

# The mean of the authors' normalisation, 0.45: an erased region is zero in what the model sees.
MEAN_GREY = 115


def horizontal_flip(clip: torch.Tensor) -> torch.Tensor:
    """Mirrors all frames, left to right. Shape and dtype stay: `(T, 3, H, W)` uint8."""
    check_clip(clip)
    return clip.flip(-1)


def to_grayscale(clip: torch.Tensor) -> torch.Tensor:
    """The luma of every pixel (ITU-R 601, as PIL's "L") in all three channels. Shape and dtype stay."""
    check_clip(clip)
    return _frame_by_frame(clip, luma_of)


def adjust_brightness(clip: torch.Tensor, factor: float) -> torch.Tensor:
    """
    Blends all frames with black: factor 0 is black, 1 the clip itself, 2 twice as bright. Shape and dtype stay.

    Raises:
        `ValueError`: for a negative factor.
    """
    _check_blend(clip, factor)
    return _frame_by_frame(clip, lambda frame: frame.mul_(factor))


def adjust_contrast(clip: torch.Tensor, factor: float) -> torch.Tensor:
    """As [`adjust_brightness`], with the mean of each frame's luma in place of black: factor 0 is a grey frame."""
    return _blend(clip, factor, _mean_luma)


def adjust_saturation(clip: torch.Tensor, factor: float) -> torch.Tensor:
    """As [`adjust_brightness`], with the luma of every pixel in place of black: factor 0 is [`to_grayscale`]."""
    return _blend(clip, factor, luma_of)


def adjust_hue(clip: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Turns the hue of every pixel in the HSV colour space, by a shift in turns of the colour circle from -0.5 to 0.5:
    1/3 turns red to green. Value and saturation stay, and so do shape and dtype.

    Raises:
        `ValueError`: for a shift out of that range.
    """
    check_clip(clip)
    if not -0.5 <= shift <= 0.5:
        raise ValueError(f"the hue shift is {shift!r}; allowed is -0.5 to 0.5 (turns of the colour circle)")
    starts = hue_starts(shift)
    return _frame_by_frame(clip, lambda frame: turn_hue(frame, starts))


def hue_starts(shift: float) -> list[float]:
    """
    Where on the wave of [`turn_hue`] red, green and blue begin for a shift in turns of the colour circle. All follow
    the hue along one trapezium wave of period 6; its start is chosen so that -6 <= hue + start < 6.
    """
    return [(6 * shift + offset + 5) % 6 - 5 for offset in (3, 1, -1)]


def turn_hue(frames: torch.Tensor, starts: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Turns the hue of float32 grey levels (..., 3, H, W); the three [`hue_starts`] are numbers, or of a shape that
    spreads over (..., H, W)."""
    red, green, blue = frames.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1)  # grey pixels have no hue: any will do
    # 1 where red is the largest, and where of the others green is; else 0. Products with them choose exactly, and far
    # faster than torch.where does.
    is_red = (red - value).add_(1).clamp_(min=0)
    is_green = (green - value).add_(1).clamp_(min=0)
    hue = (red - green).div_(divisor).add_(4).mul_(1 - is_green)
    hue.add_((blue - red).div_(divisor).add_(2).mul_(is_green)).mul_(1 - is_red)
    hue.add_((green - blue).div_(divisor).mul_(is_red))  # -1..5, in sixths of a turn
    result = torch.empty_like(frames)
    for channel, start in zip(result.unbind(-3), starts, strict=True):
        # Down to value - chroma within one sixth either side of the wave's middle, at value from two sixths on.
        depth = (hue + start).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.sub(value, depth.mul_(chroma), out=channel)
    return result


def _place_rectangle(
    draws: Sequence[float], frame_height: int, frame_width: int, probability: float
) -> tuple[int, int, int, int] | None:
    """
    One random rectangle to erase: top, left, height and width in pixels, from 23 draws (Zhong et al. 2020, arXiv
    1708.04896; the ranges are the customary ones, as the DMGAL authors leave theirs open).

    Area, as a part of the frame's, and height / width (on a logarithmic scale) are drawn up to ten times until a
    rectangle fits; where none does, there is none.
    """
    chance, down, right, *draws = draws
    if chance >= probability:
        return None
    for area_draw, aspect_draw in zip(draws[::2], draws[1::2], strict=True):
        pixels = _between((0.02, 1 / 3), area_draw) * frame_height * frame_width
        ratio = math.exp(_between((math.log(0.3), math.log(10 / 3)), aspect_draw))
        height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < height <= frame_height and 0 < width <= frame_width:
            return int(down * (frame_height - height + 1)), int(right * (frame_width - width + 1)), height, width
    return None


class Drawn(NamedTuple):
    """What was drawn for one clip, in the order it is applied."""

    top: int  # of the crop, in pixels of the resized frames
    left: int
    flip: bool  # mirrored
    gray: bool  # without colours
    # Number of each adjustment that has a strength (0 brightness, 1 contrast, 2 saturation, 3 hue), factor or shift.
    colors: tuple[tuple[int, float], ...]
    erased: tuple[int, int, int, int] | None  # top, left, height and width of the grey rectangle in the crop


class ClipAugmentation:
    """
    Resizes the short side, crops at random and, where asked, flips, changes colours and erases: one draw for all
    frames of a clip.

    The method trains with two of these: [`ClipAugmentation.for_support`] and [`ClipAugmentation.for_query`].
    A call consumes the same number of draws whatever is switched on, so switching one thing off leaves the others as
    they were for the same generator state.

    Args:
        crop_size (`int` or `tuple[int, int]`): side of the square crop, or (height, width), in pixels.
        resize (`int`): what the short side is resized to before, in pixels; at least the crop.
        horizontal_flip (`bool`): whether half of the clips are mirrored. Not where left and right make a class.
        grayscale (`float`): probability of losing all colour.
        color_jitter (`Sequence[float]`): strengths of brightness, contrast, saturation and hue, applied in random
            order. The first three draw a factor from `max(0, 1 - strength)` to `1 + strength`, hue a shift from
            `-strength` to `strength` (at most 0.5). 0 leaves a quantity alone.
        random_erasing (`float`): probability of erasing a rectangle.
        resample (`int`): 2 for bilinear, 3 for bicubic resizing.

    Raises:
        `ValueError`: for a value out of range, naming it.

    Example:

    ```python
    >>> import torch
    >>> from dmgal_hf.data import ClipAugmentation

    >>> augment = ClipAugmentation.for_query(crop_size=32, resize=40, horizontal_flip=True)
    >>> clip = torch.randint(256, (8, 3, 48, 64), dtype=torch.uint8)
    >>> augment(clip, torch.Generator().manual_seed(0)).shape
    torch.Size([8, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        resize: int = 256,
        horizontal_flip: bool = False,
        grayscale: float = 0.0,
        color_jitter: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        random_erasing: float = 0.0,
        resample: int = 2,
    ):
        self.height, self.width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if not 0 < min(self.height, self.width) <= max(self.height, self.width) <= resize:
            raise ValueError(
                f"`crop_size` is {crop_size!r}; allowed is 1 pixel to the short side `resize`, {resize!r}"
            )
        if not isinstance(horizontal_flip, bool):
            raise ValueError(f"`horizontal_flip` is {horizontal_flip!r}; allowed is True or False (half are mirrored)")
        for name, probability in (("grayscale", grayscale), ("random_erasing", random_erasing)):
            if not 0 <= probability <= 1:
                raise ValueError(f"`{name}` is {probability!r}; allowed is a probability, 0 to 1")
        if len(color_jitter) != 4 or min(color_jitter) < 0 or color_jitter[3] > 0.5:
            raise ValueError(
                f"`color_jitter` is {color_jitter!r}; allowed are four strengths of at least 0 (brightness, contrast, "
                "saturation, hue), hue at most 0.5"
            )
        if resample not in (2, 3):
            raise ValueError(f"`resample` is {resample!r}; allowed is 2 (bilinear) or 3 (bicubic)")
        self.resize = resize
        self.horizontal_flip = horizontal_flip
        self.grayscale = grayscale
        self.color_jitter = tuple(color_jitter)
        self.random_erasing = random_erasing
        self.resample = resample

    @classmethod
    def for_support(cls, crop_size: int = 224, resize: int = 256, resample: int = 2) -> "ClipAugmentation":
        """What the method trains supports with: short side 256, a random crop of 224 (method: "DMGAL-FT")."""
        return cls(crop_size, resize, resample=resample)

    @classmethod
    def for_query(
        cls, crop_size: int = 224, resize: int = 256, *, horizontal_flip: bool, resample: int = 2
    ) -> "ClipAugmentation":
        """
        What the method trains queries with: as the supports, and colour jitter 0.5/0.5/0.5/0.25, gray with
        probability 0.3, random erasing (method: "DMGAL-FT"; its probability of 0.5 is ours).

        `horizontal_flip` has no default: it is `True` for Kinetics, HMDB51 and UCF101, and has to be `False` for
        Something-Something and wherever else a mirrored action is another action.
        """
        return cls(crop_size, resize, horizontal_flip, 0.3, (0.5, 0.5, 0.5, 0.25), 0.5, resample)

    def __call__(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """
        Args:
            clip (`torch.ByteTensor` of shape `(T, 3, H, W)`): frames of any size; left unchanged.
            generator (`torch.Generator`): where all is drawn from (always 35 numbers).

        Returns:
            `torch.ByteTensor` of shape `(T, 3, crop height, crop width)`, contiguous.

        Raises:
            `ValueError`: for anything but such a clip.
        """
        check_clip(clip)
        return self.apply(clip, self.draw(*clip.shape[-2:], generator))

    def draw(self, height: int, width: int, generator: torch.Generator) -> Drawn:
        """What [`~ClipAugmentation.apply`] does with a clip of `height` x `width` pixels, from 35 numbers drawn."""
        height, width = short_side_size(height, width, self.resize)
        down, right, flip, gray, *draws = _draw(35, generator)
        amounts, order, erasing = draws[:4], sorted(range(4), key=draws[4:8].__getitem__), draws[8:]
        colors = []
        for number in order:
            strength, center = self.color_jitter[number], (0.0 if number == 3 else 1.0)
            if strength > 0:
                lowest = -strength if number == 3 else max(0.0, 1.0 - strength)
                colors.append((number, _between((lowest, center + strength), amounts[number])))
        return Drawn(
            int(down * (height - self.height + 1)),
            int(right * (width - self.width + 1)),
            self.horizontal_flip and flip < 0.5,
            gray < self.grayscale,
            tuple(colors),
            _place_rectangle(erasing, self.height, self.width, self.random_erasing),
        )

    def apply(self, clip: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """
        [`ClipAugmentation.__call__`] by what was drawn for the clip. [`augment_clips`] does it with many at once, for
        a GPU.
        """
        clip = resize_short_side(clip, self.resize, self.resample)
        rows, columns = slice(drawn.top, drawn.top + self.height), slice(drawn.left, drawn.left + self.width)
        clip = clip[..., rows, columns].contiguous()
        if drawn.flip:
            clip = horizontal_flip(clip)
        # Gray comes first, as in the authors' code.
        if drawn.gray:
            clip = to_grayscale(clip)
        for number, amount in drawn.colors:
            clip = ADJUSTMENTS[number](clip, amount)
        if drawn.erased:
            top, left, height, width = drawn.erased
            clip = clip.clone()  # it may be the one that was given
            clip[..., top : top + height, left : left + width] = MEAN_GREY
        return clip


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _draw(number: int, generator: torch.Generator) -> list[float]:
    """`number` draws, uniform in [0, 1)."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` is a torch.Generator, not a {type(generator).__name__}")
    return torch.rand(number, generator=generator, dtype=torch.float64).tolist()


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _check_blend(clip: torch.Tensor, factor: float) -> None:
    check_clip(clip)
    if not factor >= 0:
        raise ValueError(f"the factor is {factor!r}; allowed is 0 or more")


def _blend(clip: torch.Tensor, factor: float, grey_of: Callable[[torch.Tensor], float | torch.Tensor]) -> torch.Tensor:
    _check_blend(clip, factor)

    def adjust(frame: torch.Tensor) -> torch.Tensor:
        grey = grey_of(frame)
        return frame.sub_(grey).mul_(factor).add_(grey)

    return _frame_by_frame(clip, adjust)


def _frame_by_frame(clip: torch.Tensor, adjust: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """
    Applies `adjust`, from (3, H, W) to (3, H, W) or (1, H, W) float32 grey levels, to all frames and rounds.

    One frame after the other, because the floats of one stay in the processor's cache: several times faster than the
    whole clip at once.
    """
    result = torch.empty(clip.shape, dtype=torch.uint8, device=clip.device)
    for frame, target in zip(clip, result, strict=True):
        target.copy_(adjust(frame.float()).round_().clamp_(0, 255))
    return result


def luma_of(frames: torch.Tensor) -> torch.Tensor:
    """PIL's fixed-point luma of float32 (..., 3, H, W): (..., 1, H, W) whole numbers; all terms are whole and below
    2**24, so exact."""
    red, green, blue = frames.split(1, -3)
    luma = (red * 19595).add_(green * 38470).add_(blue * 7471).add_(32768)
    return luma.div_(65536).floor_()


def _mean_luma(frame: torch.Tensor) -> int:
    luma = luma_of(frame)
    # A sum of whole numbers in float64 is exact in any order.
    return math.floor(luma.sum(dtype=torch.float64).item() / luma.numel() + 0.5)
