"""Motion-guided attention: motion features, S-MGA, the temporal and channel mixer, C-MGA.

All feature maps are (V, T, C, H, W): V videos of T frames. Scores come from motion alone, values from appearance.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_dmgal import DmgalConfig


class DirectionalBatchNorm(nn.BatchNorm2d):
    """
    Batch normalisation of motions that are stacked direction by direction along the batch: in training every
    direction is normalised by statistics of its own, as when the directions are computed one after the other.
    """

    def __init__(self, num_features: int, num_directions: int):
        super().__init__(num_features)
        self.num_directions = num_directions

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(hidden_states)
        return torch.cat(
            [super(DirectionalBatchNorm, self).forward(x) for x in hidden_states.chunk(self.num_directions)]
        )


class MotionFeatures(nn.Module):
    """
    Bidirectional, multi-scale motion (method: "Motion features"): what changes from a frame to the next and to the
    previous one, in channels / motion_reduction channels.

    Args:
        config ([`DmgalConfig`]): `motion_reduction`, `motion_directions` and `motion_scales` are read.
        channels (`int`): C of the feature maps.
    """

    def __init__(self, config: DmgalConfig, channels: int):
        super().__init__()
        if channels < config.motion_reduction:
            raise ValueError(
                f"motion_reduction must be at most the {channels} channels of the backbone, "
                f"got {config.motion_reduction}."
            )
        width = channels // config.motion_reduction
        self.width = width
        self.directions = (
            ("forward", "backward") if config.motion_directions == "both" else (config.motion_directions,)
        )
        self.scales = tuple(config.motion_scales)
        self.bottleneck = nn.Conv2d(channels, width, 1, bias=False)
        self.bottleneck_norm = nn.BatchNorm2d(width)
        self.neighbour = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        for scale in self.scales:
            self.add_module(f"{scale}_conv", nn.Conv2d(width, width, 3, padding=1, bias=False))
            self.add_module(f"{scale}_norm", DirectionalBatchNorm(width, len(self.directions)))
        self.project = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(V, T, C, H, W)`): feature maps of V videos.

        Returns:
            `torch.Tensor` of shape `(directions, V, T, c, H, W)`, forward before backward.
        """
        num_videos, num_frames = hidden_states.shape[:2]
        size = hidden_states.shape[-2:]
        current = self.bottleneck_norm(self.bottleneck(hidden_states.flatten(0, 1)))
        neighbour = self.neighbour(current).unflatten(0, (num_videos, num_frames))
        current = current.unflatten(0, (num_videos, num_frames))

        differences = []
        if "forward" in self.directions:
            difference = neighbour[:, 1:] - current[:, :-1]
            differences.append(F.pad(difference, (0, 0, 0, 0, 0, 0, 0, 1)))  # nothing follows the last frame
        if "backward" in self.directions:
            difference = neighbour[:, :-1] - current[:, 1:]
            differences.append(F.pad(difference, (0, 0, 0, 0, 0, 0, 1, 0)))  # nothing precedes the first
        difference = torch.cat(differences).flatten(0, 1)  # (directions · V · T, c, H, W)

        motion = difference
        if "half" in self.scales:
            if min(size) < 2:
                raise ValueError(
                    f"The feature map is {size[0]}x{size[1]}, too small for the half scale of the motion features: "
                    "use larger frames or motion_scales=['full']."
                )
            half = self.half_norm(self.half_conv(F.avg_pool2d(difference, 2)))
            motion = motion + F.interpolate(half, size)
        if "full" in self.scales:
            motion = motion + self.full_norm(self.full_conv(difference))
        motion = self.project(motion / (1 + len(self.scales)))
        return motion.unflatten(0, (len(self.directions), num_videos, num_frames))


def sinusoidal_position_code(
    length: int, channels: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The fixed code of Vaswani et al. (2017): `(length, channels)`, sine in the even channels, cosine in the odd."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(
        torch.arange(0, channels, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / channels)
    )
    code = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], -1)
    return code.flatten(1)[:, :channels].to(dtype)


class SelfMotionAttention(nn.Module):
    """
    S-MGA (method: "S-MGA: self motion-guided attention"): a patch gathers the patches of its frame that move as it
    does. F' = F + gamma · ½ (A_f + A_b) dw3(F).

    Args:
        config ([`DmgalConfig`]): the configuration.
        channels (`int`): C of the feature maps.
    """

    def __init__(self, config: DmgalConfig, channels: int):
        super().__init__()
        self.motion = MotionFeatures(config, channels)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.position_scale = config.position_scale
        self.position_dropout = nn.Dropout(config.position_dropout)
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(V, T, C, H, W)`): feature maps of V videos.

        Returns:
            The attended maps, `(V, T, C, H, W)`, and the attention averaged over the directions, `(V, T, P, P)` with
            P = H·W; row p tells where patch p looks.
        """
        frames = hidden_states.flatten(0, 1)
        motion = self.motion(hidden_states).flatten(1, 2).flatten(3).transpose(2, 3)  # (directions, V·T, P, c)
        length, width = motion.shape[-2:]
        code = sinusoidal_position_code(length, width, motion.device, motion.dtype)
        motion = self.position_dropout(motion + self.position_scale * code)
        scores = motion @ (motion.transpose(-1, -2) / math.sqrt(width))
        attention = self.attention_dropout(scores.softmax(-1)).mean(0)  # (V·T, P, P)
        # Both directions share the values, so one product serves both.
        attended = self.value(frames).flatten(2) @ attention.transpose(1, 2)  # (V·T, C, P)
        hidden_states = torch.addcmul(frames, self.gamma, attended.view_as(frames)).view_as(hidden_states)
        return hidden_states, attention.unflatten(0, hidden_states.shape[:2])


class TemporalChannelMixer(nn.Module):
    """
    The mixer between S-MGA and C-MGA (the authors' code): per position a two-layer perceptron over the T frames, then
    one over the C channels, each with a residual.

    Args:
        num_frames (`int`): T; the weights are bound to it.
        channels (`int`): C of the feature maps.
    """

    def __init__(self, num_frames: int, channels: int):
        super().__init__()
        self.temporal_in = nn.Linear(num_frames, num_frames)
        self.temporal_out = nn.Linear(num_frames, num_frames)
        self.channel_in = nn.Linear(channels, channels)
        self.channel_out = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(V, T, C, H, W)` -> `(V, T, C, H, W)`."""
        frames = hidden_states.flatten(2)  # (V, T, C·P)
        mixed = F.relu(self._mix_frames(self.temporal_in, frames))
        frames = (frames + self._mix_frames(self.temporal_out, mixed)).view_as(hidden_states).flatten(0, 1)
        mixed = F.relu(self._mix_channels(self.channel_in, frames))
        return (frames + self._mix_channels(self.channel_out, mixed)).view_as(hidden_states)

    # Both perceptrons act on an axis in the middle: products from the left and 1x1 convolutions spare the transposes.
    @staticmethod
    def _mix_frames(linear: nn.Linear, frames: torch.Tensor) -> torch.Tensor:
        return linear.weight @ frames + linear.bias[:, None]

    @staticmethod
    def _mix_channels(linear: nn.Linear, frames: torch.Tensor) -> torch.Tensor:
        return F.conv2d(frames, linear.weight[:, :, None, None], linear.bias)


@dataclass
class CrossMotionKeys:
    """
    What C-MGA reads of the supports of B episodes.

    Attributes:
        motion (`torch.Tensor` of shape `(directions, B, T, S·P, c)`): normalised motion, the keys.
        values (`torch.Tensor` of shape `(B, T, S·P, C)`): dw3(Fs), the values.
    """

    motion: torch.Tensor
    values: torch.Tensor


class CrossMotionAttention(nn.Module):
    """
    C-MGA (method: "C-MGA: cross motion-guided attention"): a patch of a query gathers the patches of all supports, at
    the same frame index, that move as it does. The supports never read the queries, so their side is computed once.

    Args:
        config ([`DmgalConfig`]): the configuration.
        channels (`int`): C of the feature maps.
    """

    def __init__(self, config: DmgalConfig, channels: int):
        super().__init__()
        self.motion = MotionFeatures(config, channels)
        self.norm = nn.LayerNorm(self.motion.width)
        self.value = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.gamma_self = nn.Parameter(torch.zeros(1))
        self.gamma_cross = nn.Parameter(torch.zeros(1))
        self.attention_dropout = nn.Dropout(config.attention_dropout)

    def forward(self, support: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            support (`torch.Tensor` of shape `(B, S, T, C, H, W)`): feature maps of the supports of B episodes.
            query (`torch.Tensor` of shape `(B, Q, T, C, H, W)`): of their queries.

        Returns:
            The new maps of the supports, those of the queries, and the attention `(B, Q, T, P, S, P)`.
        """
        support_maps, keys = self.encode_support(support)
        query_maps, attention = self.attend(query, keys)
        return support_maps, query_maps, attention

    def encode_support(self, support: torch.Tensor) -> tuple[torch.Tensor, CrossMotionKeys]:
        """`(B, S, T, C, H, W)` -> the new maps of the same shape, Fs' = Fs + g1 dw3(Fs), and the keys for queries."""
        values = self._values(support)
        maps = torch.addcmul(support, self.gamma_self, values)
        values = values.flatten(4).permute(0, 2, 1, 4, 3).flatten(2, 3)  # (B, T, S·P, C)
        return maps, CrossMotionKeys(self._motion(support), values)

    def attend(self, query: torch.Tensor, keys: CrossMotionKeys) -> tuple[torch.Tensor, torch.Tensor]:
        """The new maps of the queries, `(B, Q, T, C, H, W)`, and the attention `(B, Q, T, P, S, P)`."""
        attention = self._attention(query, keys)  # (B, T, Q·P, S·P)
        cross = (attention @ keys.values).unflatten(2, (query.shape[1], -1))  # (B, T, Q, P, C)
        cross = cross.permute(0, 2, 1, 4, 3).reshape(query.shape)
        maps = query + self.gamma_self * self._values(query) + self.gamma_cross * cross
        return maps, self._by_video(attention, query)

    def describe(self, query: torch.Tensor, keys: CrossMotionKeys) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The spatial mean of what [`attend`] returns, `(B, Q, T, C)`, and the attention: matching reads no more of a
        query, and averaging the attention before the product with the values makes that product P times smaller.
        """
        attention = self._attention(query, keys)
        cross = attention.unflatten(2, (query.shape[1], -1)).mean(3) @ keys.values  # (B, T, Q, C)
        values = self._values(query).mean((-1, -2))
        described = query.mean((-1, -2)) + self.gamma_self * values + self.gamma_cross * cross.transpose(1, 2)
        return described, self._by_video(attention, query)

    def _values(self, maps: torch.Tensor) -> torch.Tensor:
        return self.value(maps.flatten(0, 2)).view_as(maps)

    def _motion(self, maps: torch.Tensor) -> torch.Tensor:
        motion = self.motion(maps.flatten(0, 1)).unflatten(1, maps.shape[:2])  # (directions, B, V, T, c, H, W)
        return self.norm(motion.flatten(5).permute(0, 1, 3, 2, 5, 4)).flatten(3, 4)  # (directions, B, T, V·P, c)

    def _attention(self, query: torch.Tensor, keys: CrossMotionKeys) -> torch.Tensor:
        motion = self._motion(query) / math.sqrt(keys.motion.shape[-1])
        scores = motion @ keys.motion.transpose(-1, -2)  # (directions, B, T, Q·P, S·P)
        return self.attention_dropout(scores.softmax(-1)).mean(0)

    @staticmethod
    def _by_video(attention: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        patches = query.shape[-1] * query.shape[-2]
        return attention.unflatten(3, (-1, patches)).unflatten(2, (-1, patches)).transpose(1, 2)
