"""What queries need to know of the supports of an episode, computed once and kept."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .motion_adapters import SupportCache


@dataclass(frozen=True)
class DmgalSupport:
    """
    Everything a query needs to know of the supports of B episodes, computed once by [`DmgalModel.encode_support`].

    Attributes:
        features (`torch.FloatTensor` of shape `(B, S, T, D)`): frame descriptors.
        labels (`torch.LongTensor` of shape `(B, S)`): classes 0..way-1.
        way (`int`): number of classes N.
        states (`dict[str, torch.Tensor]`): keys and values that the queries attend to. Each has the patches of all
            supports, S·P, as its last axis but one. With `text_guidance` also
            `text.videos` `(B, S, E)`, the supports as texts are compared with them.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    >>> model = DmgalModel(DmgalConfig(backbone_config=backbone)).eval()
    >>> support = model.encode_support(torch.randn(1, 2, 8, 3, 64, 64), torch.tensor([[0, 1]]))
    >>> support.save("support.safetensors")
    >>> kept = DmgalSupport.load("support.safetensors")
    >>> model(query_pixel_values=torch.randn(1, 1, 8, 3, 64, 64), support=kept).logits.shape
    torch.Size([1, 1, 2])
    ```
    """

    features: torch.Tensor
    labels: torch.Tensor
    way: int
    states: dict[str, torch.Tensor]

    @classmethod
    def from_clips(cls, clips: Mapping[str, torch.Tensor], labels: torch.Tensor, way: int) -> "DmgalSupport":
        """Of tensors `(B, S, ...)`, those of [`DmgalModel.encode_clips`] for the supports of B episodes."""
        states = {}
        for name in clips:
            if name == "cross.motion" or name.startswith("support."):
                state = clips[name].movedim((0, 1), (-5, -3)).flatten(-3, -2)  # (..., B, T, S·P, d)
                states[name.removeprefix("support.")] = state
        return cls(clips["features"], labels, way, states)

    def clips(self) -> dict[str, torch.Tensor]:
        """Tensors `(B, S, ...)` by the names of [`DmgalModel.encode_clips`], of what is kept: not the tokens."""
        clips = {"features": self.features}
        for name, state in self.states.items():
            if not name.startswith("text."):
                state = state.unflatten(-2, (self.labels.shape[1], -1)).movedim((-5, -3), (0, 1))
                clips[name if name == "cross.motion" else f"support.{name}"] = state
        return clips

    def cache(self) -> SupportCache:
        """What Cmga-Adapters read."""
        states = {name: state for name, state in self.states.items() if not name.startswith(("cross.", "text."))}
        cache = SupportCache.from_tensors(states)
        cache.num_support = (self.labels.shape[1],) * self.labels.shape[0]
        return cache

    def to(self, *args, **kwargs) -> "DmgalSupport":
        """As [`torch.Tensor.to`]; a dtype applies to the floating tensors alone."""
        features = self.features.to(*args, **kwargs)
        states = {
            name: state.to(*args, **kwargs) if state.is_floating_point() else state.to(features.device)
            for name, state in self.states.items()
        }
        return replace(self, features=features, labels=self.labels.to(features.device), states=states)

    def select(self, videos: list[int]) -> "DmgalSupport":
        """The supports with these numbers, in this order; classes keep their numbers."""
        index = torch.tensor(videos, dtype=torch.int64, device=self.features.device)
        num_support = self.features.shape[1]
        if not num_support:
            return self  # classes of text alone
        states = {
            name: state.unflatten(-2, (num_support, -1)).index_select(-3, index).flatten(-3, -2)
            for name, state in self.states.items()
        }
        features, labels = self.features.index_select(1, index), self.labels.index_select(1, index)
        return replace(self, features=features, labels=labels, states=states)

    @classmethod
    def cat(cls, parts: list["DmgalSupport"]) -> "DmgalSupport":
        """All supports of `parts`, which belong to the same B episodes; classes keep their numbers."""
        states = {name: torch.cat([part.states[name] for part in parts], -2) for name in parts[0].states}
        features = torch.cat([part.features for part in parts], 1)
        labels = torch.cat([part.labels for part in parts], 1)
        return cls(features, labels, max(part.way for part in parts), states)

    def save(self, path: str | os.PathLike):
        """Writes a safetensors file."""
        tensors = {"features": self.features, "labels": self.labels, **self.states}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", "way": str(self.way)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DmgalSupport":
        """Reads what [`save`] wrote. Raises `ValueError` for another kind of safetensors file."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            way = (file.metadata() or {}).get("way")
        if way is None or not {"features", "labels"} <= tensors.keys():
            raise ValueError(f"{os.fspath(path)} holds no supports: write it with DmgalSupport.save().")
        tensors.pop("num_support", None)  # once written beside them
        return cls(tensors.pop("features"), tensors.pop("labels"), int(way), tensors)
