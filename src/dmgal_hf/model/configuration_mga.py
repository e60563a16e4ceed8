"""Configuration of motion-guided adapters (MGA), the PEFT method of DMGAL-Adapter."""

from __future__ import annotations

import difflib
import operator
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from transformers.activations import ACT2FN

FORMAT_VERSION = 1
DIRECTIONS = {"both": ("forward", "backward"), "forward": ("forward",), "backward": ("backward",)}


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType.<name>`, adding the member first if peft (or another plug-in) does not have it yet.

    peft looks methods up through this enumeration (`PeftType(value)`, `PeftType.MGA`, `name in list(PeftType)`) and
    offers no call to extend it, so the member is entered in the tables from which `enum` answers those look-ups.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    setattr(PeftType, name, member)  # before the tables: afterwards the enumeration refuses to set the attribute
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


MGA = add_peft_type("MGA")


@dataclass
class MgaConfig(PeftConfig):
    """
    Configuration of an [`MgaModel`]: motion-guided adapters in front of the blocks of a frozen image transformer.

    Blocks are counted from 0 in the order in which the backbone runs them; negative numbers count from the end.

    Args:
        target_modules (`str` or `list[str]`, *optional*):
            The backbone's transformer blocks: a regular expression that matches the blocks' full names, or a list of
            names or name endings. `None` finds the block list of CLIP vision, ViT, DINOv2 (with or without
            registers), DINOv3 ViT and SigLIP vision models, also inside a larger model.
        smga_layers (`list[int]`, *optional*):
            The blocks that get a self motion-guided adapter (within one video). `None`: all that have no Cmga-Adapter;
            `[]`: none.
        cmga_layers (`list[int]`, *optional*):
            The blocks that get a cross motion-guided adapter (queries read the supports of their episode). `None`: the
            last block; `[]`: none.
        width (`int`, *optional*):
            Inner width d of the adapters. `None`: the backbone's width divided by `reduction`.
        reduction (`int`, defaults to 4):
            Divisor of the backbone's width where `width` is `None`.
        directions (`str`, defaults to `"both"`):
            Which motion differences are used: `"both"`, `"forward"` (to the next frame) or `"backward"`.
        attention (`bool`, defaults to `True`):
            Whether patches gather from patches that move alike. `False` leaves the values alone (an ablation).
        support_pooling (`int`, defaults to 1):
            Side of the squares of patches that the supports' keys and values are averaged over before queries read
            them (ours). With 2, queries compare with a quarter as many; a kept support takes a quarter of the room.
        num_frames (`int`, defaults to 8):
            Frames a video, for calls that do not pass `num_frames`.
        num_prefix_tokens (`int`, *optional*):
            Tokens before the patch tokens (class and register tokens). `None`: known from the backbone's config.
        activation (`str`, defaults to `"gelu"`):
            Activation before the up-projection, by its name in transformers.
        dropout (`float`, defaults to 0.0):
            Dropout after the activation, while training.
        init_weights (`bool`, defaults to `True`):
            Start the up-projection at zero, so that a fresh adapter changes nothing. `False` starts it at random.
        modules_to_save (`list[str]`, *optional*):
            Further modules of the model to train and to save with the adapter.
        backbone_width (`int`, *optional*), backbone_depth (`int`, *optional*):
            Width and number of blocks of the backbone the adapter was made for. Filled in when the adapter is put into
            a model, and checked whenever it is loaded into another.
        format_version (`int`, defaults to 1):
            Version of this format; a config of a newer version is refused.

    Raises:
        ValueError: if a field has a value that is not allowed; the message names field, value and what is allowed.

    Example:

    ```python
    >>> from dmgal_hf import MgaConfig

    >>> config = MgaConfig(reduction=2, cmga_layers=[-2, -1])  # Cmga-Adapters in the last two blocks
    >>> config.save_pretrained("adapter")
    >>> MgaConfig.from_pretrained("adapter").cmga_layers
    [-2, -1]
    ```
    """

    target_modules: list[str] | str | None = None
    smga_layers: list[int] | None = None
    cmga_layers: list[int] | None = None
    width: int | None = None
    reduction: int = 4
    directions: str = "both"
    attention: bool = True
    support_pooling: int = 1
    num_frames: int = 8
    num_prefix_tokens: int | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    backbone_width: int | None = None
    backbone_depth: int | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = MGA
        self._check_version()
        self._check_blocks()
        self._check_adapter()

    def _check_version(self):
        version = self._integer("format_version", minimum=1)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This MgaConfig has format_version={version}, but the installed dmgal-hf reads versions up to "
                f"{FORMAT_VERSION}. Upgrade dmgal-hf (`pip install -U dmgal-hf`) to load it."
            )

    def _check_blocks(self):
        if isinstance(self.target_modules, (set, tuple)):
            self.target_modules = sorted(self.target_modules)
        targets = self.target_modules
        is_names = isinstance(targets, list) and targets and all(isinstance(name, str) and name for name in targets)
        if not (targets is None or is_names or (isinstance(targets, str) and targets)):
            raise ValueError(
                f"MgaConfig.target_modules={targets!r}: give a regular expression, a non-empty list of block names, "
                "or None to find the blocks of a known vision transformer."
            )
        for name in ("smga_layers", "cmga_layers"):
            layers = getattr(self, name)
            if layers is None:
                continue
            if isinstance(layers, (str, bytes)) or not hasattr(layers, "__iter__"):
                raise ValueError(f"MgaConfig.{name}={layers!r}: give a list of block numbers, [] for none, or None.")
            layers = [_as_integer(f"{name}[{position}]", layer) for position, layer in enumerate(layers)]
            if len(set(layers)) < len(layers):
                raise ValueError(f"MgaConfig.{name}={layers}: names a block twice; give each block number once.")
            setattr(self, name, layers)
        if self.smga_layers == [] and self.cmga_layers == []:
            raise ValueError(
                "MgaConfig: smga_layers and cmga_layers are both [], which adapts nothing; set one of them."
            )

    def _check_adapter(self):
        for name in ("width", "backbone_width", "backbone_depth"):
            if getattr(self, name) is not None:
                self._integer(name, minimum=1)
        for name in ("reduction", "support_pooling", "num_frames"):
            self._integer(name, minimum=1)
        if self.num_prefix_tokens is not None:
            self._integer("num_prefix_tokens", minimum=0)
        for name, allowed in (("directions", DIRECTIONS), ("activation", ACT2FN)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(f"MgaConfig.{name}={value!r}: allowed are {', '.join(sorted(allowed))}.")
        for name in ("attention", "init_weights"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"MgaConfig.{name}={value!r}: give True or False.")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"MgaConfig.dropout={self.dropout!r}: give a number of at least 0 and below 1.")

    def _integer(self, name: str, minimum: int) -> int:
        value = _as_integer(name, getattr(self, name))
        if value < minimum:
            raise ValueError(f"MgaConfig.{name}={value}: give an integer of at least {minimum}.")
        setattr(self, name, value)
        return value


def _as_integer(name: str, value: object) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"MgaConfig.{name}={value!r}: give an integer.") from None


def spelling_hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known fields: {', '.join(known)}."


def read_adapter_config(values: dict[str, Any]) -> PeftConfig:
    """
    The peft config that `DmgalConfig.adapter_config` stands for: an [`MgaConfig`], or with `peft_type: LORA` peft's
    LoraConfig, whose `target_modules` are all linear layers unless it says otherwise.

    Raises:
        ValueError: an unknown `peft_type` or field, or a value that is not allowed.
    """
    values = dict(values)
    classes = {"MGA": MgaConfig, "LORA": LoraConfig}
    name = values.pop("peft_type", "MGA")
    if name not in classes:
        raise ValueError(f"adapter_config: peft_type must be one of {', '.join(classes)}, got {name!r}.")
    budget = values.pop("budget", None) if name == "LORA" else None
    known = sorted(one.name for one in fields(classes[name]) if one.init)
    for unknown in values.keys() - set(known):
        raise ValueError(
            f"adapter_config has no field {unknown!r} for {classes[name].__name__}. {spelling_hint(unknown, known)}"
        )
    if budget is not None:
        if not isinstance(budget, dict) or "r" in values:
            raise ValueError(
                "adapter_config: budget is a dict of MgaConfig fields and stands in place of r, got "
                f"budget={budget!r} and r={values.get('r')!r}."
            )
        read_adapter_config(budget)
    return classes[name](**({"target_modules": "all-linear"} if name == "LORA" else {}) | values)
