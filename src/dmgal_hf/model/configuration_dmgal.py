"""DMGAL model configuration."""

import difflib
import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ResNetConfig
from transformers.utils import logging

from .configuration_mga import read_adapter_config, spelling_hint

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
TEXT_TEMPLATES = ("a video of {}.", "a video of a person doing {}.", "a photo of {}.")  # ours

# What transformers itself hands to a config in code besides the declared fields.
_TRANSFORMERS_KEYS = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "torch_dtype",
    "transformers_version",
}


class DmgalConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DmgalModel`]: the image backbone, the paradigm and every switch an ablation needs.

    A keyword that is none of these is an error. A field of another name that comes from a file (`from_pretrained`,
    `from_dict`), where another tool or a newer transformers has put it, or that is set as an attribute, is kept and
    saved again; one that looks like a mistyped field of ours is warned of.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`, *optional*, defaults to ResNet-50):
            Config of a transformers vision model that ends in a feature map or in a token a patch: ResNet, ConvNeXt,
            ViT, CLIP vision, DINOv2, DINOv3, SigLIP vision, ...
        paradigm (`str`, *optional*, defaults to `"ft"`):
            `"ft"` (DMGAL-FT: S-MGA, mixer and C-MGA on top of a backbone, all weights train) or `"adapter"`
            (DMGAL-Adapter: a frozen ViT with Smga- and Cmga-Adapters inside).
        num_frames (`int`, *optional*, defaults to 8):
            Frames a video, T.
        motion_reduction (`int`, *optional*, defaults to 8):
            Channel reduction r of the motion features: they have C / r channels.
        motion_directions (`str`, *optional*, defaults to `"both"`):
            `"both"`, `"forward"` or `"backward"`: which frame differences give attention scores.
        motion_scales (`list[str]`, *optional*, defaults to `["half", "full"]`):
            Which convolved scales are averaged with the plain difference: any of `"half"` and `"full"`.
        self_motion_attention (`bool`, *optional*, defaults to `True`):
            S-MGA, attention within a video ("ft" only; adapters have switches of their own).
        mixer (`bool`, *optional*, defaults to `True`):
            The temporal and channel mixer between the two ("ft" only). It fixes the number of frames.
        cross_motion_attention (`bool`, *optional*, defaults to `True`):
            C-MGA, attention of the queries to all supports of the episode ("ft" only).
        attention_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the attention weights.
        position_dropout (`float`, *optional*, defaults to 0.1):
            Dropout on the motion features after the position code was added (S-MGA).
        position_scale (`float`, *optional*, defaults to 0.1):
            Factor of the sinusoidal position code (S-MGA).
        alignment (`str`, *optional*, defaults to `"bi_mhm"`):
            How two frame sequences are compared: `"bi_mhm"` (bidirectional mean Hausdorff), `"otam"` or `"mean"`
            (mean-pooled prototypes).
        cosine_epsilon (`float`, *optional*, defaults to 0.01):
            Added to the denominator of the cosine, as the authors do.
        otam_smoothing (`float`, *optional*, defaults to 0.1):
            Temperature of the soft minimum of OTAM.
        frame_pooling (`str`, *optional*, defaults to `"mean"`):
            The descriptor of a frame: `"mean"` over the patches or the class token, `"cls"`.
        adapter_config (`dict`, *optional*):
            Fields of [`MgaConfig`] for the adapters inside the backbone (paradigm "adapter"). `None` leaves the plain
            frozen backbone with prototype matching: the zero-training baseline, and what peft attaches adapters to.
            `{"peft_type": "LORA", ...}` with fields of peft's LoraConfig is the baseline of LoRA adapters. In place
            of its `r` a `budget`, fields of [`MgaConfig`], asks for the largest rank that has no more parameters than
            those MGA adapters (and `lora_alpha` equal to it, unless given); a model that is built notes the rank here.
        score_temperature (`float`, *optional*, defaults to 1.0):
            Scores of the pipeline are softmax(logits / score_temperature).
        text_guidance (`bool`, *optional*, defaults to `False`):
            Whether names of classes take part as text, for a backbone with a text tower beside it (CLIP, SigLIP,
            SigLIP2, MetaCLIP 2). The model then has that pair's own head, and `forward` takes `text_embeds`.
        text_weight (`float`, *optional*, defaults to 1.0):
            Weight, 0 or more, of the log-probabilities by text beside those by clips.
        text_templates (`list[str]`, *optional*):
            Texts with one `{}` each for the label; a class's prototype is the mean of their embeddings.
        text_model (`str`, *optional*):
            Id or folder of the model of two towers whose text tower embeds the names. `None` with `text_guidance`:
            it lies in the folder `text_tower` of the checkpoint.
        format_version (`int`, *optional*):
            Version of the checkpoint format. One that is newer than this release understands is refused.

    Raises:
        ValueError: a field is unknown or has a value that is not allowed; the message names both.

    Example:

    ```python
    >>> from transformers import ResNetConfig
    >>> from dmgal_hf import DmgalConfig, DmgalModel

    >>> config = DmgalConfig(backbone_config=ResNetConfig(depths=[1, 1], hidden_sizes=[32, 64], layer_type="basic"))
    >>> model = DmgalModel(config)
    ```"""

    model_type = "dmgal"
    sub_configs = {"backbone_config": AutoConfig}
    # The predictions of transformers.Trainer are what is left of the output: the logits.
    keys_to_ignore_at_inference = ["support_features", "query_features", "attentions", "hidden_states", "text_logits",
                                   "support_embeds", "query_embeds"]  # fmt: skip

    backbone_config: dict | PreTrainedConfig | None = None
    paradigm: str = "ft"
    num_frames: int = 8
    motion_reduction: int = 8
    motion_directions: str = "both"
    motion_scales: list[str] | tuple[str, ...] = ("half", "full")
    self_motion_attention: bool = True
    mixer: bool = True
    cross_motion_attention: bool = True
    attention_dropout: float = 0.1
    position_dropout: float = 0.1
    position_scale: float = 0.1
    alignment: str = "bi_mhm"
    cosine_epsilon: float = 0.01
    otam_smoothing: float = 0.1
    frame_pooling: str = "mean"
    adapter_config: dict | None = None
    score_temperature: float = 1.0
    text_guidance: bool = False
    text_weight: float = 1.0
    text_templates: list[str] | tuple[str, ...] = TEXT_TEMPLATES
    text_model: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, _from_file: bool = False, **kwargs):
        self._check_version()
        if not _from_file:
            self._check_unknown(kwargs)
        self.backbone_config = self._build_backbone_config(self.backbone_config)
        self._check_values()
        self.motion_scales = list(self.motion_scales)
        self.text_templates = list(self.text_templates)
        super().__post_init__(**kwargs)

    def _check_version(self):
        if not isinstance(self.format_version, int) or self.format_version < 1:
            raise ValueError(f"format_version must be a positive integer, got {self.format_version!r}.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has format version {self.format_version}; this release of dmgal_hf reads up to "
                f"{FORMAT_VERSION}. Update it with `pip install -U dmgal-hf`."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; what a file holds beside our fields is kept."""
        return super().from_dict({**config_dict, "_from_file": True}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As in transformers; what a file holds beside our fields is kept."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def __setattr__(self, name: str, value: Any):
        ours = name.startswith("_") or name in self.__dataclass_fields__ or hasattr(self, name)
        if not ours and (close := difflib.get_close_matches(name, self._field_names(), 1, cutoff=0.8)):
            logger.warning_once(
                f"DmgalConfig has no field {name!r} (value {value!r}): it is kept and has no effect here. "
                f"Did you mean {close[0]!r}?"
            )
        super().__setattr__(name, value)

    @classmethod
    def _field_names(cls) -> list[str]:
        return sorted(name for name in cls.__dataclass_fields__ if not name.startswith("_"))

    def _check_unknown(self, kwargs):
        for name in kwargs:
            if name not in _TRANSFORMERS_KEYS:
                hint = spelling_hint(name, self._field_names())
                raise ValueError(f"DmgalConfig has no field {name!r} (value {kwargs[name]!r}). {hint}")

    @staticmethod
    def _build_backbone_config(backbone_config):
        if backbone_config is None:
            return ResNetConfig()
        if isinstance(backbone_config, PreTrainedConfig):
            return backbone_config
        if not isinstance(backbone_config, dict) or "model_type" not in backbone_config:
            raise ValueError(
                "backbone_config must be a transformers config or a dict with a 'model_type', got "
                f"{backbone_config!r}."
            )
        fields = dict(backbone_config)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def _check_values(self):
        choices = {
            "paradigm": ("ft", "adapter"),
            "motion_directions": ("both", "forward", "backward"),
            "alignment": ("bi_mhm", "otam", "mean"),
            "frame_pooling": ("mean", "cls"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("self_motion_attention", "mixer", "cross_motion_attention", "text_guidance"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        for name in ("num_frames", "motion_reduction"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
        for name in ("attention_dropout", "position_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value!r}.")
        for name in ("position_scale", "cosine_epsilon"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value!r}.")
        for name in ("otam_smoothing", "score_temperature"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"{name} must be more than 0, got {value!r}.")
        check_text_weight(self.text_weight)
        self._check_templates()
        scales = self.motion_scales
        if not isinstance(scales, (list, tuple)) or set(scales) - {"half", "full"} or len(set(scales)) < len(scales):
            raise ValueError(f"motion_scales must list 'half' and 'full' at most once each, got {scales!r}.")
        adapters = self.adapter_config
        if adapters is not None:
            if not isinstance(adapters, dict):
                raise ValueError(f"adapter_config must be a dict of MgaConfig fields or null, got {adapters!r}.")
            read_adapter_config(adapters)
            if self.paradigm == "ft":
                raise ValueError("adapter_config needs paradigm='adapter'; with paradigm='ft' leave it out.")
        if self.paradigm == "ft" and self.frame_pooling == "cls":
            raise ValueError(
                "frame_pooling must be 'mean' with paradigm='ft', got 'cls': S-MGA and C-MGA work on the patches."
            )

    def _check_templates(self):
        templates = self.text_templates
        if not isinstance(templates, (list, tuple)) or not templates:
            raise ValueError(f"text_templates must list at least one text, got {templates!r}.")
        for template in templates:
            if not isinstance(template, str) or template.count("{}") != 1 or template.count("{") != 1:
                raise ValueError(f"text_templates: each must have one '{{}}' for the label, got {template!r}.")


def check_text_weight(value: float) -> float:
    """Raises `ValueError` unless it lies in [0, inf)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"text_weight must lie in [0, inf), got {value!r}.")
    return float(value)


__all__ = ["DmgalConfig"]
