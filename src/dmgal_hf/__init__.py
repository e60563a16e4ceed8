"""Few-shot action recognition with motion-guided attention (DMGAL) for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel

from .configuration_dmgal import DmgalConfig
from .modeling_dmgal import DmgalModel, DmgalOutput, DmgalPreTrainedModel, DmgalSupport

AutoConfig.register("dmgal", DmgalConfig, exist_ok=True)
AutoModel.register(DmgalConfig, DmgalModel, exist_ok=True)

__version__ = "0.1.0"
__all__ = ["DmgalConfig", "DmgalModel", "DmgalOutput", "DmgalPreTrainedModel", "DmgalSupport"]
