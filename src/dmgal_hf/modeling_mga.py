"""Motion-guided adapters (MGA): the Smga- and Cmga-Adapters of DMGAL-Adapter as a PEFT method.

The paper (arXiv 2411.11335, section on DMGAL-Adapter) places "Smga-Adapters" in the early layers of a frozen image
transformer and a "Cmga-Adapter" in the last, as simplified versions of its S-MGA and C-MGA. How they are simplified is
ours; [`SmgaAdapter`] and [`CmgaAdapter`] state the equations.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_mga import DIRECTIONS, MGA, MgaConfig

# Keyword arguments of the model's forward that the adapters read and the backbone never sees.
EPISODE_FACTS = ("num_frames", "num_support", "patch_grid", "support_cache")

# Tokens before the patch tokens, not counting register tokens, by `config.model_type`.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
}

WHY_NOT_MERGED = (
    "MGA adapters cannot be merged into the backbone: they compare neighbouring frames and gather patches from a "
    "whole video or episode, and no weight of the backbone can express that. Keep the adapter, or remove it with "
    "`unload()`."
)


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


class SupportCache:
    """
    What the Cmga-Adapters keep of an episode's supports, so that queries can be encoded later without them.

    Used like a key-value cache: pass an empty one as `support_cache` together with the supports (`num_support` > 0)
    and the adapters fill it; pass it again with queries alone (`num_support` all 0) and they read it. Gradients flow
    through what is kept.

    It maps `"{module name}.{adapter name}"` to a dictionary of tensors, each (B, T, S·P, d): `keys_forward`,
    `keys_backward` (those of the adapter's directions) and `values`, for B episodes, T frames, at most S supports an
    episode and P patches. `num_support` has the number of supports of each episode.
    """

    def __init__(self):
        self.entries: dict[str, dict[str, torch.Tensor]] = {}
        self.num_support: tuple[int, ...] | None = None

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        return self.entries[key]

    def __setitem__(self, key: str, entry: dict[str, torch.Tensor]) -> None:
        self.entries[key] = entry

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return f"SupportCache(num_support={self.num_support}, entries={list(self.entries)})"

    def to(self, *args: Any, **kwargs: Any) -> SupportCache:
        """Move or cast the tensors in place, as `torch.Tensor.to` would, and return the cache itself."""
        for entry in self.entries.values():
            for name, tensor in entry.items():
                entry[name] = tensor.to(*args, **kwargs)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by flat names; empty for an empty cache. They are not detached or copied."""
        flat = {f"{key}.{name}": tensor for key, entry in self.entries.items() for name, tensor in entry.items()}
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
            cache.entries.setdefault(key, {})[name] = tensor
        return cache

    def read(self, key: str, layout: EpisodeLayout, width: int) -> dict[str, torch.Tensor]:
        """The entry of one adapter, after checking that it fits the queries."""
        if key not in self.entries:
            raise ValueError(
                f"support_cache holds nothing for '{key}' (it has: {list(self.entries) or 'nothing'}). Fill it first, "
                "in a call with the supports and the same adapter."
            )
        entry = self.entries[key]
        episodes, frames, keys, depth = entry["values"].shape
        most_supports = max(self.num_support)
        kept = {
            "episodes": episodes,
            "frames a video": frames,
            "patches a frame": keys // most_supports,
            "values a token": depth,
        }
        asked = (layout.num_episodes, layout.num_frames, math.prod(layout.grid), width)
        for (what, count), wanted in zip(kept.items(), asked, strict=True):
            if count != wanted:
                raise ValueError(f"support_cache was filled for {count} {what}, but these queries have {wanted}.")
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
            What to add to the patch tokens, `(N, P, D)`, and the entry (`None` where there is none to keep).
        """
        # Prefix tokens are projected too and then dropped: that copies d columns a token, not D.
        tokens = self.down(hidden_states)[:, self.num_prefix_tokens :].contiguous()  # (N, P, d)
        motion = self.motion(tokens, layout)  # (N, P, directions, d)
        values = self.values(tokens, motion, layout)  # (N, P, d)
        entry = None
        if self.attention:
            keys = self.motion_norm(motion).to(values.dtype)
            values, entry = self.gather(keys, values, layout, supports, supports_per_episode, keep_supports)
        return self.up(self.dropout(self.activation(values))), entry

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
        return appearance + over_time + self.motion_value(motion.flatten(2))

    @staticmethod
    def _over_grid(convolution: nn.Conv2d, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Convolve tokens (N, P, d), seen as images of `grid`; their memory is laid out channels-last already."""
        images = tokens.reshape(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)
        return convolution(images).permute(0, 2, 3, 1).reshape(tokens.shape)

    def gather(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: EpisodeLayout,
        supports: dict[str, torch.Tensor] | None,
        supports_per_episode: tuple[int, ...] | None,
        keep_supports: bool,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Y of keys (N, P, directions, d) and values (N, P, d): each frame reads itself."""
        return values + self.gamma * self._attend(keys.transpose(1, 2), keys.transpose(1, 2), values), None

    @staticmethod
    def _attend(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean over the directions (as heads with the same values) of softmax(Q K^T / sqrt(d)) V."""
        values = values.unsqueeze(1).expand(-1, keys.shape[1], -1, -1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).mean(dim=1)


class CmgaAdapter(SmgaAdapter):
    """
    Adapter of cross motion-guided attention: a query's patch reads the patches of all supports of its episode, at the
    same frame number, that move as it does.

    As [`SmgaAdapter`], but for

        supports: Y = V
        queries:  Y = V + g (1/2 A_f + 1/2 A_b) V_s,   A = softmax(LN(M) LN(M_s)^T / sqrt(d)) over the S·P patches

    Supports never read queries, so what queries need of them can be kept in a [`SupportCache`]. Without `num_support`
    it does what an Smga-Adapter does.
    """

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
            return super().gather(keys, values, layout, supports, supports_per_episode, keep_supports)
        episodes = (layout.num_episodes, layout.num_videos, layout.num_frames)
        keys, values = keys.unflatten(0, episodes), values.unflatten(0, episodes)  # (B, V, T, P, ...)
        if supports is None:
            if min(layout.num_support) == 0:
                raise ValueError(
                    f"num_support={list(layout.num_support)}: an episode without supports has nothing its queries "
                    "could read. Give it supports, or pass queries alone (0 for every episode) with a filled "
                    "`support_cache`, or leave num_support out."
                )
            supports, supports_per_episode = self._supports(keys, values, max(layout.num_support)), layout.num_support
        first_query = min(layout.num_support)
        if first_query < layout.num_videos:
            read = self.gamma * self._read(keys[:, first_query:], supports, supports_per_episode)
            if first_query < max(layout.num_support):  # some of these videos are supports of their episode
                video = torch.arange(first_query, layout.num_videos, device=read.device)
                is_support = video < torch.tensor(layout.num_support, device=read.device)[:, None]
                read = read.masked_fill(is_support[:, :, None, None, None], 0)
            values = torch.cat((values[:, :first_query], values[:, first_query:] + read), dim=1)
        return values.flatten(0, 2), supports if keep_supports else None

    def _supports(self, keys: torch.Tensor, values: torch.Tensor, num_support: int) -> dict[str, torch.Tensor]:
        """Entry of a [`SupportCache`]: keys and values of the first videos of each episode, frame by frame."""
        keys, values = keys[:, :num_support].transpose(1, 2), values[:, :num_support].transpose(1, 2)
        entry = {
            f"keys_{direction}": keys[..., index, :].flatten(2, 3) for index, direction in enumerate(self.directions)
        }
        return entry | {"values": values.flatten(2, 3)}

    def _read(
        self, keys: torch.Tensor, supports: dict[str, torch.Tensor], supports_per_episode: tuple[int, ...]
    ) -> torch.Tensor:
        """What videos with keys (B, Q, T, P, directions, d) read from the supports: (B, Q, T, P, d).

        The patches of all queries of an episode stand in one row of queries, so that no support is copied for each.
        """
        num_episodes, num_videos, num_frames, num_patches = keys.shape[:4]
        queries = keys.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1)  # (B·T, directions, Q·P, d)
        support_keys = torch.stack([supports[f"keys_{direction}"] for direction in self.directions], dim=2)
        mask = None
        most = max(supports_per_episode)
        if min(supports_per_episode) < most:
            is_support = torch.arange(most, device=keys.device) < torch.tensor(
                supports_per_episode, device=keys.device
            ).unsqueeze(1)
            mask = is_support.repeat_interleave(num_patches, dim=1)[:, None, None, None]
            mask = mask.expand(-1, num_frames, -1, -1, -1).flatten(0, 1)  # (B·T, 1, 1, S·P)
        read = self._attend(queries, support_keys.flatten(0, 1), supports["values"].flatten(0, 1), mask)
        return read.view(num_episodes, num_frames, num_videos, num_patches, -1).transpose(1, 2)


class EpisodeFactsCarrier:
    """
    Brings the episode facts to the adapters in models that do not hand keyword arguments on to their blocks.

    A pair of forward hooks on the model takes the facts from the call's keyword arguments and drops them when the call
    ends. They are kept by thread, so calls in several threads do not meet.
    """

    def __init__(self):
        self.calls: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self.hooks = []
        self.entries: list[str] = []

    def attach(self, name: str, module: nn.Module) -> None:
        if name in self.entries:
            return
        self.entries.append(name)
        self.hooks.append(module.register_forward_pre_hook(self.take, with_kwargs=True))
        self.hooks.append(module.register_forward_hook(self.drop, always_call=True))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        facts = {name: value for name, value in kwargs.items() if name in EPISODE_FACTS}
        if not facts:
            return None
        self.calls[get_ident()] = (module, facts)
        return args, {name: value for name, value in kwargs.items() if name not in facts}

    def drop(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.calls and self.calls.get(get_ident(), (None,))[0] is module:
            del self.calls[get_ident()]

    def facts(self) -> dict[str, Any]:
        return self.calls[get_ident()][1] if get_ident() in self.calls else {}


class MgaLayer(nn.Module, BaseTunerLayer):
    """
    A transformer block (`base_layer`) with the adapters that change the patch tokens entering it.

    `forward` takes, beside the block's own arguments, the episode facts, and keeps them from the block:

        num_frames (`int`): T, frames a video; default is the adapter's `MgaConfig.num_frames`.
        num_support (`int` or sequence of `int`): the first so many videos of each episode are its supports, the
            others its queries; one number an episode (an `int` for one episode). All episodes of a call have equally
            many videos. Without it, Cmga-Adapters do what Smga-Adapters do.
        patch_grid (`tuple[int, int]`): rows and columns of patches, for frames that are not square.
        support_cache ([`SupportCache`]): to fill (with supports) or to read (with queries alone).
    """

    adapter_layer_names = ("mga_adapter",)

    def __init__(self, base_layer: nn.Module, module_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.mga_adapter = nn.ModuleDict()
        self.facts_carrier: EpisodeFactsCarrier | None = None
        self._disable_adapters = False
        self.merged_adapters = []

    def update_layer(
        self, adapter_name: str, config: MgaConfig, hidden_size: int, num_prefix_tokens: int, cross: bool
    ) -> None:
        adapter_class = CmgaAdapter if cross else SmgaAdapter
        adapter = adapter_class(hidden_size, num_prefix_tokens, config)
        self.mga_adapter[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def take_over(self, other: MgaLayer) -> None:
        """Carry the adapters of another layer around the same block."""
        self.mga_adapter = other.mga_adapter
        self.facts_carrier = other.facts_carrier
        self._disable_adapters = other._disable_adapters
        self._active_adapter = other._active_adapter

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # A block has no `weight` of its own to ask, as peft's layers do.
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return None, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unmerge(self) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        facts = {name: kwargs.pop(name) for name in EPISODE_FACTS if name in kwargs}
        if self.facts_carrier is not None:
            facts = self.facts_carrier.facts() | facts
        if not self.disable_adapters:
            hidden_states = self.adapt(hidden_states, **facts)
        return self.base_layer(hidden_states, *args, **kwargs)

    def adapt(
        self,
        hidden_states: torch.Tensor,
        num_frames: int | None = None,
        num_support: int | Sequence[int] | None = None,
        patch_grid: tuple[int, int] | None = None,
        support_cache: SupportCache | None = None,
    ) -> torch.Tensor:
        """Tokens (N, prefix + P, D) with the changes of all active adapters added to the patch tokens."""
        if hidden_states.dim() != 3:
            raise ValueError(
                f"'{self.module_name}' was given {tuple(hidden_states.shape)}; MGA adapters need a transformer block "
                "that takes patch tokens of shape (frames, tokens, width)."
            )
        adapted = hidden_states
        for name in self.active_adapters:
            if name not in self.mga_adapter:
                continue
            adapter = self.mga_adapter[name]
            prefix = adapter.num_prefix_tokens
            layout = episode_layout(
                hidden_states.shape[0],
                hidden_states.shape[1] - prefix,
                adapter.num_frames if num_frames is None else num_frames,
                num_support,
                patch_grid,
            )
            change = self._change(name, adapter, hidden_states, layout, support_cache).to(adapted.dtype)
            patches = adapted[:, prefix:] + change
            adapted = torch.cat((adapted[:, :prefix], patches), dim=1) if prefix else patches
        return adapted

    def _change(
        self,
        name: str,
        adapter: SmgaAdapter,
        hidden_states: torch.Tensor,
        layout: EpisodeLayout,
        cache: SupportCache | None,
    ) -> torch.Tensor:
        key = f"{self.module_name}.{name}"
        supports = supports_per_episode = None
        if cache is not None and layout.only_queries and isinstance(adapter, CmgaAdapter) and adapter.attention:
            supports, supports_per_episode = cache.read(key, layout, adapter.width), cache.num_support
        keep_supports = cache is not None and not layout.only_queries
        inputs = (
            self._cast_input_dtype(hidden_states, adapter.down.weight.dtype),
            layout,
            supports,
            supports_per_episode,
            keep_supports,
        )
        if self.training and getattr(self.get_base_layer(), "gradient_checkpointing", False):
            # The block checkpoints itself. Without reentry, as our input may need no gradient where our weights do.
            change, entry = checkpoint(adapter, *inputs, use_reentrant=False)
        else:
            change, entry = adapter(*inputs)
        if entry is not None:
            cache[key] = entry
            cache.num_support = layout.num_support
        return change


class SmgaLayer(MgaLayer):
    """A transformer block with Smga-Adapters before it. See [`MgaLayer`] for `forward`'s arguments."""


class CmgaLayer(MgaLayer):
    """A transformer block with at least one Cmga-Adapter before it. See [`MgaLayer`] for `forward`'s arguments."""


class BlockPlan(NamedTuple):
    """Which blocks of a model an adapter is put into, and how."""

    cross: dict[str, bool]  # full name of the block -> whether it gets a Cmga-Adapter (else an Smga-Adapter)
    hidden_size: int
    num_prefix_tokens: int


class MgaModel(BaseTuner):
    """
    Puts motion-guided adapters before the blocks of a frozen image transformer, so that it reads motion in videos.

    The adapted model takes the frames of videos as its batch, and the episode facts as keyword arguments (see
    [`MgaLayer`]).

    Args:
        model ([`~transformers.PreTrainedModel`] or `torch.nn.Module`): The model to adapt: a vision transformer or a
            model that holds one.
        config ([`MgaConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`): Create the adapter's weights on the meta device.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import CLIPVisionModel
    >>> from dmgal_hf import MgaConfig

    >>> backbone = CLIPVisionModel.from_pretrained("openai/clip-vit-base-patch16")
    >>> model = get_peft_model(backbone, MgaConfig())
    >>> frames = torch.randn(3 * 8, 3, 224, 224)  # two support videos and a query of eight frames
    >>> features = model(frames, num_frames=8, num_support=[2]).last_hidden_state
    ```
    """

    prefix: str = "mga_"
    tuner_layer_cls = MgaLayer
    target_module_mapping: dict[str, list[str]] = {}  # blocks are found by the model's structure
    registered_by = "dmgal-hf"

    def _pre_injection_hook(self, model: nn.Module, config: MgaConfig, adapter_name: str) -> None:
        self.block_plans: dict[str, BlockPlan] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _carry_facts(model)

    def _prepare_adapter_config(self, peft_config: MgaConfig, model_config: dict) -> MgaConfig:
        plan = BlockPlan({}, 0, 0)
        if peft_config.target_modules != DUMMY_TARGET_MODULES:
            plan = plan_blocks(self.model, peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:  # one config may serve several adapters
                self.block_plans[name] = plan
        return peft_config

    def _check_target_module_exists(self, peft_config: MgaConfig, key: str) -> bool:
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        return key in self.block_plans[name].cross

    def _create_and_replace(
        self,
        peft_config: MgaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        plan = self.block_plans[adapter_name]
        cross = plan.cross.get(current_key, False)
        layer = target
        if not isinstance(target, MgaLayer) or (cross and not isinstance(target, CmgaLayer)):
            block = target.base_layer if isinstance(target, MgaLayer) else target
            layer = (CmgaLayer if cross else SmgaLayer)(block, current_key)
            if isinstance(target, MgaLayer):
                layer.take_over(target)
            else:
                layer.set_adapter(self.active_adapters)
            layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, plan.hidden_size, plan.num_prefix_tokens, cross)
        if adapter_name not in self.active_adapters:
            layer.mga_adapter[adapter_name].requires_grad_(False)  # an additional adapter waits to be activated
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A block has no weight to hand over, and `update_layer` has moved the adapter to the block's device.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unmerge_adapter(self) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unload(self) -> nn.Module:
        for layer in self.model.modules():
            if isinstance(layer, MgaLayer) and layer.facts_carrier is not None:
                layer.facts_carrier.detach()
        return super().unload()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # An adapter is a module with modules of its own: "...mga_adapter.<adapter name>.down.weight".
        before, found, after = key.rpartition(f".mga_adapter.{adapter_name}.")
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{before}.mga_adapter.{after}"


def find_vision_models(model: nn.Module) -> dict[str, nn.Module]:
    """The vision transformers of a known kind in `model` by their full names (`""` for `model` itself)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "model_type", None) not in CLASS_TOKENS:
            continue
        is_part = any(_is_inside(name, outer) for outer in found)  # encoders and blocks have the same config
        if not is_part and _find_block_list(module) is not None:
            found[name] = module
    return found


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _find_block_list(vision_model: nn.Module) -> str | None:
    for name, module in vision_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == vision_model.config.num_hidden_layers:
            return name
    return None


def plan_blocks(model: nn.Module, config: MgaConfig) -> BlockPlan:
    """Decide which blocks of `model` get which adapter, and complete `config` with what is found.

    Raises:
        ValueError: if the blocks or the prefix tokens cannot be found, if a block number is out of range or named for
            both adapters, or if the adapter was made for a backbone of another width or depth.
    """
    found = find_vision_models(model)
    if config.target_modules is None:
        config.target_modules = _block_pattern(model, found)
    blocks = {
        name: module
        for name, module in model.named_modules()
        if name and ".mga_adapter." not in name and check_target_module_exists(config, name)
    }
    if not blocks:
        return BlockPlan({}, 0, 0)  # peft has the error for it
    hidden_size = _block_width(model, blocks)
    _check_backbone(model, config, hidden_size, len(blocks))
    num_prefix_tokens = config.num_prefix_tokens
    if num_prefix_tokens is None:
        owner = next((module for name, module in found.items() if _is_inside(next(iter(blocks)), name)), None)
        if owner is None:
            raise ValueError(
                f"MgaConfig.num_prefix_tokens is None, but the blocks it targets in {type(model).__name__} belong to "
                "no vision transformer that MGA knows. Set it to the number of class and register tokens before the "
                "patch tokens (0 if none)."
            )
        num_prefix_tokens = CLASS_TOKENS[owner.config.model_type] + getattr(owner.config, "num_register_tokens", 0)
    cross = _share_out_blocks(config, list(blocks))
    config.backbone_width, config.backbone_depth = hidden_size, len(blocks)
    return BlockPlan(cross, hidden_size, num_prefix_tokens)


def _block_pattern(model: nn.Module, found: dict[str, nn.Module]) -> str:
    """Regular expression of the names of the blocks of the one vision transformer in `model`."""
    if len(found) != 1:
        what = f"holds several ({', '.join(found)})" if found else "holds none"
        raise ValueError(
            "MgaConfig.target_modules is None, so the model must hold one vision transformer that MGA knows "
            f"(config.model_type one of {', '.join(CLASS_TOKENS)}), but {type(model).__name__} {what}. Set "
            "target_modules to the names of the transformer blocks to adapt (a list or a regular expression) and "
            "num_prefix_tokens to the number of class and register tokens. A backbone without patch tokens, such as a "
            "ResNet, cannot take MGA adapters."
        )
    [(name, vision_model)] = found.items()
    block_list = ".".join(part for part in (name, _find_block_list(vision_model)) if part)
    return re.escape(block_list) + r"\.\d+"


def _block_width(model: nn.Module, blocks: dict[str, nn.Module]) -> int:
    """Width of the blocks, read from their normalisation layers."""
    widths = {}
    for name, block in blocks.items():
        if isinstance(block, BaseTunerLayer):
            block = block.get_base_layer()
        normalisations = [
            module.weight.shape[0]
            for module in block.modules()
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and getattr(module, "weight", None) is not None
        ]
        widths[name] = max(normalisations, default=None)  # the others are narrower ones, of queries and keys
        if widths[name] is None:
            raise ValueError(
                f"MgaConfig.target_modules matches '{name}' ({type(block).__name__}) in {type(model).__name__}, which "
                "is no transformer block (it holds no LayerNorm or RMSNorm). A backbone without patch tokens, such as "
                "a ResNet, cannot take MGA adapters."
            )
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"The blocks that MgaConfig.target_modules matches differ in width ({widths}); match blocks of one width."
        )
    return next(iter(widths.values()))


def _check_backbone(model: nn.Module, config: MgaConfig, width: int, depth: int) -> None:
    made_for = (config.backbone_width or width, config.backbone_depth or depth)
    if made_for != (width, depth):
        raise ValueError(
            f"This MGA adapter was made for a backbone of {made_for[1]} blocks of width {made_for[0]}, but "
            f"{type(model).__name__} has {depth} blocks of width {width}. Put it on the backbone it was made for"
            + (f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "")
            + ", or start a new adapter with a new MgaConfig."
        )


def _share_out_blocks(config: MgaConfig, names: list[str]) -> dict[str, bool]:
    """Full name -> whether the block gets a Cmga-Adapter, for the blocks that get one of the two."""

    def numbers(field: str) -> list[int]:
        layers = getattr(config, field)
        for layer in layers:
            if not -len(names) <= layer < len(names):
                raise ValueError(
                    f"MgaConfig.{field} names block {layer}, but this backbone has {len(names)} blocks "
                    f"({-len(names)} to {len(names) - 1})."
                )
        return [layer % len(names) for layer in layers]

    cmga = [len(names) - 1] if config.cmga_layers is None else numbers("cmga_layers")
    smga = [i for i in range(len(names)) if i not in cmga] if config.smga_layers is None else numbers("smga_layers")
    both = sorted(set(cmga) & set(smga))
    if both:
        raise ValueError(
            f"MgaConfig names block {both[0]} for both adapters: smga_layers={config.smga_layers}, cmga_layers="
            f"{config.cmga_layers} (None: the last block). Give each block one of them."
        )
    return {name: number in cmga for number, name in enumerate(names) if number in cmga or number in smga}


def _carry_facts(model: nn.Module) -> None:
    """Attach an [`EpisodeFactsCarrier`] where a model would not hand the episode facts on to its adapted blocks."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MgaLayer)}
    carrier = next((layer.facts_carrier for layer in layers.values() if layer.facts_carrier is not None), None)
    entries = find_vision_models(model)
    if not entries or not isinstance(model, PreTrainedModel):
        entries[""] = model  # a transformers model around a vision model calls it with facts of its own
    for entry_name, entry in entries.items():
        inside = [name for name in layers if _is_inside(name, entry_name)]
        if all(_hands_on_keywords(model, entry_name, name) for name in inside):
            continue
        carrier = carrier or EpisodeFactsCarrier()
        carrier.attach(entry_name, entry)
    for layer in layers.values():
        layer.facts_carrier = carrier


def _hands_on_keywords(model: nn.Module, entry_name: str, layer_name: str) -> bool:
    """Whether every module from the entry down to the block takes any keyword argument."""
    parts = layer_name.split(".")
    for length in range(len(entry_name.split(".")) if entry_name else 0, len(parts) + 1):
        module = model.get_submodule(".".join(parts[:length]))
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            continue
        forward = module.get_base_layer().forward if isinstance(module, MgaLayer) else module.forward
        kinds = [parameter.kind for parameter in inspect.signature(forward).parameters.values()]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return False
    return True


def register_mga() -> None:
    """Register the method "mga" with peft, once.

    Raises:
        RuntimeError: if peft has another method of that name or prefix.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(MGA)
    if known is not None and getattr(known, "registered_by", None) == MgaModel.registered_by:
        if known.__module__ != MgaModel.__module__:
            return  # a copy of this file is at work already, as when a checkpoint brings its own
        for mapping in (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
        ):
            mapping.pop(MGA, None)  # this module was reloaded: its new classes take over
    elif known is not None or MgaModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        owner = "another method" if known is None else f"{known.__module__}.{known.__qualname__}"
        raise RuntimeError(
            f"peft's method name 'mga' (prefix '{MgaModel.prefix}') is taken by {owner}, so DMGAL's motion-guided "
            "adapters cannot register theirs. Do not import that package and dmgal_hf in one process; if peft itself "
            "brought the name, upgrade dmgal-hf (`pip install -U dmgal-hf`)."
        )
    register_peft_method(name="mga", config_cls=MgaConfig, model_cls=MgaModel)


register_mga()
