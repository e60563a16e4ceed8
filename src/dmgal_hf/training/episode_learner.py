"""The model with the losses of a training episode."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..model.modeling_dmgal import DmgalModel, DmgalOutput
from ..model.video_processing_dmgal import DmgalVideoProcessor


class EpisodeLearner(nn.Module):
    """
    The model with the loss of an episode. Two more may be added to it, both off by default, over supports and queries:

    - One names the base class of every clip from the mean of its frame descriptors (ours): a linear layer that
      training needs and checkpoints leave out.
    - One names it by text: the cross entropy of the clip's text scores over the names of all base classes, the
      video-text contrast of CLIP-FSAR (arXiv 2303.02982), which takes the cosine of the mean over the frames with the
      text of a class, times a scale. Ours: a class's text is the mean over `config.text_templates`; projection, scale
      and bias are those of the pair of towers and stay as they are; and what it reaches is what the paradigm trains,
      with "adapter" the adapters alone. Of CLIP-FSAR's modulation of prototypes by text there is nothing here.

    Args:
        model ([`DmgalModel`]): the model.
        processor ([`DmgalVideoProcessor`]): normalises the uint8 frames, on the device.
        num_classes (`int`): classes of the training dataset, numbered from 0.
        class_loss_weight (`float`): weight of the first extra loss.
        text_loss_weight (`float`): weight of the second.
        base_names (`Mapping[int, str]`, *optional*): base classes by number, for the second.

    Raises:
        ValueError: the names are numbers, or the text tower cannot tell or read them.
    """

    def __init__(
        self,
        model: DmgalModel,
        processor: DmgalVideoProcessor,
        num_classes: int,
        class_loss_weight: float,
        text_loss_weight: float = 0.0,
        base_names: Mapping[int, str] | None = None,
    ):
        super().__init__()
        self.model = model
        self.processor = processor
        self.class_loss_weight = class_loss_weight
        # Descriptors of different clips start out almost equal: normalised, their differences are heard at once.
        self.class_head = (
            nn.Sequential(nn.BatchNorm1d(model.num_features, affine=False), nn.Linear(model.num_features, num_classes))
            if class_loss_weight > 0
            else None
        )
        self.backbone_is_frozen = not any(one.requires_grad for one in model.backbone.parameters())
        self.text_loss_weight = text_loss_weight
        if text_loss_weight > 0:
            numbers = sorted(base_names)
            embeds = embed_base_classes(model, [base_names[number] for number in numbers])
            # Not saved: names and text tower give them again.
            self.register_buffer("text_embeds", embeds, persistent=False)  # (base classes, E)
            self.register_buffer("text_classes", torch.tensor(numbers, device=embeds.device), persistent=False)

    def train(self, mode: bool = True) -> "EpisodeLearner":
        """As in torch, but a frozen backbone stays in eval mode: its batch statistics are not those of the clips."""
        super().train(mode)
        if self.backbone_is_frozen:
            self.model.backbone.eval()
        return self

    def encode_clips(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """That of the model: FSDP wants every call to come through its outermost module."""
        return self.model.encode_clips(pixel_values)

    def score_clips(self, *inputs: Any) -> torch.Tensor:
        """That of the model."""
        return self.model.score_clips(*inputs)

    def forward(self, batch: dict[str, torch.Tensor], way: int | None = None) -> tuple[torch.Tensor, DmgalOutput]:
        """A batch of [`EpisodeVideos`] -> the loss to minimise, and the output of the model."""
        output = self.model(
            support_pixel_values=self.processor.normalize(batch["support_pixel_values"]),
            support_labels=batch["support_labels"],
            query_pixel_values=self.processor.normalize(batch["query_pixel_values"]),
            labels=batch["labels"],
            way=way,
        )
        loss = output.loss
        if self.class_head is None and not self.text_loss_weight:
            return loss, output
        classes = torch.cat([batch["support_classes"], batch["query_classes"]], 1).flatten()  # (B·(S + Q),)
        if self.class_head is not None:
            features = torch.cat([output.support_features, output.query_features], 1).mean(2)  # (B, S + Q, D)
            class_loss = F.cross_entropy(self.class_head(features.float().flatten(0, 1)), classes)
            loss = loss + self.class_loss_weight * class_loss
        if self.text_loss_weight:
            embeds = torch.cat([output.support_embeds, output.query_embeds], 1).flatten(0, 1)  # (B·(S + Q), E)
            places = torch.searchsorted(self.text_classes, classes)  # of the clips' classes among the base classes
            text_loss = F.cross_entropy(self.model.text_logits(embeds, self.text_embeds), places)
            loss = loss + self.text_loss_weight * text_loss
        return loss, output


def embed_base_classes(model: DmgalModel, names: Sequence[str]) -> torch.Tensor:
    """
    Text prototypes of the base classes, `(N, E)`; see [`DmgalModel.embed_class_names`].

    Raises:
        ValueError: the names are the same but for numbers in them, as those of SSv2-Full without its label files.
    """
    if len({re.sub(r"\d+", "", name) for name in names}) == 1 < len(names):
        raise ValueError(
            f"text_loss_weight: the base classes are numbered ({', '.join(names[:3])}, ...), and numbers tell a text "
            "tower nothing of what is done: give class_labels (Something-Something V2) or name the folders of the "
            "classes, or leave text_loss_weight out."
        )
    return model.embed_class_names(names)
