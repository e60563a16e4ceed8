"""The model of a few-shot classifier: bare backbones made one, the processor with it, and what names it again."""

import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from ..model.backbones import has_adapters
from ..model.configuration_dmgal import DmgalConfig
from ..model.modeling_dmgal import DmgalModel
from ..model.pretrained_dmgal import model_id
from ..model.video_processing_dmgal import DmgalVideoProcessor

TASK = "few-shot-video-classification"
UNNAMED_MODEL = "a model that was never saved or got adapters afterwards"
MODEL_FOLDER = "support_model"  # beside a support set, see `goes_beside`


def classifier_model(
    model: Any, image_processor: Any, fields: Mapping[str, Any]
) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
    """
    A model that classifies by clips, made of a bare backbone with these `fields` of [`DmgalConfig`], and the processor
    of its frames. Raises `ValueError` for anything else, and says what can be done.
    """
    if hasattr(model, "encode_support"):
        if fields:
            raise ValueError(f"model_fields are for a bare backbone, and this is a DmgalModel: {dict(fields)}")
        return model, image_processor
    problem = f"{TASK!r} needs a DmgalModel, not a {type(model).__name__}"
    remedy = (
        'choose a DMGAL checkpoint, or an image backbone that DmgalModel.from_backbone(X, paradigm="adapter") takes'
    )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{problem}: {remedy}.")
    try:
        model = DmgalModel.untrained(model, **fields)
    except ValueError as error:
        raise ValueError(f"{problem} ({str(error).rstrip('.')}): {remedy}.") from error
    if isinstance(image_processor, BaseImageProcessor) and not isinstance(image_processor, DmgalVideoProcessor):
        # The backbone's own, which `pipeline()` has loaded.
        fields = image_processor.to_dict()
        image_processor = DmgalVideoProcessor.from_dict(fields, num_frames=model.config.num_frames)
    return model, image_processor


def find_processor(model: PreTrainedModel, given: Any) -> DmgalVideoProcessor:
    """What is `given`, an object, a folder or an id; else that of the checkpoint. Raises `ValueError` without one."""
    if isinstance(given, (str, os.PathLike)):
        return DmgalVideoProcessor.from_pretrained(given)
    if isinstance(given, DmgalVideoProcessor):
        return given
    if given is not None:
        raise ValueError(f"image_processor must be a DmgalVideoProcessor, got a {type(given).__name__}.")
    name = model_id(model)
    if not name:
        raise ValueError(
            "the model does not come from a checkpoint, so there is no processor to go with it: pass "
            "image_processor=DmgalVideoProcessor(...)."
        )
    try:
        return DmgalVideoProcessor.from_pretrained(name, revision=model_revision(model))
    except OSError as error:
        raise ValueError(
            f"{name} has no preprocessor_config.json: save its DmgalVideoProcessor there, or pass image_processor=."
        ) from error


def kept_model_id(model: PreTrainedModel) -> str | None:
    """[`model_id`] if that checkpoint alone gives the model, None if it never was one or got adapters afterwards."""
    return None if _has_later_adapters(model) or goes_beside(model) else model_id(model)


def goes_beside(model: PreTrainedModel) -> bool:
    """
    Whether a support set keeps the model itself: from_backbone() gave it random weights, which no checkpoint has, or
    it comes from such a set.
    """
    if _has_later_adapters(model):
        return False
    built_here = _is_of_backbone(model) and (model.config.paradigm != "adapter" or has_adapters(model.backbone))
    return built_here or os.path.basename(model_id(model) or "") == MODEL_FOLDER


def _has_later_adapters(model: PreTrainedModel) -> bool:
    # peft calls the model in itself by the name of the checkpoint; transformers' own load_adapter() marks the model.
    return isinstance(model, PeftModel) or getattr(model.backbone, "_hf_peft_config_loaded", False)


def fields_of_untrained(model: PreTrainedModel) -> dict[str, Any] | None:
    """
    What `DmgalModel.untrained` needs beside the backbone to give this model again; `None` for one of a checkpoint.
    """
    if not _is_of_backbone(model) or kept_model_id(model) is None:
        return None
    names = set(DmgalConfig.__annotations__) & set(DmgalConfig.__dataclass_fields__)
    left_out = {"backbone_config", "adapter_config", "format_version", "text_model"}
    return {name: getattr(model.config, name) for name in sorted(names - left_out)}


def _is_of_backbone(model: PreTrainedModel) -> bool:
    """Whether it is named after its backbone, as by from_backbone(), and not after a checkpoint of its own."""
    return bool(model.name_or_path) and model.name_or_path == model.backbone.name_or_path


def model_revision(model: PreTrainedModel) -> str | None:
    """Commit of the checkpoint on the Hub; transformers no longer keeps it, and then it is that of the cached main."""
    name = model_id(model)
    if name is None or os.path.isabs(name):
        return None
    cached = try_to_load_from_cache(name, "config.json")
    known = getattr(model.config, "_commit_hash", None)
    return extract_commit_hash(cached if isinstance(cached, str) else None, known)
