"""How a model starts, from nothing or from a backbone of pictures, and how it is loaded and saved."""

import math
import os
import warnings

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers import initialization as init

from .backbones import check_backbone_config, has_adapters, load_backbone, load_towers, vision_tower, without_pooler
from .class_texts import TEXT_FOLDER, TextHead, check_has_text_tower, has_text_tower
from .configuration_dmgal import DmgalConfig
from .modeling_mga import CLASS_TOKENS
from .motion_attention import CrossMotionAttention, HiddenFrames, SelfMotionAttention


class DmgalPreTrainedModel(PreTrainedModel):
    """
    What every model of DMGAL shares with transformers: config, weights and how they start.

    Example:

    ```python
    >>> from dmgal_hf import DmgalModel, DmgalPreTrainedModel

    >>> issubclass(DmgalModel, DmgalPreTrainedModel)
    True
    ```
    """

    config_class = DmgalConfig
    base_model_prefix = "dmgal"
    main_input_name = "query_pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SelfMotionAttention", "TemporalChannelMixer", "CrossMotionAttention"]

    @torch.no_grad()
    def _init_weights(self, module):
        # As the authors: convolutions by their fan-out, both attentions switched off at first (gamma = 0).
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        elif isinstance(module, HiddenFrames):
            init.eye_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, TextHead):
            init.constant_(module.logit_scale, math.log(1 / 0.07))
            init.zeros_(module.logit_bias)
        elif isinstance(module, SelfMotionAttention):
            init.zeros_(module.gamma)
        elif isinstance(module, CrossMotionAttention):
            init.zeros_(module.gamma_self)
            init.zeros_(module.gamma_cross)
        else:
            super()._init_weights(module)  # norms

    def _freeze(self):
        """Paradigm "adapter": what peft made trainable remains so, and nothing else. The text head never is."""
        if self.text_head is not None:
            self.text_head.requires_grad_(False)
        if self.config.paradigm == "adapter":
            for name, parameter in self.backbone.named_parameters():
                parameter.requires_grad_(name in self._adapter_parameters)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a frozen backbone comes back frozen, and adapters without weights are refused."""
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # transformers would leave them as the memory happened to be: the backbone cannot initialise them.
        of_adapters = {f"backbone.{name}" for name in model._adapter_parameters}
        lacking = sorted(of_adapters.intersection(report["missing_keys"]))
        if lacking:
            raise ValueError(
                f"The checkpoint lacks weights of its adapters ({len(lacking)}): {', '.join(lacking[:3])} ..."
            )
        model._freeze()
        return (model, report) if output_loading_info else model

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike | PreTrainedModel, **kwargs) -> "DmgalPreTrainedModel":
        """
        Starts from a pretrained image backbone.

        Args:
            backbone (`str`, `os.PathLike`, `PreTrainedModel` or `PeftModel` of one):
                A model id, a folder, or a loaded transformers vision model. Of a model of several towers (CLIP,
                SigLIP) the vision tower is taken, of a stored checkpoint of DMGAL its backbone.
            kwargs:
                Fields of [`DmgalConfig`]. With `text_guidance=True` the head by which the two towers compare pictures
                with texts comes along, and `text_model` names where the text tower is read when it is needed.

        Raises:
            ValueError: the backbone has no known vision configuration, or no text tower with `text_guidance`; or it
                is that of a checkpoint with adapters in it.
        """
        if "paradigm" not in kwargs:
            warnings.warn(
                'paradigm="ft", the default, puts S-MGA, mixer and C-MGA with random weights on this backbone, to be '
                'trained; paradigm="adapter" matches its frames as they are.',
                stacklevel=2,
            )
        if isinstance(backbone, PeftModel):
            backbone = backbone.get_base_model()  # the adapters stay in it
        if not isinstance(backbone, PreTrainedModel):
            backbone = load_towers(backbone) if kwargs.get("text_guidance") else load_backbone(backbone)
        towers, backbone = backbone, vision_tower(backbone)
        check_backbone_config(backbone.config)
        if towers is not backbone:
            backbone.name_or_path = backbone.config._name_or_path = towers.name_or_path
        if kwargs.get("text_guidance"):
            kwargs["text_model"] = kwargs.get("text_model") or model_id(towers)
            if towers is backbone:
                check_has_text_tower(backbone.config)
                raise ValueError(
                    f"text_guidance needs both towers, and {towers.name_or_path or type(towers).__name__!r} is the "
                    "vision tower alone: give the whole model."
                )
            if hasattr(towers, "visual_projection"):
                backbone.config.projection_dim = towers.visual_projection.out_features
        attn_implementation = backbone.config._attn_implementation
        config = DmgalConfig(backbone_config=backbone.config, **kwargs)
        config._attn_implementation = attn_implementation  # a new config has none, and none for its parts
        model = cls(config, backbone=backbone)
        if model.text_head is not None:
            model.text_head.take_over(towers)
        for name, part in model.named_children():
            if name != "backbone":
                part.to(backbone.dtype)
        model.name_or_path = towers.name_or_path  # what peft notes as the base model of an adapter
        return model

    @classmethod
    def untrained(cls, backbone: str | os.PathLike | PreTrainedModel, **kwargs) -> "DmgalPreTrainedModel":
        """
        A frozen public backbone with prototype matching, ready to use: the class token where there is one, else the
        mean over the patches, and names of classes as text where there is a text tower. It warns that nothing in it
        was trained for videos.

        Args:
            backbone (`str`, `os.PathLike` or `PreTrainedModel`): as in [`from_backbone`].
            kwargs: fields of [`DmgalConfig`], in place of those that are chosen here.

        Returns:
            [`DmgalModel`] in eval mode.
        """
        is_object = isinstance(backbone, PreTrainedModel)
        config = backbone.config if is_object else AutoConfig.from_pretrained(backbone)
        name = (backbone.name_or_path or type(backbone).__name__) if is_object else os.fspath(backbone)
        vision = getattr(config, "vision_config", config)
        # The text tower of an object is read again by its name.
        with_text = vision is not config and has_text_tower(vision) and bool(not is_object or backbone.name_or_path)
        chosen = {"paradigm": "adapter", "text_guidance": with_text}
        chosen["frame_pooling"] = "cls" if CLASS_TOKENS.get(vision.model_type) else "mean"
        model = cls.from_backbone(without_pooler(backbone) if is_object else backbone, **{**chosen, **kwargs})
        warnings.warn(
            f"{name} is a backbone of pictures that nothing here has trained: its frames are matched as they are, and "
            "it sees no motion.",
            stacklevel=2,
        )
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, *args, with_text_tower: bool = False, **kwargs):
        """
        As in transformers. With `text_guidance` the checkpoint holds the text tower itself on request, and if it came
        from one that did; else its name alone. Raises `ValueError` for adapters that config.json would not describe.
        """
        added_later = getattr(self.backbone, "_hf_peft_config_loaded", False)
        if added_later or (self.config.adapter_config is None and has_adapters(self.backbone)):
            raise ValueError(
                "model.backbone has adapters of its own, which config.json does not describe: save them with the "
                "PeftModel they were put in by, or, those of its own load_adapter() or add_adapter(), with "
                f"model.backbone.save_pretrained({os.fspath(save_directory)!r})."
            )
        if with_text_tower or (self.text_head is not None and not self.config.text_model and self.name_or_path):
            for part in self._load_text_tower():
                part.save_pretrained(os.path.join(save_directory, TEXT_FOLDER))
        name = self.config.text_model
        self.config.text_model = None if with_text_tower else name
        super().save_pretrained(save_directory, *args, **kwargs)
        self.config.text_model = name


def model_id(model: PreTrainedModel) -> str | None:
    """Id or absolute folder of the checkpoint, None for a model that has none."""
    name = getattr(model, "name_or_path", None)
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None
