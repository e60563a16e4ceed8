"""Motion-guided attention: motion features, S-MGA, the temporal and channel mixer, C-MGA.

All feature maps are (V, T, C, H, W): V videos of T frames. Scores come from motion alone, values from appearance.
In memory they are channels-last, patch by patch: convolutions are faster so, and the patches of a frame are rows for
the attention without a copy.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_dmgal import DmgalConfig

# Attention scores that C-MGA holds at a time; more queries than that take turns. 2**23 float32 numbers are 32 MiB.
# A GPU holds four times as many: a training step of 25 supports and 20 queries then computes nothing again.
SCORES_AT_A_TIME = 2**23
# Where a CPU keeps none of them for gradients, as many for each thread as its cache holds: softmax and mean then find
# them there. (Fewer would have the threads wait for each other more often.)
SCORES_IN_CACHE = 2**18


def channels_last(maps: torch.Tensor) -> torch.Tensor:
    """Maps (V, T, C, H, W) as frames (V·T, C, H, W) that lie channels-last in memory; copied only if they do not."""
    return maps.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def patches(frames: torch.Tensor) -> torch.Tensor:
    """(..., C, H, W) -> (..., P, C) with P = H·W; a view of channels-last frames."""
    return frames.flatten(-2).transpose(-1, -2)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """
    Rows (..., R, C) as an operand of products. Where these are computed in half precision, the rows are cast to it
    once and filled up with zeros to a multiple of 8: with 49 patches of a frame, or 1,225 of 25 supports, GPUs would
    have no fast kernels for them.
    """
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if dtype not in (torch.bfloat16, torch.float16):
        return rows
    return F.pad(rows.to(dtype), (0, 0, 0, -rows.shape[-2] % 8))


def window_means(maps: torch.Tensor) -> torch.Tensor:
    """
    Maps (N, C, H, W) -> (N, 9, C): sums over maps moved by up to one patch, as the nine weights of a padded 3x3
    convolution see them, divided by P. The fifth is the mean; the means of a depthwise convolution are the sums of
    these nine, each times its weight.
    """
    seen = _seen_by_weights(maps)
    return torch.bmm(seen.expand(maps.shape[0], -1, -1), patches(maps.contiguous(memory_format=torch.channels_last)))


def _seen_by_weights(maps: torch.Tensor) -> torch.Tensor:
    """(1, 9, P): the patches that each weight of a padded 3x3 convolution sees, as parts of all."""
    height, width = maps.shape[-2:]
    part = maps.new_full((1, 1, height, width), 1 / (height * width))
    seen = F.unfold(part, 3, padding=1).flip(1)
    return F.pad(seen, (0, -height * width % 8))[..., : height * width]  # rows that begin at multiples of 8


@dataclass
class MixedMaps:
    """
    What the mixer makes of V videos, y = x + W h + b, before W meets the patches. C-MGA reads means and a bottleneck
    of a query, both linear, and these can be had for less: W meets 9 sums a frame, and the bottleneck meets W.

    Attributes:
        frames (`torch.Tensor` of shape `(V, T, C, H, W)`): x, mixed over the frames.
        hidden (`torch.Tensor` of shape `(V, T, C, H, W)`): h, within the perceptron over the channels.
        linear (`nn.Linear`): W and b, the perceptron's second layer.
    """

    frames: torch.Tensor
    hidden: torch.Tensor
    linear: nn.Linear

    @property
    def shape(self) -> torch.Size:
        return self.frames.shape

    def project(self, convolution: nn.Conv2d) -> torch.Tensor:
        """`convolution(y)`, (V·T, c, H, W), of a 1x1 convolution without bias."""
        columns = torch.cat([self.linear.weight, self.linear.bias[:, None]], 1)
        weight = convolution(columns[None, :, :, None])[0]  # the columns of W, and b, as patches: (c, C + 1, 1)
        hidden = F.conv2d(channels_last(self.hidden), weight[:, :-1, :, None], weight[:, -1, 0])
        return hidden + convolution(channels_last(self.frames))

    def window_means(self) -> torch.Tensor:
        """(V·T, 9, C), as [`window_means`] of y."""
        frames, hidden = (window_means(maps.flatten(0, 1)) for maps in (self.frames, self.hidden))
        # As the patches of one tall frame, which is faster than so many of nine.
        tall = hidden.flatten(0, 1)[None, :, None].permute(0, 3, 1, 2)
        hidden = F.conv2d(tall, self.linear.weight[:, :, None, None]).permute(0, 2, 3, 1).reshape(frames.shape)
        return frames + hidden + self.linear.bias * _seen_by_weights(self.frames).sum(2)[..., None]


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

    def forward(self, hidden_states: torch.Tensor | MixedMaps) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(V, T, C, H, W)` or [`MixedMaps`]): feature maps of V videos.

        Returns:
            `torch.Tensor` of shape `(directions, V, T, c, H, W)`, forward before backward.
        """
        batch, size = hidden_states.shape[:2], hidden_states.shape[-2:]
        if isinstance(hidden_states, MixedMaps):
            current = hidden_states.project(self.bottleneck)
        else:
            current = self.bottleneck(channels_last(hidden_states))
        current = self.bottleneck_norm(current)
        neighbour = self.neighbour(current).permute(0, 2, 3, 1).unflatten(0, batch)  # (V, T, H, W, c)
        current = current.permute(0, 2, 3, 1).unflatten(0, batch)

        differences = []
        if "forward" in self.directions:
            difference = neighbour[:, 1:] - current[:, :-1]
            differences.append(F.pad(difference, (0, 0, 0, 0, 0, 0, 0, 1)))  # nothing follows the last frame
        if "backward" in self.directions:
            difference = neighbour[:, :-1] - current[:, 1:]
            differences.append(F.pad(difference, (0, 0, 0, 0, 0, 0, 1, 0)))  # nothing precedes the first
        difference = torch.cat(differences).flatten(0, 1).permute(0, 3, 1, 2)  # (directions · V · T, c, H, W)

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
        return motion.unflatten(0, (len(self.directions), *batch))


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
        frames = channels_last(hidden_states)
        attention = self._attention(hidden_states).mean(0)
        maps = self._gather(patches(frames), attention, patches(self.value(frames)))
        maps = maps.transpose(1, 2).view(frames.shape).unflatten(0, hidden_states.shape[:2])
        return maps, attention.unflatten(0, hidden_states.shape[:2])

    def over_windows(self, frames: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """
        The attended maps of windows of one long video, each as [`forward`] gives them for the window by itself. What
        moves before and after a frame is the same in all windows, but for the first and the last frame of each: as
        nothing precedes or follows these, they attend as the two ends of the long video do.

        Args:
            frames (`torch.Tensor` of shape `(F, C, H, W)`): feature maps of the long video.
            index (`torch.LongTensor` of shape `(V, T)`): numbers of the frames of each window, one after the other;
                on the CPU, or else the device is waited for.

        Returns:
            `torch.Tensor` of shape `(V, T, C, H, W)`.
        """
        attention = self._attention(frames[None])  # (directions, F, P, P)
        ends = {"forward": (-1, len(frames) - 1), "backward": (0, 0)}
        sources = [index]
        for direction in self.motion.directions:
            place, end = ends[direction]
            sources.append(index.clone())
            sources[-1][:, place] = end
        # A frame and those whose attention it takes, forward and backward: once for all windows that agree in them.
        distinct, number = torch.stack(sources).flatten(1).unique(dim=1, return_inverse=True)
        frame, sources = distinct[0], distinct[1:]
        sources = sources + len(frames) * torch.arange(len(sources), device=index.device)[:, None]
        frame, sources, number = (one.to(frames.device) for one in (frame, sources, number))
        attention = attention.flatten(0, 1)[sources]
        frames = frames.contiguous(memory_format=torch.channels_last)
        rows, values = patches(frames), patches(self.value(frames))
        maps = self._gather(rows.index_select(0, frame), attention.mean(0), values.index_select(0, frame))
        maps = maps.index_select(0, number).transpose(1, 2)
        return maps.unflatten(2, frames.shape[-2:]).unflatten(0, index.shape)

    def _attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(V, T, C, H, W) -> (directions, V·T, P, P)."""
        motion = patches(self.motion(hidden_states).flatten(1, 2))  # (directions, V·T, P, c)
        length, width = motion.shape[-2:]
        code = sinusoidal_position_code(length, width, motion.device, motion.dtype)
        motion = self.position_dropout(motion + self.position_scale * code)
        scores = motion @ (aligned(motion).transpose(-1, -2) / math.sqrt(width))
        return self.attention_dropout(scores[..., :length].softmax(-1))

    def _gather(self, frames: torch.Tensor, attention: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Frames and values (N, P, C), attention (N, P, P) -> (N, P, C). One product: the directions share values."""
        values = aligned(values)
        attention = F.pad(self.gamma * attention, (0, values.shape[1] - attention.shape[2]))
        return torch.baddbmm(frames, attention, values)


class HiddenFrames(nn.Linear):
    """
    The first layer over the frames, which starts with a hidden unit for every frame (ours; the authors' starts at
    random). Of random sums over T frames, whose maps a ResNet leaves at 0 or above, some are dead from the first step,
    and how many differs from seed to seed.
    """


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
        self.temporal_in = HiddenFrames(num_frames, num_frames)
        self.temporal_out = nn.Linear(num_frames, num_frames)
        self.channel_in = nn.Linear(channels, channels)
        self.channel_out = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(V, T, C, H, W)` -> `(V, T, C, H, W)`."""
        mixed = self.mix(hidden_states)
        return mixed.frames + self._mix_channels(self.channel_out, mixed.hidden)

    def mix(self, hidden_states: torch.Tensor) -> MixedMaps:
        """The same, `(V, T, C, H, W)`, without its last product."""
        batch, size = hidden_states.shape[:2], hidden_states.shape[-2:]
        frames = patches(channels_last(hidden_states)).unflatten(0, batch).flatten(2)  # (V, T, P·C)
        # In place: new memory for maps of this size takes longer than the comparison.
        frames = self._mix_frames(self.temporal_out, self._mix_frames(self.temporal_in, frames).relu_()).add_(frames)
        frames = frames.unflatten(2, (*size, -1)).flatten(0, 1).permute(0, 3, 1, 2)  # (V·T, C, H, W)
        frames = frames.unflatten(0, batch)
        return MixedMaps(frames, self._mix_channels(self.channel_in, frames).relu_(), self.channel_out)

    @staticmethod
    def _mix_frames(linear: nn.Linear, frames: torch.Tensor) -> torch.Tensor:
        # T is the axis in the middle: a product from the left spares the transposes.
        return torch.bmm(linear.weight.expand(frames.shape[0], -1, -1), frames).add_(linear.bias[:, None])

    @staticmethod
    def _mix_channels(linear: nn.Linear, maps: torch.Tensor) -> torch.Tensor:
        mixed = F.conv2d(channels_last(maps), linear.weight[:, :, None, None], linear.bias)
        return mixed.unflatten(0, maps.shape[:2])


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
        values = self._values(support)
        query_maps, attention = self.attend(query, self._keys(support, values))
        return torch.addcmul(support, self.gamma_self, values), query_maps, attention

    def encode_support(self, support: torch.Tensor) -> tuple[torch.Tensor, CrossMotionKeys]:
        """
        `(B, S, T, C, H, W)` -> the spatial mean of the new maps, `(B, S, T, C)`, which is what matching reads of
        Fs' = Fs + g1 dw3(Fs), and the keys for queries.
        """
        values = self._values(support)
        descriptors = support.mean((-1, -2)) + self.gamma_self * values.mean((-1, -2))
        return descriptors, self._keys(support, values)

    def attend(self, query: torch.Tensor, keys: CrossMotionKeys) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The new maps of the queries, `(B, Q, T, C, H, W)`, and the attention `(B, Q, T, P, S, P)`. The model itself
        needs no more than [`describe`], which holds neither.
        """
        motion = self._motion(query)
        attention = self._attention(motion, keys.motion, keys.values.shape[-2]).mean(0)  # (B, T, Q·P, S·P)
        cross = (attention @ keys.values).unflatten(2, motion.shape[3:5])  # (B, T, Q, P, C)
        cross = cross.permute(0, 2, 1, 4, 3).reshape(query.shape)
        maps = query + self.gamma_self * self._values(query) + self.gamma_cross * cross
        return maps, self._by_video(attention, motion.shape[4])

    def prefers_mixed(self, shape: torch.Size) -> bool:
        """
        Whether [`describe`] is cheaper with [`MixedMaps`]: for one query, `shape` (T, C, H, W), not for as many as
        there are, as an exported program is for any number.
        """
        num_frames, channels, num_patches, width = shape[0], shape[1], shape[2] * shape[3], self.motion.width
        products = width * channels + num_frames * (num_patches * width + 9 * channels)  # C multiplications each
        return products < num_frames * num_patches * channels

    def describe(
        self, query: torch.Tensor | MixedMaps, keys: CrossMotionKeys, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The spatial mean of what [`attend`] returns, `(B, Q, T, C)`: matching reads no more of a query.

        Args:
            query (`torch.Tensor` of shape `(B, Q, T, C, H, W)` or [`MixedMaps`] of B·Q videos):
                feature maps of the queries.
            keys ([`CrossMotionKeys`]): from [`encode_support`].
            output_attentions (`bool`): also return the attention, `(B, Q, T, P, S, P)`, which holds them all.
        """
        return self.read(*self.encode_query(query, len(keys.values)), keys, output_attentions)

    def encode_query(self, query: torch.Tensor | MixedMaps, episodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What depends on a query alone, of queries as in [`describe`]: the spatial mean of Fq + g1 dw3(Fq),
        `(B, Q, T, C)`, and its normalised motion, `(directions, B, T, Q, P, c)`. As supports they would have the same
        two.
        """
        if isinstance(query, MixedMaps):
            motion, num_frames = self._normalised(self.motion(query), (episodes, -1)), query.shape[1]
            means = query.window_means()
        else:
            motion, num_frames = self._motion(query), query.shape[2]
            means = window_means(query.flatten(0, 2))  # in place of the convolution, of which only means are read
        values = (means * self.value.weight.flatten(1).t()).sum(1)
        return (means[:, 4] + self.gamma_self * values).unflatten(0, (episodes, -1, num_frames)), motion

    def read(
        self, descriptors: torch.Tensor, motion: torch.Tensor, keys: CrossMotionKeys, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Descriptors of queries with what they read of the supports, `(B, Q, T, C)`, and the attention on request.
        Averaging the attention before the product with the values makes that product P times smaller. Queries take
        turns, so that the scores of all queries and supports are never held together; in training they are computed
        again. (Without gradients frames take turns, too, on a CPU.)

        Args:
            descriptors, motion: from [`encode_query`].
            keys, output_attentions: as in [`describe`].
        """
        num_keys, maps = keys.values.shape[-2], None
        key_motion, values = aligned(keys.motion), aligned(keys.values)
        if output_attentions:
            maps = self._attention(motion, key_motion, num_keys).mean(0)
            attention = maps.unflatten(2, motion.shape[3:5]).mean(3)
            maps = self._by_video(maps, motion.shape[4])
        else:
            attention = self._mean_attention_in_turns(motion, key_motion, num_keys)
        cross = F.pad(attention, (0, values.shape[-2] - num_keys)) @ values
        return descriptors + self.gamma_cross * cross.transpose(1, 2), maps

    def _mean_attention_in_turns(self, motion: torch.Tensor, key_motion: torch.Tensor, num_keys: int) -> torch.Tensor:
        """[`_mean_attention`] of some queries, or of some frames of all queries, after the other."""
        if torch.compiler.is_exporting():  # a program for any number of queries has no fixed number of turns
            return self._mean_attention(motion, key_motion, num_keys, again=False)
        batch = motion.shape[1:3]
        motion, key_motion = motion.flatten(1, 2)[:, None], key_motion.flatten(1, 2)[:, None]
        num_frames, num_queries = motion.shape[2:4]
        scores = motion[:, 0, 0, 0, :, 0].numel() * num_keys  # of one query in one frame
        if motion.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            at_a_time = SCORES_AT_A_TIME * (1 if motion.device.type == "cpu" else 4)
            frames, queries = num_frames, max(at_a_time // (scores * num_frames), 1)
        else:
            queries = max(SCORES_IN_CACHE * torch.get_num_threads() // scores, 1)
            frames = max(queries // num_queries, 1)
        again = torch.is_grad_enabled() and queries < num_queries
        mean = partial(self._mean_attention, num_keys=num_keys, again=again)
        if motion.device.type == "cpu" and self._goes_unshifted(motion.dtype):
            mean = self._mean_attention_unshifted
        means = [
            torch.cat([mean(turn, keys) for turn in of_frames.split(queries, 3)], 2)
            for of_frames, keys in zip(motion.split(frames, 2), key_motion.split(frames, 2))
        ]
        return torch.cat(means, 1)[0].unflatten(0, batch)

    def _mean_attention(
        self, motion: torch.Tensor, key_motion: torch.Tensor, num_keys: int, again: bool
    ) -> torch.Tensor:
        """Where queries with this motion look, the mean over their patches: (B, T, Q, S·P)."""

        def mean(motion: torch.Tensor, key_motion: torch.Tensor) -> torch.Tensor:
            attention = self._attention(motion, key_motion, num_keys)
            return attention.unflatten(3, motion.shape[3:5]).mean((0, 4))

        if again:
            return checkpoint(mean, motion, key_motion, use_reentrant=False)
        return mean(motion, key_motion)

    def _goes_unshifted(self, dtype: torch.dtype) -> bool:
        """Whether this is inference in float32, and 2**score stays far within it: the norm bounds the scores."""
        calm = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if not calm or dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        width = self.motion.width
        longest = math.sqrt(width) * self.norm.weight.abs().max() + self.norm.bias.norm()
        return bool(longest**2 / math.sqrt(width) * math.log2(math.e) < 90)

    @staticmethod
    def _mean_attention_unshifted(motion: torch.Tensor, key_motion: torch.Tensor) -> torch.Tensor:
        """
        [`_mean_attention`] on a CPU, in less time: exp2 is faster than exp, and what softmax would divide each weight
        by is left to the product that takes the mean.
        """
        num_patches, scale = motion.shape[4], math.log2(math.e) / math.sqrt(motion.shape[-1])
        weights = ((motion.flatten(3, 4) * scale) @ key_motion.transpose(-1, -2)).exp2_()
        shares = weights.sum(-1).mul_(len(motion) * num_patches).reciprocal_()  # (directions, B, T, Q·P)
        means = shares.unflatten(3, (-1, 1, num_patches)) @ weights.unflatten(3, (-1, num_patches))
        return means.squeeze(4).sum(0)

    def _keys(self, support: torch.Tensor, values: torch.Tensor) -> CrossMotionKeys:
        return CrossMotionKeys(self._motion(support).flatten(3, 4), patches(values).transpose(1, 2).flatten(2, 3))

    def _values(self, maps: torch.Tensor) -> torch.Tensor:
        return self.value(channels_last(maps.flatten(0, 1))).unflatten(0, maps.shape[:3])

    def _motion(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, V, T, C, H, W) -> normalised motion (directions, B, T, V, P, c)."""
        return self._normalised(self.motion(maps.flatten(0, 1)), maps.shape[:2])

    def _normalised(self, motion: torch.Tensor, videos: tuple[int, int]) -> torch.Tensor:
        """(directions, B·V, T, c, H, W) -> (directions, B, T, V, P, c)."""
        return self.norm(patches(motion.unflatten(1, videos)).transpose(2, 3))

    def _attention(self, motion: torch.Tensor, key_motion: torch.Tensor, num_keys: int) -> torch.Tensor:
        """(directions, B, T, Q, P, c) and (directions, B, T, >= S·P, c) -> (directions, B, T, Q·P, S·P)."""
        motion = motion.flatten(3, 4) / math.sqrt(motion.shape[-1])
        scores = motion @ key_motion.transpose(-1, -2)
        return self.attention_dropout(scores[..., :num_keys].softmax(-1))

    @staticmethod
    def _by_video(attention: torch.Tensor, num_patches: int) -> torch.Tensor:
        """(B, T, Q·P, S·P) -> (B, Q, T, P, S, P)."""
        return attention.unflatten(3, (-1, num_patches)).unflatten(2, (-1, num_patches)).transpose(1, 2)
