"""The Smga- and Cmga-Adapters of DMGAL-Adapter: their equations, and how a batch of frames makes up episodes.

The paper (arXiv 2411.11335, section on DMGAL-Adapter) calls them simplified versions of its S-MGA and C-MGA. How they
are simplified is ours; [`SmgaAdapter`] and [`CmgaAdapter`] state the equations.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_mga import DIRECTIONS, MgaConfig


class EpisodeLayout(NamedTuple):
    """How the frames of one call make up videos and episodes (frames of a video are neighbours, then videos)."""

    num_frames: int  # T, frames a video
    num_episodes: int  # B
    num_videos: int  # videos an episode
    num_support: tuple[int, ...] | None  # the first so many videos of each episode are its supports
    grid: tuple[int, int]  # rows and columns of patches

    @property
    def only_queries(self) -> bool:
        return self.num_support is not None and not any(self.num_support)


def episode_layout(
    num_images: int,
    num_patches: int,
    num_frames: int,
    num_support: int | Sequence[int] | None = None,
    patch_grid: tuple[int, int] | None = None,
) -> EpisodeLayout:
    """
    Work out, and check, how a batch of frames is made up.

    Args:
        num_images (`int`): frames in the batch.
        num_patches (`int`): patch tokens a frame.
        num_frames (`int`): T, frames a video.
        num_support (`int` or sequence of `int`, *optional*): supports of each episode; an `int` is one episode.
        patch_grid (`tuple[int, int]`, *optional*): rows and columns of patches; `None` for a square grid.

    Raises:
        ValueError: if the batch does not hold whole videos or whole episodes of equally many videos, if an episode has
            fewer videos than supports, or if the patches do not fill the grid.
    """
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ValueError(f"num_frames={num_frames!r}: give the number of frames a video, an integer of at least 1.")
    if num_images % num_frames:
        raise ValueError(
            f"num_frames={num_frames} does not divide the batch of {num_images} images into whole videos. Pass the "
            "frames of whole videos, or `num_frames` as it is in this call (1 for still images)."
        )
    num_videos = num_images // num_frames
    if num_support is not None:
        num_support = (num_support,) if isinstance(num_support, int) else tuple(num_support)
        if not num_support or any(not isinstance(count, int) or isinstance(count, bool) for count in num_support):
            raise ValueError(f"num_support={num_support}: give one integer an episode.")
        if num_videos % len(num_support):
            raise ValueError(
                f"num_support names {len(num_support)} episodes, but the {num_videos} videos of the batch cannot be "
                "split into that many episodes of equally many videos."
            )
        num_videos //= len(num_support)
        if min(num_support) < 0 or max(num_support) > num_videos:
            raise ValueError(
                f"num_support={list(num_support)}: each of these episodes has {num_videos} videos, so give between 0 "
                f"and {num_videos} supports."
            )
    return EpisodeLayout(
        num_frames=num_frames,
        num_episodes=1 if num_support is None else len(num_support),
        num_videos=num_videos,
        num_support=num_support,
        grid=_patch_grid(num_patches, patch_grid),
    )


def _patch_grid(num_patches: int, patch_grid: tuple[int, int] | None) -> tuple[int, int]:
    if patch_grid is not None:
        if not isinstance(patch_grid, (tuple, list)) or len(patch_grid) != 2:
            raise ValueError(f"patch_grid={patch_grid!r}: give two integers, the rows and the columns of patches.")
        rows, columns = patch_grid
        if rows * columns != num_patches:
            raise ValueError(
                f"patch_grid={tuple(patch_grid)} does not hold the {num_patches} patch tokens of a frame."
            )
        return rows, columns
    side = math.isqrt(num_patches)
    if side * side != num_patches or not num_patches:
        raise ValueError(
            f"The {num_patches} patch tokens of a frame make no square grid. Pass `patch_grid=(rows, columns)` for "
            "frames that are not square; if they are, set `num_prefix_tokens` in MgaConfig to the number of class and "
            "register tokens of this backbone."
        )
    return side, side


class SupportCache(UserDict):
    """
    What the Cmga-Adapters keep of an episode's supports, so that queries can be encoded later without them.

    Used like a key-value cache: pass an empty one as `support_cache` together with the supports (`num_support` > 0)
    and the adapters fill it; pass it again with queries alone (`num_support` all 0) and they read it. Gradients flow
    through what is kept.

    It maps `"{module name}.{adapter name}"` to a dictionary of tensors, each (B, T, S·P, d): `keys_forward`,
    `keys_backward` (those of the adapter's directions) and `values`, for B episodes, T frames, at most S supports an
    episode and P patches (or squares of them, where the adapter pools). `num_support` has the number of supports of
    each episode.

    Up to the first block with a Cmga-Adapter a video is encoded alike as support and as query. With `keep_tokens` the
    tokens that enter this block are kept too, as `tokens` (N, prefix + P, D). Set as `resume` of a cache to be read,
    they take the place of what comes there, a stand-in of any number of frames: the blocks from there on see them as
    queries.

    Example:

    ```python
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTModel
    >>> from dmgal_hf import MgaConfig
    >>> from dmgal_hf.peft import SupportCache

    >>> sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    >>> vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    >>> model, cache = get_peft_model(vit, MgaConfig(reduction=2)).eval(), SupportCache()
    >>> _ = model(torch.randn(2 * 8, 3, 32, 32), num_frames=8, num_support=[2], support_cache=cache)
    >>> cache.num_support
    (2,)
    >>> query = model(torch.randn(8, 3, 32, 32), num_frames=8, num_support=[0], support_cache=cache)
    ```
    """

    def __init__(self, keep_tokens: bool = False):
        super().__init__()
        self.num_support: tuple[int, ...] | None = None
        self.keep_tokens = keep_tokens
        self.tokens: torch.Tensor | None = None
        self.resume: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"SupportCache(num_support={self.num_support}, entries={list(self)})"

    def to(self, *args: Any, **kwargs: Any) -> SupportCache:
        """Move or cast the tensors in place, as `torch.Tensor.to` would, and return the cache itself."""
        for entry in self.values():
            for name, tensor in entry.items():
                entry[name] = tensor.to(*args, **kwargs)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by flat names; empty for an empty cache. They are not detached or copied."""
        flat = {f"{key}.{name}": tensor for key, entry in self.items() for name, tensor in entry.items()}
        if self.num_support is not None:
            flat["num_support"] = torch.tensor(self.num_support)
        return flat

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> SupportCache:
        """Rebuild a cache from what [`~SupportCache.tensors`] returned."""
        cache = cls()
        for flat_name, tensor in tensors.items():
            if flat_name == "num_support":
                cache.num_support = tuple(tensor.tolist())
                continue
            key, _, name = flat_name.rpartition(".")
            cache.setdefault(key, {})[name] = tensor
        return cache

    def read(self, key: str, layout: EpisodeLayout, adapter: CmgaAdapter) -> dict[str, torch.Tensor]:
        """The entry of `adapter`, after checking that it fits the queries."""
        if key not in self:
            raise ValueError(
                f"support_cache holds nothing for '{key}' (it has: {list(self) or 'nothing'}). Fill it first, "
                "in a call with the supports and the same adapter."
            )
        entry = self[key]
        episodes, frames, keys, depth = entry["values"].shape
        most_supports = max(self.num_support)
        kept = {
            "episodes": episodes,
            "frames a video": frames,
            "patches a frame": keys // most_supports,
            "values a token": depth,
        }
        rows, columns = (-(-side // adapter.support_pooling) for side in layout.grid)
        asked = (layout.num_episodes, layout.num_frames, rows * columns, adapter.width)
        for (what, count), wanted in zip(kept.items(), asked, strict=True):
            if count != wanted:
                raise ValueError(
                    f"support_cache was filled for {count} {what}, but these queries have {wanted}. Fill it again, "
                    "with supports like these queries and an adapter of the same width and support_pooling."
                )
        return entry


class SmgaAdapter(nn.Module):
    """
    Adapter of self motion-guided attention: a patch reads the patches of its own frame that move as it does.

    With X the patch tokens of a frame entering a block, (P, D), t the frame's number in its video and dw3 a 3x3
    depthwise convolution over the patch grid (the equations are ours; motion differences in both directions giving
    the attention scores are the paper's):

        Z = X W_down                                          D -> d
        M_f, M_b = dw3(Z)[t+1] - Z[t], dw3(Z)[t-1] - Z[t]     motion; 0 where there is no such frame
        V = dw3_v(Z) + [M_f ; M_b] W_m + tconv(Z)             appearance, motion, depthwise 3-tap convolution over t
        A = softmax(LN(M) LN(M)^T / sqrt(d))                  for M_f and M_b
        Y = V + g (1/2 A_f + 1/2 A_b) V                       g: a scalar, starts at 0 as S-MGA's gamma
        X' = X + gelu(Y) W_up                                 W_up starts at 0

    The gate g is there because of measurements on motion shapes: with the attention at full strength from the first
    step on, training took longer and ended lower than with the values alone.

    Args:
        hidden_size (`int`): D, the backbone's width.
        num_prefix_tokens (`int`): tokens before the patch tokens, which pass by untouched.
        config ([`MgaConfig`]): the other choices.
    """

    def __init__(self, hidden_size: int, num_prefix_tokens: int, config: MgaConfig):
        super().__init__()
        width = config.width or hidden_size // config.reduction
        if width < 1:
            raise ValueError(
                f"MgaConfig.reduction={config.reduction} leaves nothing of the backbone's width of {hidden_size}. "
                "Give a smaller reduction, or set width."
            )
        self.width = width
        self.num_frames = config.num_frames
        self.num_prefix_tokens = num_prefix_tokens
        self.directions = DIRECTIONS[config.directions]
        self.attention = config.attention
        self.down = nn.Linear(hidden_size, width)
        self.motion_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.value_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        # Rows are frames, columns are patches: a convolution over time alone.
        self.time_conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width, bias=False)
        self.motion_value = nn.Linear(len(self.directions) * width, width, bias=False)
        if self.attention:
            self.motion_norm = nn.LayerNorm(width)
            self.gamma = nn.Parameter(torch.zeros(1) if config.init_weights else torch.ones(1))
        self.activation = ACT2FN[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(width, hidden_size)
        if config.init_weights:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: EpisodeLayout,
        supports: dict[str, torch.Tensor] | None = None,
        supports_per_episode: tuple[int, ...] | None = None,
        keep_supports: bool = False,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(N, tokens, D)`): tokens of N = B·V·T frames.
            layout ([`EpisodeLayout`]): how the frames make up videos and episodes.
            supports (`dict`, *optional*): entry of a [`SupportCache`] to read the supports from.
            supports_per_episode (`tuple[int, ...]`, *optional*): how many supports that entry has an episode.
            keep_supports (`bool`): whether to return an entry for a [`SupportCache`].

        Returns:
            What to add to the patch tokens, `(N, P, D)`, and the entry (`None` where there is none to keep). Both are
            computed in the dtype of `hidden_states`, whatever that of the weights.
        """
        # Prefix tokens are projected too and then dropped: that copies d columns a token, not D.
        tokens = _linear(self.down, hidden_states)[:, self.num_prefix_tokens :].contiguous()  # (N, P, d)
        motion = self.motion(tokens, layout)  # (N, P, directions, d)
        values = self.values(tokens, motion, layout)  # (N, P, d)
        entry = None
        if self.attention:
            keys = _layer_norm(self.motion_norm, motion)
            values, entry = self.gather(keys, values, layout, supports, supports_per_episode, keep_supports)
        return _linear(self.up, self.dropout(self.activation(values))), entry

    def motion(self, tokens: torch.Tensor, layout: EpisodeLayout) -> torch.Tensor:
        """Motion features (N, P, directions, d) of tokens (N, P, d), zero at a video's open end."""
        frames = tokens.unflatten(0, (-1, layout.num_frames))  # (videos, T, P, d)
        around = self._over_grid(self.motion_conv, tokens, layout.grid).view_as(frames)
        differences = {
            "forward": lambda: F.pad(around[:, 1:] - frames[:, :-1], (0, 0, 0, 0, 0, 1)),
            "backward": lambda: F.pad(around[:, :-1] - frames[:, 1:], (0, 0, 0, 0, 1, 0)),
        }
        return torch.stack([differences[direction]() for direction in self.directions], dim=-2).flatten(0, 1)

    def values(self, tokens: torch.Tensor, motion: torch.Tensor, layout: EpisodeLayout) -> torch.Tensor:
        """Values (N, P, d): appearance, motion, and the same patch in the frames before and after."""
        appearance = self._over_grid(self.value_conv, tokens, layout.grid)
        over_time = self._over_grid(self.time_conv, tokens, (layout.num_frames, tokens.shape[1]))
        return appearance + over_time + _linear(self.motion_value, motion.flatten(2))

    @staticmethod
    def _over_grid(convolution: nn.Conv2d, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Convolve tokens (N, P, d), seen as images of `grid`; their memory is laid out channels-last already."""
        images = tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)
        images = F.conv2d(images, convolution.weight.to(images), None, 1, convolution.padding, 1, convolution.groups)
        return images.permute(0, 2, 3, 1).reshape(tokens.shape)

    def gather(
        self, keys: torch.Tensor, values: torch.Tensor, layout: EpisodeLayout, *of_supports: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Y of keys (N, P, directions, d) and values (N, P, d): each frame reads itself, whatever the supports."""
        heads = keys.transpose(1, 2)  # the directions, with the same values
        of_heads = values.unsqueeze(1).expand(-1, heads.shape[1], -1, -1)
        read = F.scaled_dot_product_attention(heads, heads, of_heads).mean(dim=1)
        return torch.addcmul(values, self.gamma.to(values), read), None


def _linear(layer: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(inputs)
    return F.linear(inputs, layer.weight.to(inputs), bias)


def _layer_norm(norm: nn.LayerNorm, inputs: torch.Tensor) -> torch.Tensor:
    normalised = F.layer_norm(inputs, norm.normalized_shape, norm.weight.to(inputs), norm.bias.to(inputs), norm.eps)
    return normalised.to(inputs.dtype)  # autocast computes norms in float32


class CmgaAdapter(SmgaAdapter):
    """
    Adapter of cross motion-guided attention: a query's patch reads the patches of all supports of its episode, at the
    same frame number, that move as it does.

    As [`SmgaAdapter`], but for

        supports: Y = V
        queries:  Y = V + g (1/2 A_f + 1/2 A_b) V_s,   A = softmax(LN(M) LN(M_s)^T / sqrt(d)) over the S·P patches

    With `support_pooling`, queries read means of LN(M_s) and V_s over squares of patches in place of the patches; the
    squares at the far edges of a grid that they do not divide are smaller. Supports never read queries, so what
    queries need of them can be kept in a [`SupportCache`]. Without `num_support` it does what an Smga-Adapter does.
    """

    def __init__(self, hidden_size: int, num_prefix_tokens: int, config: MgaConfig):
        super().__init__(hidden_size, num_prefix_tokens, config)
        self.support_pooling = config.support_pooling

    def gather(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: EpisodeLayout,
        supports: dict[str, torch.Tensor] | None,
        supports_per_episode: tuple[int, ...] | None,
        keep_supports: bool,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        if layout.num_support is None:
            return super().gather(keys, values, layout)
        episodes = (layout.num_episodes, layout.num_videos, layout.num_frames)
        keys, values = keys.unflatten(0, episodes), values.unflatten(0, episodes)  # (B, V, T, P, ...)
        if supports is None:
            if min(layout.num_support) == 0:
                raise ValueError(
                    f"num_support={list(layout.num_support)}: an episode without supports has nothing its queries "
                    "could read. Give it supports, or pass queries alone (0 for every episode) with a filled "
                    "`support_cache`, or leave num_support out."
                )
            most = max(layout.num_support)
            supports = self._supports(keys[:, :most], values[:, :most], layout.grid)
            supports_per_episode = layout.num_support
        first_query = min(layout.num_support)
        if first_query < layout.num_videos:
            read = self.gamma.to(values) * self._read(keys[:, first_query:], supports, supports_per_episode)
            if first_query < max(layout.num_support):  # some of these videos are supports of their episode
                video = torch.arange(first_query, layout.num_videos, device=read.device)
                is_support = video < torch.tensor(layout.num_support, device=read.device)[:, None]
                read = read.masked_fill(is_support[:, :, None, None, None], 0)
            values = torch.cat((values[:, :first_query], values[:, first_query:] + read), dim=1)
        return values.flatten(0, 2), supports if keep_supports else None

    def _supports(self, keys: torch.Tensor, values: torch.Tensor, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Entry of a [`SupportCache`], frame by frame: keys (B, S, T, P, directions, d) and values (B, S, T, P, d)."""
        entry = {f"keys_{direction}": keys[..., index, :] for index, direction in enumerate(self.directions)}
        entry["values"] = values
        return {name: self._pool(tokens, grid).transpose(1, 2).flatten(2, 3) for name, tokens in entry.items()}

    def _pool(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Means of tokens (B, S, T, P, d) over squares of patches."""
        if self.support_pooling == 1:
            return tokens
        images = tokens.flatten(0, 2).unflatten(1, grid).permute(0, 3, 1, 2)
        images = F.avg_pool2d(images, self.support_pooling, ceil_mode=True)
        return images.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:3])

    def _read(
        self, keys: torch.Tensor, supports: dict[str, torch.Tensor], supports_per_episode: tuple[int, ...]
    ) -> torch.Tensor:
        """What videos with keys (B, Q, T, P, directions, d) read from the supports: (B, Q, T, P, d).

        The patches of all queries of an episode stand in one row of queries, so that no support is copied for each.
        """
        num_episodes, num_videos, num_frames, num_patches = keys.shape[:4]
        queries = keys.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1)  # (B·T, directions, Q·P, d)
        values = supports["values"].flatten(0, 1).unsqueeze(1)  # (B·T, 1, S·P, d)
        mask = None
        most = max(supports_per_episode)
        if min(supports_per_episode) < most:
            is_support = torch.arange(most, device=keys.device) < torch.tensor(
                supports_per_episode, device=keys.device
            ).unsqueeze(1)
            mask = is_support.repeat_interleave(values.shape[2] // most, dim=1)[:, None, None, None]
            mask = mask.expand(-1, num_frames, -1, -1, -1).flatten(0, 1)  # (B·T, 1, 1, S·P)
        # Direction by direction: to stack the keys would copy those of all supports for every query.
        read = 0
        for query, direction in zip(queries.split(1, dim=1), self.directions):
            support_keys = supports[f"keys_{direction}"].flatten(0, 1).unsqueeze(1)
            read = read + F.scaled_dot_product_attention(query, support_keys, values, attn_mask=mask)
        read = read / len(self.directions)
        return read.view(num_episodes, num_frames, num_videos, num_patches, -1).transpose(1, 2)
