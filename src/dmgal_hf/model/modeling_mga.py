"""Motion-guided adapters (MGA) as a PEFT method.

Smga-Adapters sit before the early blocks of a frozen image transformer, a Cmga-Adapter before the last (arXiv
2411.11335, section on DMGAL-Adapter).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from threading import get_ident
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils import register_peft_method
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .configuration_mga import MGA, MgaConfig
from .motion_adapters import CmgaAdapter, EpisodeLayout, SmgaAdapter, SupportCache, episode_layout

# Keyword arguments of the model's forward that the adapters read and the backbone never sees.
EPISODE_FACTS = ("num_frames", "num_support", "patch_grid", "support_cache")

# Tokens before the patch tokens, not counting register tokens, by `config.model_type`.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "metaclip_2_vision_model": 1,
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
}

WHY_NOT_MERGED = (
    "MGA adapters cannot be merged into the backbone: they compare neighbouring frames and gather patches from a "
    "whole video or episode, and no weight of the backbone can express that. Keep the adapter, or remove it with "
    "`unload()`."
)


class EpisodeFactsCarrier:
    """
    Brings the episode facts to the adapters in models that do not hand keyword arguments on to their blocks.

    A pair of forward hooks on the model takes the facts from the call's keyword arguments and drops them when the call
    ends. They are kept by thread, so calls in several threads do not meet.
    """

    def __init__(self):
        self.calls: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
        self.hooks = []
        self.entries: list[str] = []

    def attach(self, name: str, module: nn.Module) -> None:
        if name in self.entries:
            return
        self.entries.append(name)
        self.hooks.append(module.register_forward_pre_hook(self.take, with_kwargs=True))
        self.hooks.append(module.register_forward_hook(self.drop, always_call=True))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        facts = {name: value for name, value in kwargs.items() if name in EPISODE_FACTS}
        if not facts:
            return None
        self.calls[get_ident()] = (module, facts)
        return args, {name: value for name, value in kwargs.items() if name not in facts}

    def drop(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.calls and self.calls.get(get_ident(), (None,))[0] is module:
            del self.calls[get_ident()]

    def facts(self) -> dict[str, Any]:
        return self.calls[get_ident()][1] if get_ident() in self.calls else {}


class MgaLayer(nn.Module, BaseTunerLayer):
    """
    A transformer block (`base_layer`) with the adapters that change the patch tokens entering it.

    `forward` takes, beside the block's own arguments, the episode facts, and keeps them from the block:

        num_frames (`int`): T, frames a video; default is the adapter's `MgaConfig.num_frames`.
        num_support (`int` or sequence of `int`): the first so many videos of each episode are its supports, the
            others its queries; one number an episode (an `int` for one episode). All episodes of a call have equally
            many videos. Without it, Cmga-Adapters do what Smga-Adapters do.
        patch_grid (`tuple[int, int]`): rows and columns of patches, for frames that are not square.
        support_cache ([`SupportCache`]): to fill (with supports) or to read (with queries alone).
    """

    adapter_layer_names = ("mga_adapter",)

    def __init__(self, base_layer: nn.Module, module_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        self.mga_adapter = nn.ModuleDict()
        self.facts_carrier: EpisodeFactsCarrier | None = None

    def update_layer(
        self, adapter_name: str, config: MgaConfig, hidden_size: int, num_prefix_tokens: int, cross: bool
    ) -> None:
        adapter_class = CmgaAdapter if cross else SmgaAdapter
        adapter = adapter_class(hidden_size, num_prefix_tokens, config)
        self.mga_adapter[adapter_name] = adapter.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def take_over(self, other: MgaLayer) -> None:
        """Carry the adapters of another layer around the same block."""
        self.mga_adapter = other.mga_adapter
        self.facts_carrier = other.facts_carrier
        self._disable_adapters = other._disable_adapters
        self._active_adapter = other._active_adapter

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        # A block has no `weight` of its own to ask, as peft's layers do.
        for parameter in base_layer.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return None, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unmerge(self) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        facts = {name: kwargs.pop(name) for name in EPISODE_FACTS if name in kwargs}
        if self.facts_carrier is not None:
            facts = self.facts_carrier.facts() | facts
        cache = facts.get("support_cache")
        if cache is not None and cache.resume is not None:
            if not isinstance(self, CmgaLayer):
                return hidden_states  # a stand-in, see SupportCache
            hidden_states, cache.resume = cache.resume, None
        elif cache is not None and cache.keep_tokens and isinstance(self, CmgaLayer) and cache.tokens is None:
            cache.tokens = hidden_states
        if not self.disable_adapters:
            hidden_states = self.adapt(hidden_states, **facts)
        return self.base_layer(hidden_states, *args, **kwargs)

    def adapt(
        self,
        hidden_states: torch.Tensor,
        num_frames: int | None = None,
        num_support: int | Sequence[int] | None = None,
        patch_grid: tuple[int, int] | None = None,
        support_cache: SupportCache | None = None,
    ) -> torch.Tensor:
        """Tokens (N, prefix + P, D) with the changes of all active adapters added to the patch tokens."""
        if hidden_states.dim() != 3:
            raise ValueError(
                f"'{self.module_name}' was given {tuple(hidden_states.shape)}; MGA adapters need a transformer block "
                "that takes patch tokens of shape (frames, tokens, width)."
            )
        adapted = hidden_states
        for name in self.active_adapters:
            if name not in self.mga_adapter:
                continue
            adapter = self.mga_adapter[name]
            prefix = adapter.num_prefix_tokens
            layout = episode_layout(
                hidden_states.shape[0],
                hidden_states.shape[1] - prefix,
                adapter.num_frames if num_frames is None else num_frames,
                num_support,
                patch_grid,
            )
            change = self._change(name, adapter, hidden_states, layout, support_cache)
            # Not the tokens are put together anew: backward, that would copy both parts and add them up.
            adapted = adapted + F.pad(change, (0, 0, prefix, 0)).to(adapted.dtype)
        return adapted

    def _change(
        self,
        name: str,
        adapter: SmgaAdapter,
        hidden_states: torch.Tensor,
        layout: EpisodeLayout,
        cache: SupportCache | None,
    ) -> torch.Tensor:
        supports = supports_per_episode = None
        if cache is not None and layout.only_queries and isinstance(adapter, CmgaAdapter) and adapter.attention:
            supports, supports_per_episode = cache.read(self._key(name), layout, adapter), cache.num_support
        keep_supports = cache is not None and not layout.only_queries
        inputs = (hidden_states, layout, supports, supports_per_episode, keep_supports)
        if self.training and getattr(self.get_base_layer(), "gradient_checkpointing", False):
            # The block checkpoints itself. Without reentry, as our input may need no gradient where our weights do.
            change, entry = checkpoint(adapter, *inputs, use_reentrant=False)
        else:
            change, entry = adapter(*inputs)
        if entry is not None:
            cache[self._key(name)] = entry
            cache.num_support = layout.num_support
        return change

    def _key(self, adapter_name: str) -> str:
        """Of the adapter in a [`SupportCache`]. Others never ask: a compiled layer then serves all of its kind."""
        return f"{self.module_name}.{adapter_name}"


class SmgaLayer(MgaLayer):
    """
    A transformer block with Smga-Adapters before it. See [`MgaLayer`] for `forward`'s arguments.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTModel
    >>> from dmgal_hf import CmgaLayer, MgaConfig, SmgaLayer

    >>> sizes = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2}
    >>> vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    >>> model = get_peft_model(vit, MgaConfig(reduction=2))
    >>> [type(module).__name__ for module in model.modules() if isinstance(module, (SmgaLayer, CmgaLayer))]
    ['SmgaLayer', 'SmgaLayer', 'CmgaLayer']
    ```
    """


class CmgaLayer(MgaLayer):
    """
    A transformer block with at least one Cmga-Adapter before it. See [`MgaLayer`] for `forward`'s arguments.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTModel
    >>> from dmgal_hf import CmgaLayer, MgaConfig

    >>> sizes = {'hidden_size': 32, 'num_hidden_layers': 3, 'num_attention_heads': 2}
    >>> vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    >>> model = get_peft_model(vit, MgaConfig(reduction=2, cmga_layers=[0]))
    >>> [name for name, module in model.named_modules() if isinstance(module, CmgaLayer)]
    ['base_model.model.layers.0']
    ```
    """


class BlockPlan(NamedTuple):
    """Which blocks of a model an adapter is put into, and how."""

    cross: dict[str, bool]  # full name of the block -> whether it gets a Cmga-Adapter (else an Smga-Adapter)
    hidden_size: int
    num_prefix_tokens: int


class MgaModel(BaseTuner):
    """
    Puts motion-guided adapters before the blocks of a frozen image transformer, so that it reads motion in videos.

    The adapted model takes the frames of videos as its batch, and the episode facts as keyword arguments (see
    [`MgaLayer`]).

    Args: those of any tuner of peft; `model` is a vision transformer or holds one.

    Example:

    ```py
    >>> import torch
    >>> from peft import get_peft_model
    >>> from transformers import ViTConfig, ViTModel
    >>> from dmgal_hf import MgaConfig

    >>> sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2}
    >>> vit = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    >>> model = get_peft_model(vit, MgaConfig(reduction=2))
    >>> frames = torch.randn(3 * 8, 3, 32, 32)  # two support videos and a query of eight frames
    >>> model(frames, num_frames=8, num_support=[2]).last_hidden_state.shape
    torch.Size([24, 17, 32])
    ```
    """

    prefix: str = "mga_"
    tuner_layer_cls = MgaLayer
    target_module_mapping: dict[str, list[str]] = {}  # blocks are found by the model's structure
    registered_by = "dmgal-hf"

    def _pre_injection_hook(self, model: nn.Module, config: MgaConfig, adapter_name: str) -> None:
        self.block_plans: dict[str, BlockPlan] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        _carry_facts(model)

    def _prepare_adapter_config(self, peft_config: MgaConfig, model_config: dict) -> MgaConfig:
        plan = BlockPlan({}, 0, 0)
        if peft_config.target_modules != DUMMY_TARGET_MODULES:
            plan = plan_blocks(self.model, peft_config)
        for name, config in self.peft_config.items():
            if config is peft_config:  # one config may serve several adapters
                self.block_plans[name] = plan
        return peft_config

    def _check_target_module_exists(self, peft_config: MgaConfig, key: str) -> bool:
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        return key in self.block_plans[name].cross

    def _create_and_replace(
        self,
        peft_config: MgaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        plan = self.block_plans[adapter_name]
        cross = plan.cross.get(current_key, False)
        layer = target
        if not isinstance(target, MgaLayer) or (cross and not isinstance(target, CmgaLayer)):
            block = target.base_layer if isinstance(target, MgaLayer) else target
            layer = (CmgaLayer if cross else SmgaLayer)(block, current_key)
            if isinstance(target, MgaLayer):
                layer.take_over(target)
            else:
                layer.set_adapter(self.active_adapters)
            layer.train(target.training)
        layer.update_layer(adapter_name, peft_config, plan.hidden_size, plan.num_prefix_tokens, cross)
        if adapter_name not in self.active_adapters:
            layer.mga_adapter[adapter_name].requires_grad_(False)  # an additional adapter waits to be activated
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A block has no weight to hand over, and `update_layer` has moved the adapter to the block's device.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unload(self) -> nn.Module:
        for layer in self.model.modules():
            if isinstance(layer, MgaLayer) and layer.facts_carrier is not None:
                layer.facts_carrier.detach()
        return super().unload()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # An adapter is a module with modules of its own: "...mga_adapter.<adapter name>.down.weight".
        before, found, after = key.rpartition(f".mga_adapter.{adapter_name}.")
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return f"{before}.mga_adapter.{after}"


def find_vision_models(model: nn.Module) -> dict[str, nn.Module]:
    """The vision transformers of a known kind in `model` by their full names (`""` for `model` itself)."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "model_type", None) not in CLASS_TOKENS:
            continue
        is_part = any(_is_inside(name, outer) for outer in found)  # encoders and blocks have the same config
        if not is_part and _find_block_list(module) is not None:
            found[name] = module
    return found


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _find_block_list(vision_model: nn.Module) -> str | None:
    for name, module in vision_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == vision_model.config.num_hidden_layers:
            return name
    return None


def plan_blocks(model: nn.Module, config: MgaConfig) -> BlockPlan:
    """Decide which blocks of `model` get which adapter, and complete `config` with what is found.

    Raises:
        ValueError: if the blocks or the prefix tokens cannot be found, if a block number is out of range or named for
            both adapters, or if the adapter was made for a backbone of another width or depth.
    """
    found = find_vision_models(model)
    if config.target_modules is None:
        config.target_modules = _block_pattern(model, found)
    blocks = {
        name: module
        for name, module in model.named_modules()
        if name and ".mga_adapter." not in name and check_target_module_exists(config, name)
    }
    if not blocks:
        return BlockPlan({}, 0, 0)  # peft has the error for it
    hidden_size = _block_width(model, blocks)
    _check_backbone(model, config, hidden_size, len(blocks))
    num_prefix_tokens = config.num_prefix_tokens
    if num_prefix_tokens is None:
        owner = next((module for name, module in found.items() if _is_inside(next(iter(blocks)), name)), None)
        if owner is None:
            raise ValueError(
                f"MgaConfig.num_prefix_tokens is None, but the blocks it targets in {type(model).__name__} belong to "
                "no vision transformer that MGA knows. Set it to the number of class and register tokens before the "
                "patch tokens (0 if none)."
            )
        num_prefix_tokens = CLASS_TOKENS[owner.config.model_type] + getattr(owner.config, "num_register_tokens", 0)
    cross = _share_out_blocks(config, list(blocks))
    config.backbone_width, config.backbone_depth = hidden_size, len(blocks)
    return BlockPlan(cross, hidden_size, num_prefix_tokens)


def _block_pattern(model: nn.Module, found: dict[str, nn.Module]) -> str:
    """Regular expression of the names of the blocks of the one vision transformer in `model`."""
    if len(found) != 1:
        what = f"holds several ({', '.join(found)})" if found else "holds none"
        raise ValueError(
            "MgaConfig.target_modules is None, so the model must hold one vision transformer that MGA knows "
            f"(config.model_type one of {', '.join(CLASS_TOKENS)}), but {type(model).__name__} {what}. Set "
            "target_modules to the names of the transformer blocks to adapt (a list or a regular expression) and "
            "num_prefix_tokens to the number of class and register tokens. A backbone without patch tokens, such as a "
            "ResNet, cannot take MGA adapters."
        )
    [(name, vision_model)] = found.items()
    block_list = ".".join(part for part in (name, _find_block_list(vision_model)) if part)
    return re.escape(block_list) + r"\.\d+"


def _block_width(model: nn.Module, blocks: dict[str, nn.Module]) -> int:
    """Width of the blocks, read from their normalisation layers."""
    widths = {}
    for name, block in blocks.items():
        if isinstance(block, BaseTunerLayer):
            block = block.get_base_layer()
        normalisations = [
            module.weight.shape[0]
            for module in block.modules()
            if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and getattr(module, "weight", None) is not None
        ]
        widths[name] = max(normalisations, default=None)  # the others are narrower ones, of queries and keys
        if widths[name] is None:
            raise ValueError(
                f"MgaConfig.target_modules matches '{name}' ({type(block).__name__}) in {type(model).__name__}, which "
                "is no transformer block (it holds no LayerNorm or RMSNorm). A backbone without patch tokens, such as "
                "a ResNet, cannot take MGA adapters."
            )
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"The blocks that MgaConfig.target_modules matches differ in width ({widths}); match blocks of one width."
        )
    return next(iter(widths.values()))


def _check_backbone(model: nn.Module, config: MgaConfig, width: int, depth: int) -> None:
    made_for = (config.backbone_width or width, config.backbone_depth or depth)
    if made_for != (width, depth):
        raise ValueError(
            f"This MGA adapter was made for a backbone of {made_for[1]} blocks of width {made_for[0]}, but "
            f"{type(model).__name__} has {depth} blocks of width {width}. Put it on the backbone it was made for"
            + (f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "")
            + ", or start a new adapter with a new MgaConfig."
        )


def _share_out_blocks(config: MgaConfig, names: list[str]) -> dict[str, bool]:
    """Full name -> whether the block gets a Cmga-Adapter, for the blocks that get one of the two."""

    def numbers(field: str) -> list[int]:
        layers = getattr(config, field)
        for layer in layers:
            if not -len(names) <= layer < len(names):
                raise ValueError(
                    f"MgaConfig.{field} names block {layer}, but this backbone has {len(names)} blocks "
                    f"({-len(names)} to {len(names) - 1})."
                )
        return [layer % len(names) for layer in layers]

    cmga = [len(names) - 1] if config.cmga_layers is None else numbers("cmga_layers")
    smga = [i for i in range(len(names)) if i not in cmga] if config.smga_layers is None else numbers("smga_layers")
    both = sorted(set(cmga) & set(smga))
    if both:
        raise ValueError(
            f"MgaConfig names block {both[0]} for both adapters: smga_layers={config.smga_layers}, cmga_layers="
            f"{config.cmga_layers} (None: the last block). Give each block one of them."
        )
    return {name: number in cmga for number, name in enumerate(names) if number in cmga or number in smga}


def _carry_facts(model: nn.Module) -> None:
    """Attach an [`EpisodeFactsCarrier`] where a model would not hand the episode facts on to its adapted blocks."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MgaLayer)}
    carrier = next((layer.facts_carrier for layer in layers.values() if layer.facts_carrier is not None), None)
    entries = find_vision_models(model)
    if not entries or not isinstance(model, PreTrainedModel):
        entries[""] = model  # a transformers model around a vision model calls it with facts of its own
    for entry_name, entry in entries.items():
        inside = [name for name in layers if _is_inside(name, entry_name)]
        if _hands_on_keywords(model, entry_name, inside):
            continue
        carrier = carrier or EpisodeFactsCarrier()
        carrier.attach(entry_name, entry)
    for layer in layers.values():
        layer.facts_carrier = carrier


def _hands_on_keywords(model: nn.Module, entry_name: str, layer_names: list[str]) -> bool:
    """Whether every module from the entry down to each of the blocks takes any keyword argument."""
    forwards = set()  # the blocks of a list share theirs
    for layer_name in layer_names:
        parts = layer_name.split(".")
        for length in range(len(entry_name.split(".")) if entry_name else 0, len(parts) + 1):
            module = model.get_submodule(".".join(parts[:length]))
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                continue
            forward = module.get_base_layer().forward if isinstance(module, MgaLayer) else module.forward
            forwards.add(getattr(forward, "__func__", forward))
    kinds = [[parameter.kind for parameter in inspect.signature(one).parameters.values()] for one in forwards]
    return all(inspect.Parameter.VAR_KEYWORD in of_one for of_one in kinds)


def register_mga() -> None:
    """Register the method "mga" with peft, once.

    Raises:
        RuntimeError: if peft has another method of that name or prefix.
    """
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(MGA)
    if known is not None and getattr(known, "registered_by", None) == MgaModel.registered_by:
        if known.__module__ != MgaModel.__module__:
            return  # a copy of this file is at work already, as when a checkpoint brings its own
        for mapping in (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
        ):
            mapping.pop(MGA, None)  # this module was reloaded: its new classes take over
    elif known is not None or MgaModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        owner = "another method" if known is None else f"{known.__module__}.{known.__qualname__}"
        raise RuntimeError(
            f"peft's method name 'mga' (prefix '{MgaModel.prefix}') is taken by {owner}, so DMGAL's motion-guided "
            "adapters cannot register theirs. Do not import that package and dmgal_hf in one process; if peft itself "
            "brought the name, upgrade dmgal-hf (`pip install -U dmgal-hf`)."
        )
    register_peft_method(name="mga", config_cls=MgaConfig, model_cls=MgaModel)


register_mga()
