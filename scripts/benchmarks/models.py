"""The models that the parts measure, as fields of DmgalConfig."""

from transformers import AutoConfig, CLIPVisionConfig

TINY = {
    "ft": {"backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                               "layer_type": "basic"}, "motion_reduction": 4},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                                    "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
                                    "patch_size": 8}, "adapter_config": {"reduction": 2}},
}  # fmt: skip
# Those of scripts/configs/motion_shapes_*.yaml.
SHAPES = {
    "ft": {"backbone_config": {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64],
                               "depths": [1, 1], "layer_type": "basic"}, "motion_reduction": 2},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 96, "intermediate_size": 384,
                                    "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 48,
                                    "patch_size": 8}, "adapter_config": {"reduction": 2}},
}  # fmt: skip
SHAPES_CROP = {"ft": 56, "adapter": 48}
# ResNet-50 and CLIP ViT-B/16.
FULL = {
    "ft": {"backbone_config": {"model_type": "resnet"}},
    "adapter": {"backbone_config": {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072,
                                    "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224,
                                    "patch_size": 16}, "adapter_config": {}, "frame_pooling": "cls"},
}  # fmt: skip


def clip_config(small: bool) -> CLIPVisionConfig:
    return AutoConfig.for_model(**(TINY if small else FULL)["adapter"]["backbone_config"])
