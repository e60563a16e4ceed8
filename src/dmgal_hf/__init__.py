"""Few-shot action recognition with motion-guided attention (DMGAL) for the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import is_torchvision_available

from .inference.pipeline import TASK, FewShotVideoClassificationPipeline, StreamedLabel
from .inference.query_model import DmgalQueryModel
from .model.configuration_dmgal import DmgalConfig
from .model.modeling_dmgal import DmgalModel, DmgalOutput, DmgalPreTrainedModel, DmgalSupport
from .model.video_decoding import VideoDecodeError
from .model.video_processing_dmgal import DmgalVideoProcessor
from .peft import CmgaLayer, MgaConfig, MgaModel, SmgaLayer

AutoConfig.register("dmgal", DmgalConfig, exist_ok=True)
AutoModel.register(DmgalConfig, DmgalModel, exist_ok=True)
AutoProcessor.register(DmgalConfig, DmgalVideoProcessor, exist_ok=True)
# Both backends name the one class, so that neither is looked for.
AutoImageProcessor.register(
    DmgalConfig,
    exist_ok=True,
    image_processor_classes={"pil": DmgalVideoProcessor, "torchvision": DmgalVideoProcessor},
)
if is_torchvision_available():
    from transformers import AutoVideoProcessor

    AutoVideoProcessor.register(DmgalConfig, DmgalVideoProcessor, exist_ok=True)

if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, pipeline_class=FewShotVideoClassificationPipeline, pt_model=AutoModel, type="video"
    )
# save_pretrained and push_to_hub lay the source beside the weights, for `trust_remote_code` where dmgal_hf is missing.
DmgalConfig.register_for_auto_class()
DmgalModel.register_for_auto_class("AutoModel")
DmgalVideoProcessor.register_for_auto_class("AutoProcessor")

__version__ = "0.1.0"
__all__ = [
    "CmgaLayer",
    "DmgalConfig",
    "DmgalModel",
    "DmgalOutput",
    "DmgalPreTrainedModel",
    "DmgalQueryModel",
    "DmgalSupport",
    "DmgalVideoProcessor",
    "FewShotVideoClassificationPipeline",
    "MgaConfig",
    "MgaModel",
    "SmgaLayer",
    "StreamedLabel",
    "VideoDecodeError",
]
