"""Where adapters that were saved before `dmgal_hf.model` existed look for the class of their model."""

from .model.modeling_dmgal import DmgalModel

__all__ = ["DmgalModel"]
