"""DMGAL: few-shot action recognition with motion-guided attention (arXiv 2411.11335)."""

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .alignment import class_logits
from .backbones import add_adapters, build_backbone, freeze_unread, train_adapters
from .class_texts import (
    TEXT_FOLDER,
    TextHead,
    check_has_text_tower,
    class_texts,
    combined_logits,
    embed_classes,
    load_text_tower,
)
from .configuration_dmgal import DmgalConfig
from .episode_checks import check_queries, check_support_labels, check_text_embeds, check_videos
from .feature_maps import feature_maps, frame_size, has_layers, num_channels, patch_grid
from .kept_supports import DmgalSupport
from .modeling_mga import CLASS_TOKENS, CmgaLayer, MgaLayer
from .motion_adapters import SupportCache
from .motion_attention import (
    CrossMotionAttention,
    CrossMotionKeys,
    MixedMaps,
    SelfMotionAttention,
    TemporalChannelMixer,
    channels_last,
    patches,
)
from .output_dmgal import DmgalOutput
from .pretrained_dmgal import DmgalPreTrainedModel


def _targets_are_labels(method: Callable) -> Callable:
    """Has `support_labels` out of a signature: transformers.Trainer takes what has "label" in its name for targets."""
    signature = inspect.signature(method)
    kept = [one for name, one in signature.parameters.items() if name != "support_labels"]
    method.__signature__ = signature.replace(parameters=kept)
    return method


class DmgalModel(DmgalPreTrainedModel):
    """
    Classifies query videos among the classes of their episode, each given by a few support videos.

    Args:
        config ([`DmgalConfig`]): the configuration.
        backbone (`PreTrainedModel`, *optional*): a vision model to build on; by default one is made from
            `config.backbone_config`.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from dmgal_hf import DmgalConfig, DmgalModel

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    >>> model = DmgalModel(DmgalConfig(backbone_config=backbone)).eval()
    >>> supports = torch.randn(1, 4, 8, 3, 64, 64)  # one episode, four videos of eight frames
    >>> queries = torch.randn(1, 3, 8, 3, 64, 64)
    >>> output = model(supports, torch.tensor([[0, 0, 1, 1]]), query_pixel_values=queries)
    >>> output.logits.shape  # three queries, two classes
    torch.Size([1, 3, 2])
    ```
    """

    def __init__(self, config: DmgalConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        built = backbone is None
        self.backbone = build_backbone(config.backbone_config, config.text_guidance) if built else backbone
        if backbone is not None:
            for module in backbone.modules():
                module._is_hf_initialized = True  # what is in it, also adapters, is not drawn anew by post_init()
        freeze_unread(self.backbone)
        if config.frame_pooling == "cls" and not CLASS_TOKENS.get(config.backbone_config.model_type):
            raise ValueError(
                f"frame_pooling='cls' needs a backbone with a class token, and {config.backbone_config.model_type!r} "
                "has none that is known here: use frame_pooling='mean'."
            )
        self.supports_gradient_checkpointing = self.backbone.supports_gradient_checkpointing
        self.num_features = channels = num_channels(config.backbone_config)
        full = config.paradigm == "ft"
        self.self_attention = SelfMotionAttention(config, channels) if full and config.self_motion_attention else None
        self.mixer = TemporalChannelMixer(config.num_frames, channels) if full and config.mixer else None
        self.cross_attention = (
            CrossMotionAttention(config, channels) if full and config.cross_motion_attention else None
        )
        self.text_head = TextHead(config.backbone_config) if config.text_guidance else None
        self.post_init()
        self._adapter_parameters = frozenset()
        if config.adapter_config is not None:
            # After the initialisation above, which would give the adapters the backbone's random weights.
            config.adapter_config = add_adapters(self.backbone, config.adapter_config)
            named = self.backbone.named_parameters()
            self._adapter_parameters = frozenset(name for name, parameter in named if parameter.requires_grad)
        elif config.paradigm == "adapter":
            self.backbone.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the backbone, where it has some."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.backbone.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "DmgalModel":
        """As in torch, but a frozen backbone (paradigm "adapter") stays in eval mode: only its adapters train."""
        super().train(mode)
        if mode and self.config.paradigm == "adapter":
            train_adapters(self.backbone)
        return self

    @_targets_are_labels
    def forward(
        self,
        support_pixel_values: torch.FloatTensor | None = None,
        support_labels: torch.LongTensor | None = None,
        query_pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        support: DmgalSupport | None = None,
        text_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        way: int | None = None,
    ) -> DmgalOutput | tuple:
        """
        Scores the queries of B episodes, each as if it were alone.

        Args:
            support_pixel_values (`torch.FloatTensor` of shape `(B, S, T, 3, H, W)`):
                Support videos, normalised by [`DmgalVideoProcessor`].
            support_labels (`torch.LongTensor` of shape `(B, S)`):
                Their classes, 0..N-1. Any way and shot; classes may have different numbers of shots.
            query_pixel_values (`torch.FloatTensor` of shape `(B, Q, T, 3, H, W)`):
                Query videos.
            labels (`torch.LongTensor` of shape `(B, Q)`, *optional*):
                Classes of the queries, for the loss.
            support ([`DmgalSupport`], *optional*):
                Supports from [`encode_support`], in place of the first two arguments.
            text_embeds (`torch.FloatTensor` of shape `(B, N, E)`, *optional*):
                Text prototypes of the classes, from [`embed_class_names`]: the logits are then those of clips and of
                texts together, see [`combined_logits`], with `score_temperature` and `text_weight` of the config. A
                class may then have no support.
            output_attentions (`bool`, *optional*): also return the attention maps.
            output_hidden_states (`bool`, *optional*): also return the feature maps of the queries.
            return_dict (`bool`, *optional*): `False` returns a plain tuple.
            way (`int`, *optional*):
                N. By default it is read from `support_labels`; where these lie on a GPU, the GPU is waited for.

        Raises:
            ValueError: a shape, a dtype, a label or a number of frames does not fit; the message says which. Values of
                labels are looked at on the CPU alone.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        if query_pixel_values is None:
            raise ValueError("query_pixel_values is missing: pass the query videos, (B, Q, T, 3, H, W).")
        if (support is None) == (support_pixel_values is None):
            raise ValueError(
                "Pass either support_pixel_values with support_labels, or support from encode_support(): got "
                f"{'neither' if support is None else 'both'}."
            )
        attentions, maps = {}, None
        if support is None:
            way = way if text_embeds is None else text_embeds.shape[-2]
            way = self._check_support(support_pixel_values, support_labels, way)
            self._check_videos("query_pixel_values", query_pixel_values)
            check_queries(query_pixel_values, labels, support_pixel_values.shape, way)
            if self._may_go_together(support_pixel_values, query_pixel_values):
                support, maps, query_embeds = self._encode_together(
                    support_pixel_values, support_labels, query_pixel_values, way
                )
            else:
                features, states, attentions["support_self"] = self._encode_alone(support_pixel_values, SupportCache())
                support = DmgalSupport(features, support_labels, way, states)
        else:
            self._check_videos("query_pixel_values", query_pixel_values)
            check_queries(query_pixel_values, labels, support.features.shape, support.way)
        if text_embeds is not None:
            self.check_text_head("text_embeds: ")
            check_text_embeds(text_embeds, len(support.features), support.way)

        if maps is None:
            maps, query_embeds = self._video_maps(query_pixel_values, support.cache())
        maps, attentions["query_self"], hidden_states = self._encode_videos(
            maps, may_fold=not (self.training or output_hidden_states)
        )
        query_features, attentions["cross"] = self._describe(maps, support, output_attentions)
        logits = self._match(query_features, support.features, support.labels, support.way)
        text_logits = None
        if text_embeds is not None:
            text_logits = self.text_logits(query_embeds, text_embeds)
            config = self.config
            logits = combined_logits(logits, text_logits.log_softmax(-1), config.score_temperature, config.text_weight)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        attentions = {name: attention for name, attention in attentions.items() if attention is not None}
        output = DmgalOutput(
            loss=loss,
            logits=logits,
            support_features=support.features,
            query_features=query_features,
            attentions=attentions if output_attentions else None,
            hidden_states=hidden_states if output_hidden_states else None,
            text_logits=text_logits,
            support_embeds=support.states.get("text.videos"),
            query_embeds=query_embeds,
        )
        return output if return_dict else output.to_tuple()

    def _may_go_together(self, support_pixel_values: torch.Tensor, query_pixel_values: torch.Tensor) -> bool:
        """
        In training, where a frozen backbone sees every video for itself: half the launches, and larger products. (The
        statistics of a backbone that trains are those of supports and queries apart.)
        """
        frozen = self.training and self.config.paradigm == "adapter"
        return frozen and support_pixel_values.shape[2:] == query_pixel_values.shape[2:]

    def _encode_together(self, support_pixel_values, labels, query_pixel_values, way):
        """
        Supports and queries through the backbone in one pass: the supports, of which nothing is kept for other
        queries, and the maps and embeddings of the queries.
        """
        num_support = support_pixel_values.shape[1]
        maps, embeds = self._video_maps(torch.cat([support_pixel_values, query_pixel_values], 1), None, num_support)
        states = {} if embeds is None else {"text.videos": embeds[:, :num_support]}
        support = DmgalSupport(maps[:, :num_support].mean((-1, -2)), labels, way, states)
        return support, maps[:, num_support:], None if embeds is None else embeds[:, num_support:]

    def _encode_alone(self, pixel_values: torch.Tensor, cache: SupportCache):
        """
        Videos (B, S, T, 3, H, W) as supports, which read no other: their descriptors, the states that queries read,
        and the attention of S-MGA. The empty `cache` is filled.
        """
        maps, embeds = self._video_maps(pixel_values, cache)
        maps, attention, _ = self._encode_videos(maps)
        states = cache.tensors()
        states.pop("num_support", None)  # labels say it
        if embeds is not None:
            states |= {"text.videos": embeds}
        if self.cross_attention is not None:
            features, keys = self.cross_attention.encode_support(maps)
            states |= {"cross.motion": keys.motion, "cross.values": keys.values}
        else:
            features = maps.mean((-1, -2))
        return features, states, attention

    def _video_maps(
        self, pixel_values: torch.Tensor, cache: SupportCache | None, num_support: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        (B, V, T, 3, H, W) -> the backbone's maps (B, V, T, C, h, w), and embeddings (B, V, E) to be compared with
        texts, `None` without `text_guidance`.

        A video's do not depend on its episode, but where Cmga-Adapters sit in the backbone: with an empty cache the
        videos are supports and fill it, with a full one they are queries and read it, and without one the first
        `num_support` of an episode are its supports.
        """
        maps, pooled = self._backbone_maps(pixel_values.flatten(0, 2), pixel_values.shape[:3], cache, num_support)
        return maps, None if pooled is None else self.embed_videos(pooled.unflatten(0, pixel_values.shape[:3]))

    def _backbone_maps(self, frames: torch.Tensor, batch: tuple[int, int, int], *of_supports):
        """[`feature_maps`] of this model's backbone."""
        pooling, with_pooled = self.config.frame_pooling, self.text_head is not None
        return feature_maps(self.backbone, frames, batch, *of_supports, pooling=pooling, with_pooled=with_pooled)

    def _encode_videos(self, maps: torch.Tensor, may_fold: bool = False):
        """
        The backbone's maps (B, V, T, C, h, w) -> the last maps, the attention of S-MGA, the maps of every stage. With
        `may_fold` the last maps are the mixer's `MixedMaps`, not kept as a stage, where C-MGA is faster with them.
        """
        batch, maps = maps.shape[:2], maps.flatten(0, 1)
        hidden_states = [maps]
        attention = None
        if self.self_attention is not None:
            maps, attention = self.self_attention(maps)
            attention = attention.unflatten(0, batch)
            hidden_states.append(maps)
        if self.mixer is not None:
            maps = self._mix(maps, may_fold)
            if isinstance(maps, MixedMaps):
                return maps, attention, ()
            hidden_states.append(maps)
        return maps.unflatten(0, batch), attention, tuple(state.unflatten(0, batch) for state in hidden_states)

    def _mix(self, maps: torch.Tensor, may_fold: bool) -> torch.Tensor | MixedMaps:
        fold = may_fold and self.cross_attention is not None and self.cross_attention.prefers_mixed(maps.shape[1:])
        return self.mixer.mix(maps) if fold else self.mixer(maps)

    def _describe(
        self, maps: torch.Tensor | MixedMaps, support: DmgalSupport, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Frame descriptors of queries, (B, Q, T, D), and the attention of C-MGA, `None` without."""
        if self.cross_attention is None:
            return maps.mean((-1, -2)), None
        return self.cross_attention.describe(maps, _cross_keys(support), output_attentions)

    def _match(self, query: torch.Tensor, support: torch.Tensor, labels: torch.Tensor, way: int) -> torch.Tensor:
        config = self.config
        return class_logits(
            query, support, labels, way, config.alignment, config.cosine_epsilon, config.otam_smoothing
        )

    def _check_videos(self, name: str, pixel_values: torch.Tensor):
        check_videos(name, pixel_values, None if self.mixer is None else self.config.num_frames)

    def _check_support(self, pixel_values: torch.Tensor, labels: torch.Tensor | None, way: int | None) -> int:
        """Returns the way."""
        self._check_videos("support_pixel_values", pixel_values)
        return check_support_labels(labels, pixel_values, way, self.config.text_guidance)

    def encode_support(
        self, support_pixel_values: torch.Tensor, support_labels: torch.Tensor, way: int | None = None
    ) -> DmgalSupport:
        """
        Computes everything about the supports that queries need, once.

        Args:
            support_pixel_values (`torch.FloatTensor` of shape `(B, S, T, 3, H, W)`): supports of B episodes.
            support_labels (`torch.LongTensor` of shape `(B, S)`): their classes, 0..N-1, each at least once.
            way (`int`, *optional*): N, as in [`forward`]; with `text_guidance` some classes may have text alone.

        Returns:
            [`DmgalSupport`] to be handed to [`forward`] as `support`.
        """
        way = self._check_support(support_pixel_values, support_labels, way)
        features, states, _ = self._encode_alone(support_pixel_values, SupportCache())
        return DmgalSupport(features, support_labels, way, states)

    def encode_clips(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The half that depends on a clip alone, whichever episodes it is in and as what: [`score_clips`] does the rest.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(V, T, 3, H, W)`): clips.

        Returns:
            `dict` of tensors whose first axis is that of the clips. What begins with "support." is read of a support
            alone, with "query." of a query alone:

            - `features` `(V, T, D)`: frame descriptors of the clip as a support, and as a query before it has read.
            - `cross.motion` `(V, directions, T, P, c)` and `support.cross.values` `(V, T, P, C)`: of C-MGA.
            - `support.*` `(V, T, P, d)`, keys and values of Cmga-Adapters, and the tokens that enter the first block
              with one: `query.prefix` `(V, T, prefix, D)` and `query.patches` `(V, T, h, w, D)`.
        """
        self._check_videos("pixel_values", pixel_values[None])
        cache = SupportCache(keep_tokens=True)
        features, states, _ = self._encode_alone(pixel_values[:, None], cache)  # each an episode of its own
        labels = torch.zeros(features.shape[:2], dtype=torch.int64)
        clips = {name: clip[:, 0] for name, clip in DmgalSupport(features, labels, 1, states).clips().items()}
        if len(cache):
            grid = patch_grid(self.config.backbone_config, pixel_values.shape[-2:])
            prefix, patches = cache.tokens.split([cache.tokens.shape[1] - grid[0] * grid[1], grid[0] * grid[1]], 1)
            clips["query.prefix"] = prefix.unflatten(0, pixel_values.shape[:2])
            clips["query.patches"] = patches.unflatten(1, grid).unflatten(0, pixel_values.shape[:2])
        return clips

    def score_clips(
        self,
        support: Mapping[str, torch.Tensor],
        support_labels: torch.Tensor,
        query: Mapping[str, torch.Tensor],
        way: int | None = None,
    ) -> torch.Tensor:
        """
        The half that depends on the episode: the logits that [`forward`] gives for the same clips.

        Args:
            support (`Mapping` of tensors `(B, S, ...)`): what [`encode_clips`] gave for the supports of B episodes.
            support_labels (`torch.LongTensor` of shape `(B, S)`): their classes, 0..way-1, each at least once.
            query (`Mapping` of tensors `(B, Q, ...)`): the same for the queries.
            way (`int`, *optional*): N, by default read from the labels, for which a GPU has to be waited for.

        Returns:
            `torch.FloatTensor` of shape `(B, Q, N)`: the logits.
        """
        way = int(support_labels.max()) + 1 if way is None else way
        return self._score(DmgalSupport.from_clips(support, support_labels, way), query)

    def _score(self, kept: DmgalSupport, query: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if "query.patches" in query:
            patches = query["query.patches"]
            cache = kept.cache()
            cache.resume = torch.cat([query["query.prefix"].flatten(0, 2), patches.flatten(0, 2).flatten(1, 2)], 1)
            size = frame_size(self.config.backbone_config, patches.shape[3:5])
            stand_in = torch.zeros(1, 3, *size, device=patches.device)
            maps, _ = self._backbone_maps(stand_in.to(self.dtype), patches.shape[:3], cache)
            features, _ = self._describe(self._encode_videos(maps, may_fold=not self.training)[0], kept)
        elif self.cross_attention is not None:
            motion = query["cross.motion"].permute(2, 0, 3, 1, 4, 5)  # (directions, B, T, Q, P, c)
            features, _ = self.cross_attention.read(query["features"], motion, _cross_keys(kept))
        else:
            features = query["features"]
        return self._match(features, kept.features, kept.labels, kept.way)

    @property
    def frames_are_independent(self) -> bool:
        """Whether the backbone sees one frame at a time, so that [`encode_frames`] may be used."""
        return not has_layers(self.backbone, MgaLayer)

    @property
    def has_cross_adapters(self) -> bool:
        """Whether Cmga-Adapters sit in the backbone: a query is then encoded otherwise than a support."""
        return has_layers(self.backbone, CmgaLayer)

    def encode_frames(
        self, pixel_values: torch.Tensor, return_pooled: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """
        The backbone alone, for frames that several overlapping videos share.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(F, 3, H, W)`): frames, normalised by [`DmgalVideoProcessor`].
            return_pooled (`bool`, *optional*, defaults to `False`): also what [`embed_videos`] takes of the frames.

        Returns:
            `torch.FloatTensor` of shape `(F, C, h, w)`: feature maps, for [`score_windows`]. With `return_pooled` also
            a tensor `(F, C)`, `None` without `text_guidance`.

        Raises:
            ValueError: the backbone has adapters, which look at neighbouring frames.
        """
        if not self.frames_are_independent:
            raise ValueError(
                "encode_frames() needs a backbone that sees one frame at a time, but the MGA adapters in this one "
                "compare neighbouring frames: pass whole videos to forward()."
            )
        maps, pooled = self._backbone_maps(pixel_values, (1, len(pixel_values), 1), SupportCache())
        maps = maps.flatten(0, 2)
        return (maps, pooled) if return_pooled else maps

    def embed_videos(self, pooled: torch.Tensor) -> torch.Tensor:
        """Pooled frames `(..., T, C)` -> mean projected frame embeddings `(..., E)`, for [`text_logits`]."""
        return self.text_head.projection(pooled.mean(-2))

    def score_windows(self, maps: torch.Tensor, starts: torch.Tensor, support: DmgalSupport) -> torch.Tensor:
        """
        Scores windows of one long video, each as [`forward`] does as a query by itself. S-MGA of a frame, like the
        backbone before it, is computed once for all windows that share the frame and its neighbours.

        Args:
            maps (`torch.FloatTensor` of shape `(F, C, h, w)`): [`encode_frames`] of the frames of the video.
            starts (`torch.LongTensor` of shape `(Q,)`): the first frame of each window; its T frames follow in `maps`.
                On the CPU, or else the device is waited for.
            support ([`DmgalSupport`]): kept supports of one episode.

        Returns:
            `torch.FloatTensor` of shape `(Q, N)`: the logits.

        Raises:
            ValueError: a window does not lie within the video, or the supports are those of several episodes.
        """
        episodes, _, num_frames = support.features.shape[:3]
        if episodes != 1:
            raise ValueError(f"score_windows() needs the supports of one episode, got those of {episodes}.")
        starts = starts.cpu()  # where what is shared by windows is found, too
        if len(starts) == 0 or int(starts.min()) < 0 or int(starts.max()) + num_frames > len(maps):
            raise ValueError(
                f"starts must be between 0 and {len(maps) - num_frames}, as there are {len(maps)} frames and a window "
                f"has {num_frames}; got {starts.tolist()}."
            )
        index = starts[:, None] + torch.arange(num_frames)
        if self.self_attention is not None:
            maps = self.self_attention.over_windows(maps, index)
        else:
            of_windows = patches(channels_last(maps[None]))[index.to(maps.device)]
            maps = of_windows.transpose(2, 3).unflatten(3, maps.shape[-2:])
        if self.mixer is not None:
            maps = self._mix(maps, may_fold=not self.training)
        query, _ = self._describe(maps if isinstance(maps, MixedMaps) else maps[None], support)
        return self._match(query, support.features, support.labels, support.way)[0]

    def leave_one_out(self, support: DmgalSupport, support_pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """
        Scores every support as a query of its episode without it; in eval mode only, as there is no dropout.

        What is kept of the supports is enough where the backbone encodes queries as it does supports: descriptors and
        motion of a query are those of the support. Only with Cmga-Adapters the videos are needed, and encoded once
        more.

        Args:
            support ([`DmgalSupport`]): kept supports of B episodes, at least two of every class.
            support_pixel_values (`torch.FloatTensor` of shape `(B, S, T, 3, H, W)`, *optional*): their videos.

        Returns:
            `torch.FloatTensor` of shape `(B, S, N)`: the logits.

        Raises:
            ValueError: a class has one support, or the videos are missing.
        """
        if F.one_hot(support.labels, support.way).sum(1).min() < 2:
            raise ValueError("leave_one_out() needs at least two supports of every class; one class has a single one.")
        if self.has_cross_adapters and support_pixel_values is None:
            raise ValueError(
                "leave_one_out() needs support_pixel_values for a model with Cmga-Adapters: it encodes queries "
                "otherwise than supports."
            )
        num_support, clips, logits = support.labels.shape[1], support.clips(), []
        for video in range(num_support):
            own = {name: clip[:, video] for name, clip in clips.items()}
            if self.has_cross_adapters:
                own = self.encode_clips(support_pixel_values[:, video])
            others = support.select([other for other in range(num_support) if other != video])
            logits.append(self._score(others, {name: clip[:, None] for name, clip in own.items()}))
        return torch.cat(logits, 1)

    def embed_class_names(self, labels: Sequence[str], descriptions: Mapping[str, str] | None = None) -> torch.Tensor:
        """
        The text prototypes of classes: for each the mean of the normalised embeddings of `config.text_templates` with
        its label, in which underscores are spaces, or the embedding of its description. The text tower is loaded, runs
        once, and is gone.

        Args:
            labels (`Sequence[str]`): names of the N classes.
            descriptions (`Mapping[str, str]`, *optional*): for some of them a text in place of the templates.

        Returns:
            `torch.FloatTensor` of shape `(N, E)`, float32 on the model's device: one episode of `text_embeds`.

        Raises:
            ValueError: the model has no text head; labels are empty or read the same; a text is longer than the tower
                reads. `OSError` where the text tower is not to be found.
        """
        self.check_text_head()
        texts = class_texts(labels, descriptions, self.config.text_templates)
        tower, tokenizer = self._load_text_tower()
        return embed_classes(tower.to(self.device), tokenizer, texts)

    def _load_text_tower(self):
        self.check_text_head()
        name, folder = (self.config.text_model, "") if self.config.text_model else (self.name_or_path, TEXT_FOLDER)
        if not name:
            raise ValueError(
                "the model does not know its text tower: set model.config.text_model to the id or folder of the model "
                "of two towers."
            )
        return load_text_tower(name, folder)

    def text_logits(self, video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """
        Scores of videos by text, as the pair of towers has learnt them: scale · cosine + bias.

        Args:
            video_embeds (`torch.FloatTensor` of shape `(..., V, E)`): `support_embeds` or `query_embeds` of an output.
            text_embeds (`torch.FloatTensor` of shape `(..., N, E)`): of [`embed_class_names`].

        Returns:
            `torch.FloatTensor` of shape `(..., V, N)`, float32.
        """
        self.check_text_head()
        return self.text_head(video_embeds, text_embeds)

    def check_text_head(self, of: str = ""):
        """Raises `ValueError` without one; `of` is what its message says first."""
        if self.text_head is None:
            check_has_text_tower(self.config.backbone_config)
            raise ValueError(
                f"{of}this model has no text head: build it with DmgalModel.from_backbone(..., text_guidance=True) on "
                "a model of two towers (CLIP, SigLIP, SigLIP2, MetaCLIP 2)."
            )


def _cross_keys(support: DmgalSupport) -> CrossMotionKeys:
    return CrossMotionKeys(support.states["cross.motion"], support.states["cross.values"])


__all__ = ["DmgalModel", "DmgalOutput", "DmgalPreTrainedModel", "DmgalSupport"]
