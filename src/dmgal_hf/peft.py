"""The PEFT method `mga`: motion-guided adapters for frozen image transformers (DMGAL-Adapter)."""

from .configuration_mga import MgaConfig
from .modeling_mga import CmgaLayer, MgaModel, SmgaLayer
from .motion_adapters import SupportCache

__all__ = ["CmgaLayer", "MgaConfig", "MgaModel", "SmgaLayer", "SupportCache"]
