"""
What makes a run fast on its device: the precision that weights are held in, blocks compiled by kind, memory that is
kept, and whether steps are replayed.
"""

import ctypes
import platform
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..model.modeling_dmgal import DmgalModel
from ..model.modeling_mga import MgaLayer
from ..model.motion_attention import CrossMotionAttention, SelfMotionAttention, TemporalChannelMixer

# What of the model is compiled beside the blocks of the backbone, and which of its calls.
REGIONS = {
    MgaLayer: ("adapt",),
    SelfMotionAttention: ("forward",),
    TemporalChannelMixer: ("forward", "mix"),
    CrossMotionAttention: ("encode_support", "describe"),
}

# glibc's numbers of what `mallopt` sets, and bytes: those that the heap may keep unused, those that it grows by, and
# those from which on a piece is a mapping of its own (32 MiB at most).
KEPT_BY_GLIBC = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}


def keep_freed_memory() -> None:
    """
    Has the C library keep the memory that tensors leave, for those that follow. Left to itself, glibc gives it back
    after every step, and the system zeroes each page anew, which small models feel on a CPU. Of the whole process;
    without glibc (macOS, Windows) nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in KEPT_BY_GLIBC.items():
            mallopt(option, size)


def hold_frozen_backbone(network: DmgalModel, mixed_precision: str) -> None:
    """
    With "bf16", holds the weights of a frozen backbone in bfloat16. It then runs in bfloat16 and without autocast, and
    its MGA adapters compute in bfloat16 from weights that stay float32. The state dict of the network has all weights
    in the dtype they came in, to the last bit, and takes them back so: nothing that is saved changes.

    Left to autocast: a backbone that trains, whose float32 weights are the master weights; one with adapters of
    another kind (LoRA), which compute in the dtype of their own weights; and float16, whose gradients need scaling.

    The network is changed in place, before it goes to its device. `mixed_precision` is "no", "fp16" or "bf16".
    """
    backbone = network.backbone
    foreign = any(isinstance(part, BaseTunerLayer) and not isinstance(part, MgaLayer) for part in backbone.modules())
    if mixed_precision != "bf16" or network.config.paradigm != "adapter" or foreign:
        return
    kept: dict[str, torch.Tensor] = {}
    for prefix, module in backbone.named_modules():
        if isinstance(module, _BatchNorm):  # it takes frames of another dtype than its own
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.dtype == torch.float32 and not parameter.requires_grad:
                kept[name] = parameter.data
                parameter.data = parameter.data.to(torch.bfloat16)

    def give_back(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, metadata: dict) -> None:
        state.update({prefix + name: tensor for name, tensor in kept.items()})

    def take(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_) -> None:
        kept.update({name: state[prefix + name].to("cpu", copy=True) for name in kept if prefix + name in state})

    backbone.register_state_dict_post_hook(give_back)
    backbone.register_load_state_dict_pre_hook(take)


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """Transformer blocks, or the blocks of the stages of a convolutional network."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == getattr(backbone.config, "num_hidden_layers", None):
            yield from (block.get_base_layer() if isinstance(block, BaseTunerLayer) else block for block in module)
        elif type(module).__name__.endswith("Stage"):
            yield from module.layers


def compile_regions(network: DmgalModel) -> None:
    """
    Has `torch.compile` make kernels for every kind of block once, when it is first called with a shape: the blocks of
    the backbone (of a ResNet those of its stages), MGA adapters, S-MGA, the mixer and C-MGA. What lies between them is
    little, and as many blocks of one kind as there are share their kernels, so that compiling takes a fraction of the
    time that the whole model would.

    A compiled run repeats the losses of a plain one to rounding where there is no dropout: on a CPU they were equal in
    float64 over four steps of SGD, and within 1e-5 of each other in float32. With dropout they differ from the first
    step on, in float64 too, since the compiler draws other masks: compare compiled runs with compiled ones.

    The network is changed in place; its weights and their names stay.
    """
    # A kind has versions for its widths, for supports and queries, for training and validation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    regions = [(block, ("forward",)) for block in _blocks(network.backbone)]
    regions += [
        (module, calls) for module in network.modules() for kind, calls in REGIONS.items() if isinstance(module, kind)
    ]
    for module, calls in regions:
        for call in calls:
            # A frozen shape: an episode has the same in every step.
            setattr(module, call, torch.compile(getattr(module, call), dynamic=False))


def why_not_replayed(accelerator: Accelerator, gradient_checkpointing: bool) -> str | None:
    """What keeps the steps of a run from being replayed as CUDA graphs, `None` where nothing does."""
    if accelerator.device.type != "cuda":
        return f"these are of CUDA devices, and this is {accelerator.device.type}"
    if accelerator.distributed_type != DistributedType.NO:
        return "processes wait for each other within a step"
    if gradient_checkpointing:
        return "gradient_checkpointing reads the state of the device within a step"
    if accelerator.scaler is not None:
        return "fp16 scales gradients by what it finds in earlier ones"
    return None
