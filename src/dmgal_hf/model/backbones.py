"""Image backbones from transformers: built, loaded, and adapted with peft while they themselves stay frozen."""

import copy
import inspect
import os
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, MetaClip2VisionModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dmgal import DmgalConfig
from .configuration_mga import MgaConfig, read_adapter_config
from .modeling_mga import MgaModel

# Backbones whose final norm sees the pooled output alone, not the feature maps.
_NORM_AFTER_POOLING = {"convnext", "convnextv2"}
# Models that transformers has and its AutoModel does not know.
_UNLISTED = {"metaclip_2_vision_model": MetaClip2VisionModel}


def _backbone_class(backbone_config: PreTrainedConfig, with_head: bool = False) -> tuple[type[PreTrainedModel], dict]:
    """
    The model class and the arguments that leave out a pooling head: its weights would never get a gradient.
    `with_head` keeps that of SigLIP, by which pictures are compared with texts.
    """
    model_class = check_backbone_config(backbone_config)
    if hasattr(backbone_config, "vision_use_head"):
        backbone_config.vision_use_head = with_head
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return model_class, {"add_pooling_layer": False} if has_pooler else {}


def check_backbone_config(backbone_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The model class. Raises `ValueError` unless it is one of pictures."""
    model_type = backbone_config.model_type
    if type(backbone_config) not in MODEL_MAPPING and model_type not in _UNLISTED:
        raise ValueError(f"transformers has no model for a backbone_config of type {model_type!r}.")
    model_class = _UNLISTED.get(model_type) or MODEL_MAPPING[type(backbone_config)]
    if model_class.main_input_name != "pixel_values":
        raise ValueError(f"backbone_config is of type {model_type!r}, no model of pictures.")
    return model_class


def build_backbone(backbone_config: PreTrainedConfig, with_head: bool = False) -> PreTrainedModel:
    """A backbone with random weights; `with_head` as texts need it."""
    model_class, kwargs = _backbone_class(backbone_config, with_head)
    # Not in the dtype that its config may tell, of weights that somebody stored: in that of the model around it.
    return model_class._from_config(backbone_config, dtype=None, **kwargs)


def load_backbone(name_or_path: str | os.PathLike) -> PreTrainedModel:
    """A pretrained backbone; of a model of several towers (CLIP, SigLIP) that of the pictures, of DMGAL-FT its own."""
    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type == DmgalConfig.model_type:
        return _backbone_of_checkpoint(name_or_path)
    config = getattr(config, "vision_config", config)
    model_class, kwargs = _backbone_class(config)
    # Also where it was stored in half precision: what is built around it is not, and adapters train badly so.
    return model_class.from_pretrained(name_or_path, config=config, dtype=torch.float32, **kwargs)


def _backbone_of_checkpoint(name_or_path: str | os.PathLike) -> PreTrainedModel:
    """That of a checkpoint of DMGAL, free to train. Raises `ValueError` if adapters are in it."""
    backbone = AutoModel.from_pretrained(name_or_path, dtype=torch.float32).backbone
    if has_adapters(backbone):
        raise ValueError(
            f"the backbone of {name_or_path} has adapters in it: give the backbone that they were trained for."
        )
    return backbone.requires_grad_()


def load_towers(name_or_path: str | os.PathLike) -> PreTrainedModel:
    """A pretrained model as it is stored, of both towers where it has them."""
    return AutoModel.from_pretrained(name_or_path, dtype=torch.float32)


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """That of the pictures of a model of several towers; any other model itself."""
    return model.vision_model if hasattr(model.config, "vision_config") and hasattr(model, "vision_model") else model


def without_pooler(backbone: PreTrainedModel) -> PreTrainedModel:
    """The same backbone, its weights shared, without a pooling layer that may have random weights and is not read."""
    if getattr(backbone, "pooler", None) is None or not list(backbone.pooler.parameters()):
        return backbone
    twin = copy.copy(backbone)
    twin._modules = {**backbone._modules, "pooler": None}  # the one that was given keeps its own
    return twin


def freeze_unread(backbone: PreTrainedModel):
    """Freezes what the last feature maps do not depend on: torch's DDP waits for gradients, and none come there."""
    unread = ("pooler.", "head.")
    if backbone.config.model_type in _NORM_AFTER_POOLING:
        unread += ("layernorm.",)
    for name, parameter in backbone.named_parameters():
        if name.startswith(unread) or name.endswith("mask_token"):
            parameter.requires_grad_(False)


def add_adapters(backbone: PreTrainedModel, adapter_config: dict[str, Any]) -> dict[str, Any]:
    """
    Puts adapters into a backbone, which leaves nothing but them trainable.

    Args:
        backbone (`PreTrainedModel`): is changed in place.
        adapter_config (`dict`): see [`DmgalConfig`].

    Returns:
        `dict`: the same with a rank in place of a budget.

    Raises:
        ValueError: the adapters do not fit the backbone or the budget.
    """
    if "budget" in adapter_config:
        adapter_config = _spend_budget(backbone.config, adapter_config)
    _inject(backbone, read_adapter_config(adapter_config))
    return adapter_config


def _inject(backbone: PreTrainedModel, config: PeftConfig):
    if isinstance(config, MgaConfig):
        # Not by way of peft's register: where checkpoints bring their own code, it may hold the layers of another one.
        MgaModel(backbone, config, "default")
    else:
        inject_adapter_in_model(config, backbone)


def _spend_budget(backbone_config: PreTrainedConfig, adapter_config: dict[str, Any]) -> dict[str, Any]:
    adapter_config = dict(adapter_config)
    budget = _count_parameters(backbone_config, adapter_config.pop("budget"))
    of_rank_one = _count_parameters(backbone_config, adapter_config | {"r": 1})
    rank = budget // of_rank_one
    if rank < 1:
        raise ValueError(
            f"adapter_config: LoRA of rank 1 has {of_rank_one:,} parameters, more than the budget of {budget:,}: "
            "name fewer target_modules."
        )
    return {"lora_alpha": rank, **adapter_config, "r": rank}


def _count_parameters(backbone_config: PreTrainedConfig, adapter_config: dict[str, Any]) -> int:
    """Trainable parameters of adapters, found without memory for them."""
    with torch.device("meta"):
        backbone = build_backbone(backbone_config)
        _inject(backbone, read_adapter_config(adapter_config))
    return sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)


def has_adapters(backbone: nn.Module) -> bool:
    """Whether peft has put layers into it."""
    return any(isinstance(module, BaseTunerLayer) for module in backbone.modules())


def train_adapters(backbone: nn.Module):
    """Puts the adapters into training mode and the backbone around them into eval mode."""
    backbone.eval()
    for module in backbone.modules():
        if isinstance(module, BaseTunerLayer):
            module.training = True
            for name, child in module.named_children():
                if name != "base_layer":
                    child.train()
        elif isinstance(module, GradientCheckpointingLayer) or getattr(module, "gradient_checkpointing", False):
            module.training = True  # the block itself only looks here whether to checkpoint, now or once asked to
