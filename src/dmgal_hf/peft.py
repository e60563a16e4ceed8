"""The PEFT method `mga`: motion-guided adapters for frozen image transformers (DMGAL-Adapter)."""

from .model.configuration_mga import MgaConfig
from .model.modeling_mga import CmgaLayer, MgaModel, SmgaLayer
from .model.motion_adapters import SupportCache

__all__ = ["CmgaLayer", "MgaConfig", "MgaModel", "SmgaLayer", "SupportCache"]
