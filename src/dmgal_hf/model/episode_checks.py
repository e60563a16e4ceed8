"""What the tensors of an episode must be; the messages say which is not, and what to do."""

import torch


def check_videos(name: str, pixel_values: torch.Tensor, num_frames: int | None):
    """`num_frames`: those that the mixer of a model is made for, `None` without a mixer."""
    if pixel_values.dim() != 6 or pixel_values.shape[3] != 3:
        raise ValueError(
            f"{name} must have the shape (episodes, videos, frames, 3, height, width), got "
            f"{tuple(pixel_values.shape)}. A single episode needs a leading 1."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(f"{name} must be floating, got {pixel_values.dtype}: prepare it with the video processor.")
    if 0 in pixel_values.shape:
        raise ValueError(f"{name} is empty: its shape is {tuple(pixel_values.shape)}.")
    if num_frames is not None and pixel_values.shape[2] != num_frames:
        raise ValueError(
            f"{name} has {pixel_values.shape[2]} frames a video, but the mixer of this model is made for "
            f"num_frames={num_frames}."
        )


def check_support_labels(
    labels: torch.Tensor | None, pixel_values: torch.Tensor, way: int | None, may_lack_clips: bool
) -> int:
    """Returns the way. `may_lack_clips`: where it is given, some classes may have text alone."""
    _check_labels("support_labels", labels, pixel_values)
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        way = int(labels.max()) + 1 if way is None else way
        torch._check(way >= 1)
        return way
    episodes = labels.tolist()
    lowest, highest = min(map(min, episodes)), max(map(max, episodes))
    if lowest < 0:
        raise ValueError(f"support_labels must be 0 or more, got {lowest}.")
    given, way = way is not None, highest + 1 if way is None else way
    if highest >= way:
        raise ValueError(f"support_labels must lie in 0..{way - 1}, got {highest}.")
    for number, classes in enumerate(() if may_lack_clips and given else map(set, episodes)):
        if missing := set(range(way)) - classes:
            raise ValueError(
                f"support_labels must use every class from 0 to {way - 1}: episode {number} has no support of "
                f"class {min(missing)}. Number its classes without gaps."
            )
    return way


def check_queries(pixel_values: torch.Tensor, labels: torch.Tensor | None, support_shape: torch.Size, way: int):
    episodes, _, num_frames = support_shape[:3]
    if (pixel_values.shape[0], pixel_values.shape[2]) != (episodes, num_frames):
        raise ValueError(
            f"query_pixel_values has {pixel_values.shape[0]} episodes of {pixel_values.shape[2]} frames a video, "
            f"the supports have {episodes} of {num_frames}: both must agree."
        )
    if labels is None:
        return
    _check_labels("labels", labels, pixel_values)
    if torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    numbers = [number for of_episode in labels.tolist() for number in of_episode]
    lowest, highest = min(numbers), max(numbers)
    if lowest < 0 or highest >= way:
        raise ValueError(f"labels must lie in 0..{way - 1}, the classes of the supports, got {lowest}..{highest}.")


def check_text_embeds(text_embeds: torch.Tensor, episodes: int, way: int):
    if text_embeds.dim() != 3 or text_embeds.shape[:2] != (episodes, way):
        raise ValueError(
            f"text_embeds must have the shape ({episodes}, {way}, E), a prototype for each "
            f"class of each episode, got {tuple(text_embeds.shape)}."
        )


def _check_labels(name: str, labels: torch.Tensor | None, pixel_values: torch.Tensor):
    shape = tuple(pixel_values.shape[:2])
    if labels is None:
        raise ValueError(f"{name} is missing: pass one class number a video, shape {shape}.")
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, one a video, got {tuple(labels.shape)}.")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {labels.dtype}.")
