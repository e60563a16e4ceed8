"""From videos of any kind to the pixel values that the model takes."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .extracted_frames import picture_to_rgb
from .video_decoding import VideoDecodeError, read_frames, segment_indices

# PIL's numbers, which every preprocessor_config.json of the Hub uses.
RESAMPLE_MODES = {2: "bilinear", 3: "bicubic"}


def resize(clip: torch.Tensor, height: int, width: int, resample: int = 2) -> torch.Tensor:
    """
    Resizes all frames of a clip, antialiased as PIL does it.

    On the CPU torch computes this on uint8 in fixed point. Other devices have no such kernel: there it goes through
    float32, which differs by at most one grey level.

    Args:
        clip (`torch.ByteTensor` of shape `(T, 3, H, W)`): frames in any memory layout; channels last is the fastest.
        height (`int`): height of the result in pixels.
        width (`int`): width of the result in pixels.
        resample (`int`): 2 for bilinear, 3 for bicubic (PIL's numbers).

    Returns:
        `torch.ByteTensor` of shape `(T, 3, height, width)`; the clip itself where it has that size already.

    Raises:
        `ValueError`: for anything but a uint8 clip of that shape.
    """
    check_clip(clip)
    if clip.shape[-2:] == (height, width):
        return clip
    options = {"size": (height, width), "mode": RESAMPLE_MODES[resample], "antialias": True}
    if clip.device.type == "cpu":
        return F.interpolate(clip, **options)
    return F.interpolate(clip.float(), **options).round_().clamp_(0, 255).to(torch.uint8)


def resize_short_side(clip: torch.Tensor, size: int, resample: int = 2) -> torch.Tensor:
    """
    Resizes a clip so that the shorter side of its frames is `size`, and the longer follows (rounded down to a pixel).

    Args, dtypes and errors as in [`resize`]. Returns a `torch.ByteTensor` of shape `(T, 3, H', W')`.
    """
    check_clip(clip)
    return resize(clip, *short_side_size(*clip.shape[-2:], size), resample)


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of frames of `height` x `width` after [`resize_short_side`]."""
    return (size, size * width // height) if height <= width else (size * height // width, size)


def center_crop(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """
    Cuts the middle out of all frames of a clip, as transformers does it (an odd rest leaves one pixel more at the
    bottom or right).

    Args:
        clip (`torch.ByteTensor` of shape `(T, 3, H, W)`): frames.
        height (`int`): height of the crop in pixels, at most H.
        width (`int`): width of the crop in pixels, at most W.

    Returns:
        `torch.ByteTensor` of shape `(T, 3, height, width)`: a view of the clip.

    Raises:
        `ValueError`: where the crop is larger than the frames.
    """
    check_clip(clip)
    if clip.shape[-2] < height or clip.shape[-1] < width:
        raise ValueError(
            f"the crop of {height} x {width} pixels (height x width) is larger than the frames of "
            f"{clip.shape[-2]} x {clip.shape[-1]}: resize them first, or crop less"
        )
    top, left = (clip.shape[-2] - height) // 2, (clip.shape[-1] - width) // 2
    return clip[..., top : top + height, left : left + width]


def check_clip(clip: torch.Tensor) -> None:
    """Raises `ValueError` unless `clip` is a uint8 tensor of shape (T, 3, H, W) with at least one pixel."""
    if not isinstance(clip, torch.Tensor):
        raise ValueError(f"a clip is a torch tensor of shape (T, 3, H, W), not a {type(clip).__name__}")
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or clip.numel() == 0:
        raise ValueError(
            f"a clip is a uint8 tensor of shape (T, 3, H, W), not {clip.dtype} of shape {tuple(clip.shape)}"
        )


class EpisodeFeature(BatchFeature):
    """
    The tensors of one episode, and the names of its classes.

    `label_names` is an attribute and no entry, so that `model(**episode)` takes every entry, and `.to()` keeps it:
    class n of the model's logits is `label_names[n]`.
    """

    def __init__(self, data: dict[str, Any], label_names: Sequence[Any], tensor_type: str | None = None):
        super().__init__(data, tensor_type=tensor_type)
        self.label_names = list(label_names)

    def to(self, *args, **kwargs) -> "EpisodeFeature":
        """As of a `BatchFeature`. What goes to another device than the CPU gets an entry `way`, the number of classes:
        the model then need not read it from the labels there."""
        super().to(*args, **kwargs)
        if self.data["support_labels"].device.type != "cpu":
            self.data["way"] = len(self.label_names)
        return self

    def __getstate__(self):
        return {"data": self.data, "label_names": self.label_names}

    def __setstate__(self, state):
        self.data, self.label_names = state["data"], state["label_names"]


class DmgalVideoProcessorKwargs(TypedDict, total=False):
    """The fields of `preprocessor_config.json` (`from_pretrained` takes the same names to override them)."""

    num_frames: int
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_center_crop: bool
    crop_size: dict[str, int]
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]


class DmgalVideoProcessor(BaseImageProcessor):
    """
    Reads videos, takes `num_frames` frames of each (the centres of as many equal segments), resizes, crops and
    normalises them. All of it in torch, without torchvision.

    It is a `BaseImageProcessor` and not a `BaseVideoProcessor` because the latter needs torchvision.

    Args:
        num_frames (`int`): frames a video, T.
        do_resize (`bool`): whether frames are resized.
        size (`dict` or `int`): `{"shortest_edge": pixels}` (what a plain number means) or exactly
            `{"height": pixels, "width": pixels}`.
        resample (`int`): 2 for bilinear, 3 for bicubic; both antialiased.
        do_center_crop (`bool`): whether the middle is cut out.
        crop_size (`dict` or `int`): `{"height": pixels, "width": pixels}`; a plain number is a square.
        do_rescale (`bool`): whether grey levels 0..255 are multiplied with `rescale_factor`.
        rescale_factor (`float`): usually 1/255.
        do_normalize (`bool`): whether `image_mean` is subtracted and the result divided by `image_std`.
        image_mean (`list[float]` or `float`): mean of the red, green and blue channel; 0.45 is the DMGAL authors'.
        image_std (`list[float]` or `float`): standard deviation of the three; 0.225 is the authors'.

    Raises:
        `ValueError`: for an unknown field or a value that is not allowed, naming both.

    Example:

    ```python
    >>> from dmgal_hf import DmgalVideoProcessor

    >>> processor = DmgalVideoProcessor(num_frames=8, size=72, crop_size=64)
    >>> processor(["a.mp4", "b.mp4"]).pixel_values.shape
    torch.Size([2, 8, 3, 64, 64])
    >>> episode = processor(support={"wave": ["a.mp4"], "clap": ["b.mp4"]}, query=["c.mp4"])  # for model(**episode)
    >>> episode.label_names
    ['wave', 'clap']
    ```
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = DmgalVideoProcessorKwargs

    def __init__(
        self,
        num_frames: int = 8,
        do_resize: bool = True,
        size: dict[str, int] | int = 256,
        resample: int = 2,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int = 224,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] | float = 0.45,
        image_std: Sequence[float] | float = 0.225,
        **kwargs,
    ):
        # What the loader reads from the file beside the fields.
        service = {name: kwargs.pop(name) for name in ("processor_class", "auto_map") if name in kwargs}
        kwargs.pop("image_processor_type", None)
        if kwargs:
            known = ", ".join(DmgalVideoProcessorKwargs.__annotations__)
            raise ValueError(f"DmgalVideoProcessor has no field {next(iter(kwargs))!r}; its fields are {known}")
        super().__init__(**service)
        self.num_frames = _whole_number("num_frames", num_frames)
        self.do_resize = _switch("do_resize", do_resize)
        self.size = _size("size", size, ("shortest_edge",), ("height", "width"))
        if not isinstance(resample, int) or resample not in RESAMPLE_MODES:
            raise _bad_field("resample", resample, "2 (bilinear) or 3 (bicubic)")
        self.resample = int(resample)  # may be PIL's enumeration
        self.do_center_crop = _switch("do_center_crop", do_center_crop)
        self.crop_size = _size("crop_size", crop_size, ("height", "width"))
        self.do_rescale = _switch("do_rescale", do_rescale)
        self.rescale_factor = _number("rescale_factor", rescale_factor, above_zero=True)
        self.do_normalize = _switch("do_normalize", do_normalize)
        self.image_mean = _three_numbers("image_mean", image_mean)
        self.image_std = _three_numbers("image_std", image_std, above_zero=True)
        self._check_crop_fits()

    def _check_crop_fits(self) -> None:
        if not (self.do_resize and self.do_center_crop):
            return
        height, width = (self.size.get(side, self.size.get("shortest_edge")) for side in ("height", "width"))
        if self.crop_size["height"] > height or self.crop_size["width"] > width:
            raise _bad_field("crop_size", self.crop_size, f"at most what `size` leaves of every video, {self.size}")

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs):
        """
        Builds the processor from the content of a `preprocessor_config.json`: its own, or that of an image backbone
        (`DmgalVideoProcessor.from_pretrained("openai/clip-vit-base-patch16")`), of which the fields that mean the
        same here are taken over.
        """
        if image_processor_dict.get("image_processor_type") != cls.__name__:
            image_processor_dict = _fields_of_image_processor(image_processor_dict)
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # AutoProcessor finds the class by this entry even where there is no config.json beside the file.
        return {**super().to_dict(), "processor_class": type(self).__name__}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """As in the parent class, but for `AutoProcessor`, which loads remote code by this call."""
        super().register_for_auto_class(auto_class)

    def __call__(
        self,
        videos: Any = None,
        support: Mapping[Any, Any] | None = None,
        query: Any = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Prepares videos (see [`~DmgalVideoProcessor.preprocess`]), or a whole episode
        (see [`~DmgalVideoProcessor.preprocess_episode`]) when `support` and `query` are given.
        """
        if videos is not None and support is None and query is None:
            return self.preprocess(videos, return_tensors=return_tensors)
        if videos is not None:
            raise ValueError("give either `videos`, or `support` and `query`, not both")
        if support is None:
            raise ValueError("nothing to process: give `videos`, or `support={label: [videos]}` and `query=[videos]`")
        if query is None:
            raise ValueError(
                "an episode needs `query` videos; for the supports alone call the processor with `videos`"
            )
        return self.preprocess_episode(support, query, return_tensors=return_tensors)

    def preprocess(self, videos: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """
        Prepares one or several videos.

        One video is a path, URL, bytes, file object, `{"path", "bytes"}` dict, folder or zip of JPEG frames, an array
        or tensor of frames, or a list of PIL images or of single frames (arrays (H, W, 3) or (3, H, W)). So a list
        of pictures is *one* video, and any other list, of paths for example, is one video an element: for single
        frames in files give their folder. An array or tensor of five dimensions is several videos too.

        Arrays are (T', H, W, 3) or (T', 3, H, W) with any T' (where both fit, a numpy array is read as the first and a
        tensor as the second): integers from 0 to 255, or floats from 0 to 1, which are rounded to grey levels. Colour
        is RGB; PIL images of other kinds are converted to it.

        Args:
            videos: one video or a list of them.
            return_tensors (`str`, *optional*): "pt" (also if `None`) or "np".

        Returns:
            [`BatchFeature`] with `pixel_values`, float32 of shape `(V, T, 3, H, W)`.

        Raises:
            `VideoDecodeError`: for a video that cannot be read. `ValueError` for one that is no video; both name it.
        """
        pixel_values = self._pixel_values(_list_videos(videos, "videos"))
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def preprocess_episode(
        self, support: Mapping[Any, Any], query: Any, return_tensors: str | None = "pt"
    ) -> EpisodeFeature:
        """
        Prepares one episode for the model.

        Args:
            support (`Mapping`): for each class its label and its video or videos, one or more; classes may have
                different numbers. Their order is the order of the model's logits.
            query: the video or videos to classify, as in [`~DmgalVideoProcessor.preprocess`].
            return_tensors (`str`, *optional*): "pt" (also if `None`) or "np".

        Returns:
            [`EpisodeFeature`] with `support_pixel_values` `(1, S, T, 3, H, W)`, `support_labels` `(1, S)` int64 and
            `query_pixel_values` `(1, Q, T, 3, H, W)`; the labels are its attribute `label_names`.

        Raises:
            `ValueError`: for fewer than two classes, a class without videos, or as in `preprocess`.
        """
        if not isinstance(support, Mapping):
            raise ValueError(f"`support` is a mapping of labels to videos, not a {type(support).__name__}")
        if len(support) < 2:
            raise ValueError(f"`support` has {len(support)} class(es), {list(support)}: an episode needs at least two")
        videos, labels = {}, []
        for number, (label, examples) in enumerate(support.items()):
            of_class = _list_videos(examples, f"support[{label!r}]")
            videos.update(of_class)
            labels += [number] * len(of_class)
        query = _list_videos(query, "query")
        data = {
            "support_pixel_values": self._pixel_values(videos)[None],
            "support_labels": torch.tensor([labels]),
            "query_pixel_values": self._pixel_values(query)[None],
        }
        return EpisodeFeature(data, label_names=support, tensor_type=return_tensors)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Rescales and normalises grey levels on whatever device they are: (x · rescale_factor - mean) / std, computed
        as one multiply-add, x · scale + bias.

        Args:
            pixels (`torch.Tensor` of shape `(..., 3, H, W)`): uint8, or floating grey levels 0..255.

        Returns:
            `torch.Tensor` of the same shape: float32 for uint8, else of the dtype of `pixels`.

        Raises:
            `ValueError`: for another dtype or another number of channels.
        """
        if pixels.ndim < 3 or pixels.shape[-3] != 3 or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
            raise ValueError(
                f"`pixels` are uint8 or floating, of shape (..., 3, H, W), not {pixels.dtype} of {tuple(pixels.shape)}"
            )
        factor = self.rescale_factor if self.do_rescale else 1.0
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else ([0.0] * 3, [1.0] * 3)
        # Filled in on the device: for a copy from the host, it would have to be waited for.
        scale, bias = (
            torch.stack([torch.full((1, 1), number, dtype=torch.float32, device=pixels.device) for number in numbers])
            for numbers in ([factor / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)])
        )
        # The mixed dtypes are meant: no float copy of the pixels is made before the result.
        normalized = torch.addcmul(bias, pixels, scale)
        return normalized.to(pixels.dtype) if pixels.is_floating_point() else normalized

    def _pixel_values(self, videos: dict[str, Any]) -> torch.Tensor:
        """Videos by the names that errors call them -> (V, T, 3, H, W) float32."""
        clips = {name: self.resize_and_crop(self._sample(video, name), name) for name, video in videos.items()}
        sizes = {clip.shape[-2:]: f"{clip.shape[-2]} x {clip.shape[-1]} ({name})" for name, clip in clips.items()}
        if len(sizes) > 1:
            raise ValueError(
                f"the videos come out in different sizes, {', '.join(sizes.values())}: set do_center_crop=True, "
                'or size={"height": ..., "width": ...} with do_resize=True, or process them one by one'
            )
        return self.normalize(torch.stack([clip.contiguous() for clip in clips.values()]))

    def _sample(self, video: Any, name: str) -> torch.Tensor:
        """One video -> `num_frames` of its frames, (T, 3, H, W) uint8."""
        if isinstance(video, Image.Image):
            raise ValueError(f"{name} is a single picture: a video of one frame is a list, [picture]")
        if isinstance(video, (np.ndarray, torch.Tensor)):
            if video.ndim != 4:
                raise ValueError(f"{name} is an array of shape {tuple(video.shape)}; a video has four dimensions")
            return _array_to_clip(video, self.num_frames, name)
        if _is_list(video):
            return _pictures_to_clip(video, self.num_frames, name)
        if type(video).__name__ == "VideoDecoder":  # of torchcodec, which datasets.Video gives
            raise ValueError(
                f"{name} is a VideoDecoder, a row that is decoded already: read rows of "
                "`dataset.cast_column(column, datasets.Video(decode=False))`"
            )
        try:
            return read_frames(video, self.num_frames)
        except VideoDecodeError as error:
            if error.source != "<bytes>":
                raise
            raise VideoDecodeError(f"{name} <bytes>", error.problem, error.remedy) from error

    def resize_and_crop(self, clip: torch.Tensor, name: str = "the clip") -> torch.Tensor:
        """
        Resizes and crops one clip as the fields say, without normalising it.

        Args:
            clip (`torch.ByteTensor` of shape `(T, 3, H, W)`): frames of any size.
            name (`str`): how an error names the clip.

        Returns:
            `torch.ByteTensor` of shape `(T, 3, crop height, crop width)`.

        Raises:
            `ValueError`: for frames smaller than the crop.
        """
        if self.do_resize and "shortest_edge" in self.size:
            clip = resize_short_side(clip, self.size["shortest_edge"], self.resample)
        elif self.do_resize:
            clip = resize(clip, self.size["height"], self.size["width"], self.resample)
        if not self.do_center_crop:
            return clip
        try:
            return center_crop(clip, self.crop_size["height"], self.crop_size["width"])
        except ValueError as error:
            raise ValueError(f"{name}: {error} (the processor has do_resize={self.do_resize})") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview))


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim in (2, 3))


def undecoded_column(column: Any) -> Any:
    """A column of a `datasets.Dataset`; videos in it become {"path", "bytes"}, which the processor reads itself."""
    datasets = sys.modules["datasets"]  # no import: this file also works where it is not installed
    if hasattr(column, "features"):
        feature = column.features
    else:  # of a stream, which may not know its own
        feature = (column.source.features or {}).get(column.column_name)
    if not isinstance(feature, datasets.Video) or not feature.decode:
        return column
    return column.source.cast_column(column.column_name, datasets.Video(decode=False))[column.column_name]


def _list_videos(videos: Any, name: str) -> dict[str, Any]:
    """One video or several -> each by the name that errors call it."""
    if "datasets" in sys.modules and isinstance(videos, sys.modules["datasets"].arrow_dataset.Column):
        videos = list(undecoded_column(videos))
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim == 5:
        videos = list(videos)
    if not _is_list(videos):
        return {name: videos}
    pictures = [_is_picture(video) for video in videos]
    if not pictures:
        raise ValueError(f"`{name}` is empty: give at least one video")
    if all(pictures):
        return {name: videos}
    if any(pictures):
        raise ValueError(f"`{name}` mixes videos with single pictures (first at {pictures.index(True)})")
    return {f"{name}[{number}]": video for number, video in enumerate(videos)}


def _pictures_to_clip(pictures: Sequence[Any], num_frames: int, name: str) -> torch.Tensor:
    """A list of PIL images or single frames -> (num_frames, 3, H, W) uint8; only the frames taken are converted."""
    for number, picture in enumerate(pictures):
        if not _is_picture(picture):
            raise ValueError(
                f"{name} is a list, so a video given by its frames; but its frame {number} is a "
                f"{type(picture).__name__}, not a PIL image or an array"
            )
    if not pictures:
        raise ValueError(f"{name} is a list without frames")
    frames = []
    for number in segment_indices(len(pictures), num_frames):
        picture = pictures[number]
        if isinstance(picture, Image.Image):
            if picture.mode.startswith(("I", "F")):
                raise ValueError(
                    f"frame {number} of {name} has PIL mode {picture.mode!r}: convert it to 8 bits a channel"
                )
            picture = picture_to_rgb(picture)
        frames.append(picture)
    if len({tuple(frame.shape) for frame in frames}) > 1:
        shapes = sorted({tuple(frame.shape) for frame in frames})
        raise ValueError(f"the frames of {name} have different shapes, {shapes}")
    tensors = all(isinstance(frame, torch.Tensor) for frame in frames)
    return _array_to_clip(torch.stack(frames) if tensors else np.stack(frames), num_frames, name)


def _array_to_clip(video: np.ndarray | torch.Tensor, num_frames: int, name: str) -> torch.Tensor:
    """An array (T', H, W, 3) or (T', 3, H, W) -> (num_frames, 3, H, W) uint8."""
    axes = [axis for axis in (1, 3) if video.ndim == 4 and video.shape[axis] == 3]
    if not axes or 0 in video.shape:
        raise ValueError(
            f"{name} has the shape {tuple(video.shape)}; a video is (T, H, W, 3) or (T, 3, H, W), three colours and "
            "at least one frame"
        )
    channel_axis = axes[0] if isinstance(video, torch.Tensor) else axes[-1]
    # Indexing copies, so what follows is writable and has positive strides whatever came in.
    video = video[segment_indices(len(video), num_frames)]
    clip = _to_uint8(torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video), name)
    return clip.permute(0, 3, 1, 2) if channel_axis == 3 else clip


def _to_uint8(pixels: torch.Tensor, name: str) -> torch.Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool or pixels.is_complex():
        raise ValueError(f"{name} has the dtype {pixels.dtype}; pixels are integers 0..255 or floats 0..1")
    if not pixels.is_floating_point():
        pixels = pixels.long()  # torch knows no minimum of unsigned numbers of 16 bits and more
    low, high = pixels.amin().item(), pixels.amax().item()
    limit = 1 if pixels.is_floating_point() else 255
    if not (low >= 0 and high <= limit):
        raise ValueError(
            f"{name} has values from {low} to {high} in {pixels.dtype}; allowed are integers 0..255 or floats 0..1: "
            "convert it to uint8"
        )
    return pixels.to(torch.uint8) if limit == 255 else pixels.mul(255).round_().to(torch.uint8)


def _fields_of_image_processor(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an image model's processor that mean the same here."""
    shared = {name: fields[name] for name in DmgalVideoProcessorKwargs.__annotations__ if fields.get(name) is not None}
    if "max_num_patches" in fields:  # SigLIP2 of any resolution: the largest square
        side = math.isqrt(fields["max_num_patches"]) * fields["patch_size"]
        return {**shared, "size": {"height": side, "width": side}, "do_center_crop": False}
    if shared.get("do_center_crop") or "size" not in shared:
        return shared
    size = shared["size"]
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if "crop_pct" in fields and edge is not None and edge < 384:
        # ConvNeXT's and ResNet's: `size` is what the crop leaves of a picture resized to size / crop_pct.
        resized = int(edge / (fields["crop_pct"] or 224 / 256))
        return {**shared, "size": resized, "do_center_crop": True, "crop_size": edge}
    if isinstance(size, int) or "crop_pct" in fields:
        # Without a crop, one number means a square.
        shared["size"] = {"height": edge, "width": edge}
    return {**shared, "do_center_crop": False}


def _bad_field(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"DmgalVideoProcessor: `{name}` is {value!r}; allowed is {allowed}")


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad_field(name, value, "True or False")
    return value


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad_field(name, value, "a whole number of at least 1")
    return value


def _number(name: str, value: Any, above_zero: bool = False, shown: Any = None) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (above_zero and value <= 0):
        allowed = "a number above 0" if above_zero else "a finite number"
        raise _bad_field(name, value if shown is None else shown, allowed)
    return float(value)


def _three_numbers(name: str, value: Any, above_zero: bool = False) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3:
        raise _bad_field(name, value, "one number, or one each for red, green and blue")
    return [_number(name, channel, above_zero, shown=value) for channel in values]


def _size(name: str, value: Any, *allowed: tuple[str, ...]) -> dict[str, int]:
    """A size as a dict with one of the `allowed` sets of keys; a plain number stands for all keys of the first."""
    if isinstance(value, int):
        value = dict.fromkeys(allowed[0], value)
    if not isinstance(value, Mapping) or set(value) not in [set(keys) for keys in allowed]:
        raise _bad_field(name, value, "a number of pixels or a dict with the keys " + ", or ".join(map(str, allowed)))
    return {key: _whole_number(f"{name}[{key}]", pixels) for key, pixels in value.items()}
