"""Class names as text: the texts of a class, the text tower that embeds them, and scores that combine both towers."""

import math
import os
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModelWithProjection,
    MetaClip2TextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2TextModel,
    SiglipTextModel,
)

TEXT_FOLDER = "text_tower"  # of a checkpoint that brings its own
TEXTS_TOGETHER = 64  # in one pass through the text tower

# How the two towers of a family meet: a linear projection of both, or the pooling head of the vision tower.
PROJECTED = ("clip_vision_model", "metaclip_2_vision_model")
POOLED = ("siglip_vision_model", "siglip2_vision_model")
_TEXT_TOWERS = {
    "clip": CLIPTextModelWithProjection,
    "metaclip_2": MetaClip2TextModelWithProjection,
    "siglip": SiglipTextModel,
    "siglip2": Siglip2TextModel,
}


class TextHead(nn.Module):
    """
    What CLIP and SigLIP compare pictures with texts by: the projection of a picture (SigLIP has none: its vision tower
    ends in a pooling head), and the scale and bias of the cosine. Frozen unless training says otherwise.

    Args:
        backbone_config (`PreTrainedConfig`): of a vision tower that has a text tower beside it.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, backbone_config: PreTrainedConfig):
        super().__init__()
        check_has_text_tower(backbone_config)
        if backbone_config.model_type in PROJECTED:
            self.projection = nn.Linear(backbone_config.hidden_size, backbone_config.projection_dim, bias=False)
        else:
            self.projection = nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as both start their training
        self.logit_bias = nn.Parameter(torch.zeros(()))
        self.requires_grad_(False)

    @torch.no_grad()
    def take_over(self, towers: PreTrainedModel):
        """Copies the head of a model of two towers."""
        if isinstance(self.projection, nn.Linear):
            self.projection.load_state_dict(towers.visual_projection.state_dict())
        self.logit_scale.copy_(towers.logit_scale.reshape(()))
        if hasattr(towers, "logit_bias"):
            self.logit_bias.copy_(towers.logit_bias.reshape(()))

    def forward(self, video_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`(..., V, E)` and `(..., N, E)` -> logits `(..., V, N)` float32: scale · cosine + bias, CLIP's own head."""
        with torch.autocast(video_embeds.device.type, enabled=False):
            cosine = F.normalize(video_embeds.float(), dim=-1) @ F.normalize(text_embeds.float(), dim=-1).mT
            return cosine * self.logit_scale.float().exp() + self.logit_bias.float()


def has_text_tower(backbone_config: PreTrainedConfig) -> bool:
    return backbone_config.model_type in PROJECTED + POOLED


def check_has_text_tower(backbone_config: PreTrainedConfig):
    if not has_text_tower(backbone_config):
        raise ValueError(
            f"text_guidance needs a backbone with a text tower beside it (CLIP, SigLIP, SigLIP2, MetaCLIP 2), and "
            f"{backbone_config.model_type!r} has none: leave text_guidance and text_weight out."
        )


def combined_logits(
    logits: torch.Tensor, text_log_probs: torch.Tensor, temperature: float, text_weight: float
) -> torch.Tensor:
    """
    Scores of clips and of texts in one (ours): temperature · (log p + text_weight · log p_text), so that softmax of
    the result by `temperature` is the product of both probabilities. A class without clips, of logit minus infinity,
    has for p that of chance among the classes with clips.

    Args:
        logits (`torch.Tensor` of shape `(..., N)`): of [`class_logits`].
        text_log_probs (`torch.Tensor` of shape `(..., N)`): log softmax of the text scores.
        temperature (`float`): p is softmax(logits / temperature).
        text_weight (`float`): 0 leaves the order of the logits as it is.

    Returns:
        `torch.Tensor` of shape `(..., N)`.
    """
    without_clips = logits.isneginf()
    chance = -(~without_clips).sum(-1, keepdim=True).clamp(min=1).log().to(logits.dtype)
    log_probs = torch.where(without_clips, chance, (logits / temperature).log_softmax(-1))
    return temperature * (log_probs + text_weight * text_log_probs)


def class_texts(
    labels: Sequence[str], descriptions: Mapping[str, str] | None, templates: Sequence[str]
) -> list[list[str]]:
    """
    The texts of each class: its description, or else the templates with its label, of which underscores are spaces.

    Raises:
        ValueError: labels that are empty or read the same, or descriptions of no class; all are named.
    """
    descriptions = dict(descriptions or {})
    for label, text in descriptions.items():
        if label not in labels:
            raise ValueError(f"descriptions has {label!r}, which is no class; the classes are {list(labels)}")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the description of {label!r} must be a text, got {text!r}")
    seen, texts = {}, []
    for label in labels:
        if label in descriptions:
            texts.append([descriptions[label].strip()])
            continue
        words = " ".join(label.replace("_", " ").split())
        if not words:
            raise ValueError(f"the label {label!r} is empty: name the class, or leave text out with text_weight=0")
        other = seen.setdefault(words.lower(), label)
        if other != label:
            raise ValueError(
                f"the labels {other!r} and {label!r} read the same to a text tower: rename one, give it a "
                "description, or leave text out with text_weight=0"
            )
        texts.append([template.format(words) for template in templates])
    return texts


def load_text_tower(
    name_or_path: str | os.PathLike, subfolder: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    The text tower, with its projection, of a model of two towers; and its tokenizer. Raises `OSError` where it cannot
    be read, `ImportError` where its tokenizer needs a package, `ValueError` for another kind of model.
    """
    try:
        return _read_text_tower(name_or_path, subfolder)
    except OSError as error:
        raise OSError(
            f"the text tower {os.path.join(name_or_path, subfolder)} cannot be read ({error}): set "
            "model.config.text_model to where it lies now, or leave text out with text_weight=0."
        ) from error
    except ImportError as error:  # older SigLIP tokenizers
        raise ImportError(
            f"the tokenizer of {name_or_path} needs sentencepiece: pip install sentencepiece protobuf, or leave text "
            "out with text_weight=0."
        ) from error


def _read_text_tower(
    name_or_path: str | os.PathLike, subfolder: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = AutoConfig.from_pretrained(name_or_path, subfolder=subfolder)
    family = config.model_type.removesuffix("_text_model")
    if family not in _TEXT_TOWERS:
        raise ValueError(
            f"{os.fspath(name_or_path)!r} is of type {config.model_type!r}, and not a model of two towers: "
            f"{', '.join(_TEXT_TOWERS)}."
        )
    text_config = getattr(config, "text_config", config)
    if hasattr(config, "projection_dim"):
        text_config.projection_dim = config.projection_dim
    tower_class = _TEXT_TOWERS[family]
    # A class of its own, so that the weights of the other tower, which are meant to be left, are not reported.
    rest = {"_keys_to_ignore_on_load_unexpected": ["^vision_model", "^visual_projection", "^logit_"]}
    tower = type(tower_class.__name__, (tower_class,), rest).from_pretrained(
        name_or_path, config=text_config, subfolder=subfolder, dtype=torch.float32
    )
    return tower, AutoTokenizer.from_pretrained(name_or_path, subfolder=subfolder)


@torch.no_grad()
def embed_texts(tower: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """
    Embeddings of texts, `(len(texts), E)` float32 of length 1, where the tower is.

    Raises:
        ValueError: a text is longer than the tower reads; it is named.
    """
    longest = tower.config.max_position_embeddings
    for text, tokens in zip(texts, tokenizer(list(texts), verbose=False).input_ids):
        if len(tokens) > longest:
            raise ValueError(
                f"{text!r} is {len(tokens)} tokens long and the text tower reads {longest}: shorten the label or its "
                "description"
            )
    names, padding = ("input_ids", "attention_mask"), {"padding": True}
    if tower.config.model_type.startswith("siglip"):
        # It has learnt with texts that are all padded to one length, and without a mask.
        names, padding = ("input_ids",), {"padding": "max_length", "max_length": longest}
    inputs, parts = tokenizer(list(texts), return_tensors="pt", **padding).to(tower.device), []
    for start in range(0, len(texts), TEXTS_TOGETHER):
        output = tower(**{name: inputs[name][start : start + TEXTS_TOGETHER] for name in names})
        parts.append(output.text_embeds if "text_embeds" in output else output.pooler_output)
    return F.normalize(torch.cat(parts).float(), dim=-1)


def embed_classes(
    tower: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]]
) -> torch.Tensor:
    """One prototype a class, the mean of the embeddings of its texts: `(N, E)` float32."""
    embeds = embed_texts(tower, tokenizer, [text for of_class in texts for text in of_class])
    return torch.stack([part.mean(0) for part in embeds.split([len(of_class) for of_class in texts])])
