"""Frames -> feature maps, whichever backbone of pictures makes them."""

from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .modeling_mga import MgaLayer
from .motion_adapters import SupportCache

# Vision towers whose last_hidden_state comes before their final norm; all others return it normalised.
_FINAL_NORM_OUTSIDE = {"clip_vision_model", "metaclip_2_vision_model", "chinese_clip_vision_model"}


def feature_maps(
    backbone: PreTrainedModel,
    frames: torch.Tensor,
    batch: tuple[int, int, int],
    cache: SupportCache | None,
    num_support: int | None = None,
    pooling: str = "mean",
    with_pooled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Frames (B·V·T, 3, H, W) of `batch` (B, V, T) -> feature maps (B, V, T, C, h, w); with the `pooling`
    "cls" the class token as a map of one patch. A stand-in of one frame is enough where the cache has tokens to resume
    with. And `with_pooled` the pooled output (B·V·T, C), else `None`.

    Where Cmga-Adapters sit in the backbone, with an empty cache the videos are supports and fill it, with a full one
    they are queries and read it, and without one the first `num_support` of an episode are its supports.
    """
    config = backbone.config
    episodes, videos, num_frames = batch
    size = tuple(frames.shape[-2:])
    grid = patch_grid(config, size)
    kwargs = {}
    if has_layers(backbone, MgaLayer):
        if cache is not None:
            num_support = 0 if len(cache) else videos
        kwargs = {"num_frames": num_frames, "num_support": (num_support,) * episodes, "patch_grid": grid,
                  "support_cache": cache}  # fmt: skip
    if getattr(config, "image_size", None) is not None and size != _pair(config.image_size):
        kwargs["interpolate_pos_encoding"] = True
    # Convolutions hand the layout of their input on, and are faster in this one.
    frames = frames.to(dtype=backbone.dtype, memory_format=torch.channels_last)
    # A backbone that is held in half precision has nothing left for autocast to decide.
    held = frames.dtype in (torch.bfloat16, torch.float16)
    if config.model_type == "siglip2_vision_model":
        frames, kwargs = _cut_into_patches(frames, _pair(config.patch_size), grid)
    with torch.autocast(frames.device.type, enabled=False) if held else nullcontext():
        output = backbone(pixel_values=frames, **kwargs)
        hidden_states, pooled = output.last_hidden_state, output.pooler_output if with_pooled else None
        if config.model_type in _FINAL_NORM_OUTSIDE:
            hidden_states = backbone.post_layernorm(hidden_states)
    if hidden_states.dim() == 4:
        return hidden_states.unflatten(0, batch), pooled
    if pooling == "cls":
        return hidden_states[:, 0, :, None, None].unflatten(0, batch), pooled
    num_prefix_tokens = hidden_states.shape[1] - grid[0] * grid[1]
    if num_prefix_tokens < 0:
        raise ValueError(
            f"the backbone {config.model_type!r} returns {hidden_states.shape[1]} tokens for {grid[0]} x "
            f"{grid[1]} patches: choose one that keeps a token a patch (ViT, CLIP, DINOv2, SigLIP), or a ResNet."
        )
    maps = hidden_states[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid)
    return maps.unflatten(0, batch), pooled


def has_layers(backbone: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in backbone.modules())


def patch_grid(backbone_config: PreTrainedConfig, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a frame of `size`, (height, width)."""
    patch = _pair(getattr(backbone_config, "patch_size", 1))
    return size[0] // patch[0], size[1] // patch[1]


def frame_size(backbone_config: PreTrainedConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a frame of this many patches."""
    patch = _pair(backbone_config.patch_size)
    return grid[0] * patch[0], grid[1] * patch[1]


def _cut_into_patches(
    frames: torch.Tensor, patch: tuple[int, int], grid: tuple[int, int]
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """What SigLIP2 of any resolution takes: frames (F, 3, H, W) -> their patches (F, P, 3·pixels), all of one grid."""
    frames = frames[..., : grid[0] * patch[0], : grid[1] * patch[1]]  # as a convolution leaves out the rest
    pixels = frames.unflatten(3, (grid[1], patch[1])).unflatten(2, (grid[0], patch[0]))
    flat = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([grid] * len(frames))  # on the CPU, where the backbone reads it
    return flat, {"pixel_attention_mask": None, "spatial_shapes": shapes}


def _pair(size: int | list | tuple) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def num_channels(backbone_config: PreTrainedConfig) -> int:
    if hasattr(backbone_config, "hidden_sizes"):
        return backbone_config.hidden_sizes[-1]
    if hasattr(backbone_config, "hidden_size"):
        return backbone_config.hidden_size
    raise ValueError(
        f"backbone_config of type {backbone_config.model_type!r} has neither hidden_size nor hidden_sizes: choose a "
        "transformers vision model such as ResNet, ViT, CLIP vision, DINOv2, DINOv3 or SigLIP vision."
    )
