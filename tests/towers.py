"""Tiny models of two towers with their tokenizers and image processors, saved as they lie on the Hub."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
)

WORDS = ["a", "video", "of", "photo", "person", "doing", ".", "push", "pull", "lift", "hand", "lifts", "the", "cup",
         "off", "table", "left", "right"]  # fmt: skip
PAD, UNKNOWN, BOS, EOS = range(4)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SMALL, "hidden_size": 24, "vocab_size": len(WORDS) + 4, "max_position_embeddings": 16, "eos_token_id": EOS,
        "bos_token_id": BOS, "pad_token_id": PAD}  # fmt: skip
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
FAMILIES = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20)),
    "metaclip_2": lambda: MetaClip2Model(MetaClip2Config(vision_config=VISION, text_config=TEXT, projection_dim=20)),
    "siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config={**TEXT, "projection_size": 32})),
    "siglip2": lambda: Siglip2Model(
        Siglip2Config(
            vision_config={**SMALL, "patch_size": 8, "num_patches": 16},
            text_config={**TEXT, "vocab_size": 40, "max_position_embeddings": 64, "projection_size": 32},
        )
    ),
}
PROCESSORS = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
             "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
               "resample": 2},
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor", "do_resize": True, "patch_size": 8,
                "max_num_patches": 16, "resample": 2},
}  # fmt: skip
MEAN, STD = [0.48, 0.45, 0.41], [0.27, 0.26, 0.28]


def make_towers(family, seed=0):
    """With random weights, of which a scale and a bias are away from their start."""
    torch.manual_seed(seed)
    towers = FAMILIES[family]().eval()
    with torch.no_grad():
        towers.logit_scale.fill_(1.5)
        for name, weight in towers.named_parameters():
            if "projection" in name or "position_embedding" in name:
                weight.normal_(std=0.3)
    return towers


def make_tokenizer(family="clip"):
    if family == "siglip2":  # its tokenizer is of one class alone; this one reads letters
        letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", ".", *map(chr, range(ord("a"), ord("z") + 1))]
        return Siglip2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, model_max_length=64)
    special = {"<pad>": PAD, "<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS}
    vocabulary = special | {word: number for number, word in enumerate(WORDS, len(special))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", model_max_length=16)  # fmt: skip


def save_towers(folder, family, seed=0):
    """The model's folder, as `from_pretrained` finds it on the Hub."""
    towers = make_towers(family, seed)
    towers.save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    fields = {**PROCESSORS.get(family, PROCESSORS["clip"]), "do_normalize": True, "image_mean": MEAN, "image_std": STD,
              "do_rescale": True, "rescale_factor": 1 / 255}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return towers
