"""How `from_pretrained` brings the weights of a checkpoint into a model that was built without memory for them."""

import torch
from torch import nn
from transformers import PreTrainedModel

try:  # internals, which may move; a checkpoint that brings this source along is still to load then, if more slowly
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.modeling_utils import load_state_dict
    from transformers.utils.loading_report import LoadStateDictInfo
except ImportError:
    rename_source_key = None


def load_weights(
    model: PreTrainedModel, state_dict: dict | None, checkpoint_files: list[str] | None, load_config, *args, **kwargs
) -> tuple[LoadStateDictInfo, dict | None]:
    """
    As `PreTrainedModel._load_pretrained_model`, but weights that are taken as they are take a short way.

    transformers schedules each tensor by itself: with the many small ones of adapters, that takes longer than all else
    that `from_pretrained` does. It is left with the tensors that need more than a place, and with all of them where
    they are asked for on a device, quantized or shared out.
    """
    short = (
        rename_source_key is not None
        and state_dict is None
        and bool(checkpoint_files)
        and all(file.endswith(".safetensors") for file in checkpoint_files)
        and load_config.hf_quantizer is None
        and load_config.device_map is None
        and load_config.device_mesh is None
        and not load_config.dtype_plan
    )
    if not short:
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )
    steps = load_config.weight_mapping or []
    missing, left = place_weights(model, checkpoint_files, steps, load_config.disable_mmap)
    if not left:
        model._weight_conversions = [step for step in steps if step.was_used()]  # saving takes them back
        return LoadStateDictInfo(missing, set(), set(), [], {}, set()), None
    loading_info, offloaded = PreTrainedModel._load_pretrained_model(model, left, None, load_config, *args, **kwargs)
    loading_info.missing_keys &= missing
    return loading_info, offloaded


def place_weights(
    model: PreTrainedModel, files: list[str], steps: list, disable_mmap: bool | None
) -> tuple[set[str], dict[str, torch.Tensor]]:
    """
    Puts each tensor that has the name and the shape of a weight on the meta device in its place, in that one's dtype.

    Args:
        model (`PreTrainedModel`): is changed in place.
        files (`list[str]`): safetensors files.
        steps (`list`): how transformers renames and converts the tensors of this kind of model; only its renaming is
            followed here.
        disable_mmap (`bool`, *optional*): as in `from_pretrained`.

    Returns:
        `tuple[set[str], dict[str, torch.Tensor]]`: the names of the weights that are still to come, and the tensors
        that are left, by their names in the files.
    """
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    modules, weights = dict(model.named_modules()), model.state_dict(keep_vars=True)
    missing, left = set(weights), {}
    for file in files:
        for key, tensor in load_state_dict(file, disable_mmap=disable_mmap).items():
            name, conversion = rename_source_key(key, renamings, converters, model.base_model_prefix, weights)
            weight = weights.get(name)
            if conversion or weight is None or not weight.is_meta or weight.shape != tensor.shape:
                left[key] = tensor
                continue
            tensor = tensor.to(weight.dtype)
            if isinstance(weight, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=weight.requires_grad)
            tensor._is_hf_initialized = True  # transformers initialises what does not have this mark
            module, _, own_name = name.rpartition(".")
            setattr(modules[module], own_name, tensor)
            missing.discard(name)
    return missing, left
