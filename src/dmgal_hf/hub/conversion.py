"""Checkpoints of the DMGAL authors' code (ReverseSuzhou/DMGAL) to DmgalModel and back."""

import os
import re

import torch
from transformers import ResNetConfig

from ..model.configuration_dmgal import DmgalConfig
from ..model.modeling_dmgal import DmgalModel
from ..model.motion_attention import sinusoidal_position_code

_POSITION_CODE = "Motion_Excitation.pe.pe"  # a constant of theirs that we compute where it is needed
_NUM_PATCHES = 49  # their models are bound to 7x7 feature maps

# Ours -> theirs. The first pattern that matches a name is applied, then those of the motion features.
_NAMES = [
    (r"^backbone\.embedder\.embedder\.convolution", r"resnet.0"),
    (r"^backbone\.embedder\.embedder\.normalization", r"resnet.1"),
    (r"^self_attention\.value", r"Motion_Excitation.conv"),
    (r"^self_attention\.", r"Motion_Excitation."),
    (r"^mixer\.temporal_in", r"mlp_mix1.fc_t1"),
    (r"^mixer\.temporal_out", r"mlp_mix1.fc_t2"),
    (r"^mixer\.channel_in", r"mlp_mix1.fc_d1"),
    (r"^mixer\.channel_out", r"mlp_mix1.fc_d2"),
    (r"^cross_attention\.gamma_self", r"spa_mix2.gamma1"),
    (r"^cross_attention\.gamma_cross", r"spa_mix2.gamma2"),
    (r"^cross_attention\.norm", r"spa_mix2.norm_qk"),
    (r"^cross_attention\.value", r"spa_mix2.conv"),
    (r"^cross_attention\.", r"spa_mix2."),
]
_MOTION_NAMES = {
    "bottleneck_norm": "bn1",
    "bottleneck": "conv1",
    "neighbour": "conv2",
    "project": "conv3",
    "half_conv": "conv3_smallscale2",
    "half_norm": "bn3_smallscale2",
    "full_conv": "conv3_smallscale4",
    "full_norm": "bn3_smallscale4",
}
_BLOCK = re.compile(r"^backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(\w+)\.(\w+)$")


def official_name(name: str) -> str:
    """The authors' name of one of our parameters or buffers."""
    if match := _BLOCK.match(name):
        stage, block, layer, kind, leaf = match.groups()
        prefix = f"resnet.{int(stage) + 4}.{block}"
        if layer is None:
            return f"{prefix}.downsample.{0 if kind == 'convolution' else 1}.{leaf}"
        return f"{prefix}.{'conv' if kind == 'convolution' else 'bn'}{int(layer) + 1}.{leaf}"
    for pattern, replacement in _NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return re.sub(r"\.motion\.(\w+)", lambda match: f".{_MOTION_NAMES[match[1]]}", name)


def convert_official_checkpoint(checkpoint: str | os.PathLike) -> DmgalModel:
    """
    Reads a checkpoint of the authors' code, `torch.save({"model_state_dict": ..., ...})`, or the bare state dict.

    Args:
        checkpoint (`str` or `os.PathLike`): the file. It is read with `weights_only=True`: no code in it runs.

    Returns:
        [`DmgalModel`] in eval mode, its ResNet and number of frames read off the shapes of the tensors.

    Raises:
        ValueError: the file is not one of theirs; the message lists the keys that are missing or unknown.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds here: not a zip, not allowed, truncated ...
        raise ValueError(
            f"{checkpoint} cannot be read as a PyTorch checkpoint with weights_only=True: {error}"
        ) from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{checkpoint} holds no state dict: expected tensors under 'model_state_dict'.")
    # Their multi-GPU runs wrap the ResNet in DataParallel.
    state = {name.replace("resnet.module.", "resnet.", 1): tensor for name, tensor in state.items()}

    model = DmgalModel(_detect_config(state, checkpoint)).eval()
    target = model.state_dict()
    names = {official_name(name): name for name in target}
    _check_keys(state, names.keys() | {_POSITION_CODE}, checkpoint)
    wrong = [f"{theirs} {tuple(state[theirs].shape)}" for theirs, ours in names.items()
             if state[theirs].shape != target[ours].shape]  # fmt: skip
    if wrong:
        raise ValueError(f"{checkpoint}: shapes that fit no ResNet of its kind: {_shorten(wrong)}.")
    scale = _position_scale(state[_POSITION_CODE])
    model.config.position_scale = model.self_attention.position_scale = scale
    model.load_state_dict({ours: state[theirs] for theirs, ours in names.items()})
    return model


def official_state_dict(model: DmgalModel) -> dict[str, torch.Tensor]:
    """
    The way back: the tensors of a DMGAL-FT model on a ResNet under the authors' names.

    Raises:
        ValueError: the model has a part, or lacks one, that the authors' code knows no other way.
    """
    config = model.config
    complete = config.self_motion_attention and config.mixer and config.cross_motion_attention
    default = config.motion_directions == "both" and config.motion_scales == ["half", "full"]
    resnet = config.backbone_config
    usual = ResNetConfig()
    if resnet.model_type == "resnet":
        for name in ("hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck", "num_channels"):
            if getattr(resnet, name) != getattr(usual, name):
                raise ValueError(
                    f"The authors' ResNet has {name}={getattr(usual, name)!r}, this one {getattr(resnet, name)!r}: "
                    "their code would compute something else."
                )
    if resnet.model_type != "resnet" or config.paradigm != "ft" or not (complete and default):
        raise ValueError(
            "Only a complete DMGAL-FT model on a ResNet exists in the authors' code; this one has backbone "
            f"{config.backbone_config.model_type!r}, paradigm {config.paradigm!r}, self_motion_attention="
            f"{config.self_motion_attention}, mixer={config.mixer}, cross_motion_attention="
            f"{config.cross_motion_attention}, motion_directions={config.motion_directions!r}, motion_scales="
            f"{config.motion_scales}."
        )
    state = {official_name(name): tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    code = config.position_scale * sinusoidal_position_code(_NUM_PATCHES, model.self_attention.motion.width)
    state[_POSITION_CODE] = code[None]
    return state


def _detect_config(state: dict[str, torch.Tensor], checkpoint) -> DmgalConfig:
    last = "conv3" if "resnet.4.0.conv3.weight" in state else "conv2"
    stages = [f"resnet.{stage}.0.{last}.weight" for stage in range(4, 8)]
    needed = {"resnet.0.weight", "mlp_mix1.fc_t1.weight", "Motion_Excitation.conv1.weight", *stages}
    if not needed <= state.keys():
        _check_keys(state, needed, checkpoint)
    blocks = [name.split(".")[1] for name in state if re.match(r"resnet\.[4-7]\.\d+\.conv1\.weight$", name)]
    resnet = ResNetConfig(
        embedding_size=state["resnet.0.weight"].shape[0],
        hidden_sizes=[state[name].shape[0] for name in stages],
        depths=[blocks.count(str(stage)) for stage in range(4, 8)],
        layer_type="bottleneck" if last == "conv3" else "basic",
    )
    reduction = resnet.hidden_sizes[-1] // state["Motion_Excitation.conv1.weight"].shape[0]
    num_frames = state["mlp_mix1.fc_t1.weight"].shape[0]
    return DmgalConfig(backbone_config=resnet, num_frames=num_frames, motion_reduction=reduction)


def _position_scale(code: torch.Tensor) -> float:
    """The scale of a stored position code, if it is one; else that of the authors' code, which computes its own."""
    plain = sinusoidal_position_code(code.shape[-2], code.shape[-1])[None]
    scale = round(float((code * plain).sum() / plain.square().sum()), 6)
    return scale if torch.allclose(code, scale * plain, atol=1e-4) else DmgalConfig.position_scale


def _check_keys(state: dict[str, torch.Tensor], expected, checkpoint):
    missing, unknown = sorted(set(expected) - state.keys()), sorted(state.keys() - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{checkpoint} is no checkpoint of the DMGAL authors' code. Missing keys: {_shorten(missing)}. "
            f"Unknown keys: {_shorten(unknown)}."
        )


def _shorten(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
