"""What training starts from: random weights, a backbone, or a checkpoint of DMGAL or of adapters alone."""

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..model.configuration_dmgal import DmgalConfig
from ..model.configuration_mga import read_adapter_config
from ..model.modeling_dmgal import DmgalModel
from ..model.video_processing_dmgal import DmgalVideoProcessor
from .arguments import DataArguments, ModelArguments, TrainArguments


def settle_arguments(
    data: DataArguments, model: ModelArguments, arguments: TrainArguments
) -> tuple[DataArguments, ModelArguments]:
    """
    The arguments with what others of them decide: the checkpoint `init_from` stands in for every field that was not
    given, and `text_loss_weight` sets `text_guidance`.

    Raises:
        ValueError: fields that were given do not fit the checkpoint, all of them named, or it is none of DMGAL; or
            head_only has nothing to freeze, or leaves text_loss_weight or backbone_learning_rate nothing to train.
    """
    if model.init_from is not None:
        there = _fields_of_checkpoint(model.init_from)
        if differences := list(_differences(model, there)):
            raise ValueError(
                f"{model.init_from} does not fit the arguments: {'; '.join(differences)}. Leave these out, or train "
                "without init_from."
            )
        processor = _load_processor(model.init_from, there.get("backbone"))
        sizes = {"resize": min(processor.size.values()), "crop_size": processor.crop_size["height"]}
        data = replace(data, **{name: size for name, size in sizes.items() if name not in data.given})
        there.pop("backbone_config", None)  # the checkpoint has it
        model = replace(model, **there)
    if arguments.head_only and model.paradigm != "ft":
        raise ValueError("head_only is for paradigm ft: with adapter the backbone is frozen anyway, leave it out.")
    if arguments.backbone_learning_rate is not None and (arguments.head_only or model.paradigm != "ft"):
        raise ValueError(
            "backbone_learning_rate: with paradigm adapter or head_only the backbone stays as it is, leave it out."
        )
    if arguments.head_only and arguments.text_loss_weight > 0:
        raise ValueError("text_loss_weight trains the backbone alone, which head_only keeps as it is: leave one out.")
    if arguments.text_loss_weight > 0:
        model = replace(model, text_guidance=True)
    return data, model


def build_model(model: ModelArguments, data: DataArguments) -> tuple[DmgalModel, DmgalVideoProcessor]:
    """The model to train and its processor; what is pretrained brings its own normalisation."""
    fields = {"num_frames": model.num_frames, "size": data.resize, "crop_size": data.crop_size}
    fields |= {name: getattr(data, name) for name in ("image_mean", "image_std") if getattr(data, name) is not None}
    if model.init_from is not None:
        return _load_start(model, **fields)
    if model.backbone is not None:
        processor = DmgalVideoProcessor.from_pretrained(model.backbone, **fields)
        return DmgalModel.from_backbone(model.backbone, **model.config_fields()), processor
    if model.text_guidance:
        raise ValueError(
            "text_guidance and text_loss_weight need a pretrained backbone with a text tower beside it (CLIP, SigLIP, "
            "SigLIP2, MetaCLIP 2), and this one has random weights: give backbone its id or folder, or leave them out."
        )
    config = DmgalConfig(backbone_config=model.backbone_config, **model.config_fields())
    return DmgalModel(config), DmgalVideoProcessor(**fields)


def _load_start(model: ModelArguments, **processor_fields: Any) -> tuple[DmgalModel, DmgalVideoProcessor]:
    """
    The model of `init_from` and its processor, by settled arguments.

    Raises:
        ValueError: names are to take part as text, and did not in the checkpoint; or adapters lack weights.
    """
    is_adapter = find_adapter_config_file(model.init_from) is not None
    processor = _load_processor(model.init_from, model.backbone, **processor_fields)
    if is_adapter:
        network = DmgalModel.from_backbone(model.backbone, **model.config_fields())
        _load_adapters(network, model.init_from)
    else:
        network = DmgalModel.from_pretrained(model.init_from, dtype=torch.float32)
    if model.text_guidance and network.text_head is None:
        raise ValueError(
            f"text_loss_weight needs a model in which names take part as text, and {model.init_from} was trained "
            "without text_guidance: leave text_loss_weight out, or train without init_from."
        )
    return network, processor


def _fields_of_checkpoint(name: str) -> dict[str, Any]:
    """Fields of [`ModelArguments`] as the checkpoint has them; adapters alone do not know all."""
    if find_adapter_config_file(name) is not None:
        adapters = PeftConfig.from_pretrained(name)
        base = adapters.base_model_name_or_path
        if not base:
            raise ValueError(
                f"the adapters of {name} do not say which backbone they are for: set base_model_name_or_path in their "
                "adapter_config.json."
            )
        if isinstance(AutoConfig.from_pretrained(base), DmgalConfig):
            raise ValueError(
                f"the adapters of {name} are for {base}, a checkpoint of DMGAL: start from that, or from adapters of "
                "a bare backbone."
            )
        return {
            "paradigm": "adapter",
            "adapter_config": _adapter_fields(adapters),
            "num_frames": _load_processor(name, base).num_frames,
            "backbone": os.path.abspath(base) if os.path.isdir(base) else base,
        }
    config = AutoConfig.from_pretrained(name)
    if not isinstance(config, DmgalConfig):
        raise ValueError(
            f"init_from {name} is of type {config.model_type!r} and no checkpoint of DMGAL: give an image backbone as "
            "backbone."
        )
    names = ModelArguments().config_fields()
    return {name: getattr(config, name) for name in names} | {"backbone_config": config.backbone_config}


def _differences(model: ModelArguments, there: dict[str, Any]) -> Iterator[str]:
    """What an error says of each field that was given and does not fit; what is null was not given."""
    own, given = model.config_fields(), model.given
    if not model.motion_attention:
        given |= {"self_motion_attention", "mixer", "cross_motion_attention"}
    pairs = {name: (own[name], there[name]) for name in given & own.keys() & there.keys() if own[name] is not None}
    if own["adapter_config"] is not None and there["adapter_config"] is not None:
        one, two = read_adapter_config(own["adapter_config"]), read_adapter_config(there["adapter_config"])
        pairs.pop("adapter_config", None)
        pairs["adapter_config.peft_type"] = one.peft_type.value, two.peft_type.value
        if type(one) is type(two):
            named = own["adapter_config"].keys() - {"budget"}
            pairs |= {f"adapter_config.{name}": (getattr(one, name), getattr(two, name)) for name in named}
    backbone = there.get("backbone_config")
    for name, value in (model.backbone_config or {}).items():
        pairs[f"backbone_config.{name}"] = value, getattr(backbone, name, None)
    name_there = there.get("backbone") or getattr(backbone, "_name_or_path", None)
    if model.backbone is not None and name_there:
        pairs["backbone"] = model.backbone, name_there
    return (f"{name} is {two!r} there and {one!r} here" for name, (one, two) in sorted(pairs.items()) if one != two)


def _adapter_fields(adapters: PeftConfig) -> dict[str, Any]:
    """The config of adapters in a repository of their own, as [`DmgalConfig.adapter_config`] has it."""
    default, general = type(adapters)(), {one.name for one in fields(PeftConfig)}
    kind = adapters.peft_type.value
    found = {} if kind == "MGA" else {"peft_type": kind}
    for name in sorted(one.name for one in fields(adapters) if one.init and one.name not in general):
        value = getattr(adapters, name)
        if value != getattr(default, name):
            found[name] = sorted(value) if isinstance(value, set) else value
    # They may have been put into a DmgalModel, whose backbone they are in.
    targets = found.get("target_modules")
    if isinstance(targets, str):
        found["target_modules"] = targets.removeprefix("backbone\\.")
    elif targets is not None:
        found["target_modules"] = [target.removeprefix("backbone.") for target in targets]
    read_adapter_config(found)
    return found


def _load_adapters(network: DmgalModel, name: str):
    weights = load_peft_weights(name, device="cpu")
    weights = {key.replace("base_model.model.backbone.", "base_model.model."): one for key, one in weights.items()}
    keys = set_peft_model_state_dict(network.backbone, weights)
    lacking = [key for key in keys.missing_keys if key in network._adapter_parameters]
    if lacking or keys.unexpected_keys:
        raise ValueError(
            f"the weights of {name} are not those of its adapters: {len(lacking)} are missing and "
            f"{len(keys.unexpected_keys)} unknown ({', '.join([*lacking, *keys.unexpected_keys][:3])} ...)."
        )


def _load_processor(name: str, backbone: str | None, **fields: Any) -> DmgalVideoProcessor:
    """That of the checkpoint; adapters that peft has saved have none, and their backbone's is taken."""
    try:
        return DmgalVideoProcessor.from_pretrained(name, **fields)
    except OSError:
        if backbone is None:
            raise
        return DmgalVideoProcessor.from_pretrained(backbone, **fields)
