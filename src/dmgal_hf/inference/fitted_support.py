"""The classes of a few-shot classifier: their clips encoded, scored without themselves, and the answers they give."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch

from ..model.class_texts import combined_logits
from ..model.kept_supports import DmgalSupport
from ..model.modeling_dmgal import DmgalModel
from ..model.video_processing_dmgal import DmgalVideoProcessor

UNKNOWN = "unknown"


@dataclass(frozen=True)
class FittedSupport:
    """
    A support set of one episode: `labels` names its classes; the S clips of `support` have the `digests` (None for
    arrays); `pixel_values` (S, T, 3, H, W) are kept only where leaving one out needs them. `unknown` is the threshold
    on distances, and `auto` says that it comes from leaving one out. `text_embeds` (N, E) are the prototypes by text,
    `None` where text is left out.
    """

    labels: tuple[str, ...]
    support: DmgalSupport
    digests: tuple[str | None, ...]
    pixel_values: torch.Tensor | None
    unknown: float | None
    auto: bool
    text_embeds: torch.Tensor | None = None

    @cached_property
    def without_clips(self) -> tuple[str, ...]:
        """The classes that have text alone."""
        with_clips = set(self.support.labels[0].tolist())
        return tuple(label for number, label in enumerate(self.labels) if number not in with_clips)


def encode_examples(
    model: DmgalModel,
    processor: DmgalVideoProcessor,
    classes: Mapping[str, Mapping[str, Any]],
    keep: bool,
    batch_size: int,
) -> tuple[DmgalSupport, torch.Tensor | None]:
    """All clips as supports of class 0, and their pixel values (S, T, 3, H, W) if the model needs them again."""
    videos = {name: video for of_class in classes.values() for name, video in of_class.items()}
    names = list(videos)
    if not names:
        if model.has_cross_adapters or model.cross_attention is not None:
            raise ValueError("no class has a clip, and this model (C-MGA) reads queries beside clips: give some")
        return blank_support(model, processor).to(model.device).select([]), None
    parts, kept = [], []
    for start in range(0, len(names), batch_size):
        batch = {name: videos[name] for name in names[start : start + batch_size]}
        pixel_values = processor._pixel_values(batch)
        parts.append(_as_support(model, pixel_values))
        check_finite(parts[-1].features, model.dtype, ", ".join(batch))
        check_same_size(parts[0], parts[-1])
        if keep and model.has_cross_adapters:
            kept.append(pixel_values)
    return DmgalSupport.cat(parts), torch.cat(kept) if kept else None


def blank_support(model: DmgalModel, processor: DmgalVideoProcessor) -> DmgalSupport:
    """What the model makes of one black clip, on the CPU: dtypes and shapes of what it keeps of any other."""
    size = processor.crop_size if processor.do_center_crop else processor.size
    height, width = (size.get(side, size.get("shortest_edge")) for side in ("height", "width"))
    return _as_support(model, torch.zeros(1, processor.num_frames, 3, height, width)).to("cpu")


def _as_support(model: DmgalModel, pixel_values: torch.Tensor) -> DmgalSupport:
    labels = torch.zeros(1, len(pixel_values), dtype=torch.int64, device=model.device)
    return model.encode_support(pixel_values[None].to(model.device, model.dtype), labels, way=1)


def numbered(support: DmgalSupport, numbers: list[int], way: int) -> DmgalSupport:
    labels = torch.tensor([numbers], dtype=torch.int64, device=support.labels.device)
    return replace(support, labels=labels, way=way)


def of_classes(fitted: FittedSupport, left: tuple[str, ...]) -> FittedSupport:
    """The same with these of its classes alone."""
    names = [fitted.labels[number] for number in fitted.support.labels[0].tolist()]
    clips = [clip for clip, name in enumerate(names) if name in left]
    by_text = fitted.text_embeds
    return replace(
        fitted,
        labels=left,
        support=numbered(fitted.support.select(clips), [left.index(names[clip]) for clip in clips], len(left)),
        digests=tuple(fitted.digests[clip] for clip in clips),
        pixel_values=None if fitted.pixel_values is None else fitted.pixel_values[clips],
        text_embeds=None if by_text is None else by_text[[fitted.labels.index(label) for label in left]],
    )


def check_same_size(first: DmgalSupport, other: DmgalSupport):
    sizes = [
        {name: state.shape[-2] // part.features.shape[1] for name, state in part.states.items()}
        for part in (first, other)
    ]
    if sizes[0] != sizes[1] or first.features.shape[2:] != other.features.shape[2:]:
        raise ValueError(
            "the clips come out in different sizes: set do_center_crop=True of the processor, or give clips of one "
            "size"
        )


def leave_one_out(model: DmgalModel, fitted: FittedSupport, purpose: str) -> torch.Tensor:
    """Logits of the support clips, each without itself: (S, N) float32 on the CPU."""
    counts = Counter(fitted.support.labels[0].tolist())
    single = [label for number, label in enumerate(fitted.labels) if counts[number] < 2]
    if single:
        raise ValueError(
            f"{purpose} leaves out one clip at a time, so every class needs two or more, but {single} has one or "
            "none: add a clip, or do without."
        )
    clips = fitted.pixel_values
    if model.has_cross_adapters and clips is None:
        raise ValueError(
            f'{purpose} needs the clips again for a model with Cmga-Adapters: fit with unknown="auto", which '
            "keeps them."
        )
    clips = None if clips is None else clips[None].to(model.device, model.dtype)
    return model.leave_one_out(fitted.support, clips)[0].float().cpu()


@torch.no_grad()
def best_scale(logits: torch.Tensor, own: torch.Tensor, text_log_probs: torch.Tensor | None) -> tuple[float, float]:
    """
    The temperature and the weight of text, of those that `calibrate` looks at, with the smallest cross entropy to its
    targets.

    Args:
        logits (`torch.Tensor` of shape `(S, N)`): of the support clips, each without itself.
        own (`torch.LongTensor` of shape `(S,)`): their classes.
        text_log_probs (`torch.Tensor` of shape `(S, N)`, *optional*): by text; without it the weight is 0.
    """
    clips, way = logits.shape
    targets = torch.full((clips, way), 1 / (clips + way), dtype=torch.float64)
    targets[range(clips), own] = (clips + 1) / (clips + way)
    temperatures = torch.logspace(-3, 2, 501, dtype=torch.float64)
    by_clips = (logits.double() / temperatures[:, None, None]).log_softmax(-1)
    weights, by_text = [0.0], torch.zeros(())
    if text_log_probs is not None:
        weights += torch.logspace(-2, 1, 31, dtype=torch.float64).tolist()
        by_text = text_log_probs.double().cpu()
    fits = [((by_clips + weight * by_text).log_softmax(-1) * targets).sum((1, 2)) for weight in weights]
    weight, temperature = divmod(int(torch.stack(fits).argmax()), len(temperatures))
    return float(temperatures[temperature]), weights[weight]


def answer(
    logits: torch.Tensor, fitted: FittedSupport, temperature: float, text_weight: float, top_k: int | None
) -> list[dict[str, Any]]:
    """Of a video; `logits` (1, N) by clips, or (2, N) with log-probabilities by text: the best labels first."""
    (logits, *by_text), labels = logits.double(), list(fitted.labels)
    if fitted.unknown is not None:
        logits, labels = torch.cat([logits, logits.new_tensor([-fitted.unknown])]), [*labels, UNKNOWN]
        # It has no text: there it is as likely as chance.
        by_text = [torch.cat([of_text, of_text.new_tensor([-math.log(len(of_text))])]) for of_text in by_text]
    if by_text and text_weight:
        logits = combined_logits(logits, by_text[0], temperature, text_weight)
    scores = (logits / temperature).softmax(0)
    order = logits.argsort(descending=True, stable=True)[:top_k]
    return [{"label": labels[number], "score": float(scores[number])} for number in order.tolist()]


def check_unknown(distance: Any, labels: Any, reserve: bool | None = None) -> float | None:
    """`reserve`: whether the answer "unknown" is wanted, by default whether there is a distance."""
    if distance is not None and not (_is_finite(distance) and distance >= 0):
        raise ValueError(f"`unknown` is {distance!r}; allowed are 'auto' (in fit), a distance of 0 or more, or None")
    if UNKNOWN in labels and (distance is not None if reserve is None else reserve):
        raise ValueError(f"a class is called {UNKNOWN!r}, which the threshold on distances answers: rename the class")
    return None if distance is None else float(distance)


def check_temperature(value: Any) -> float:
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"temperature must be a number above 0, got {value!r}")
    return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_clips_for_unknown(unknown: Any, classes: Mapping[str, Any]):
    empty = [label for label, clips in classes.items() if not clips]
    if unknown is not None and empty:
        raise ValueError(f"`unknown` is a distance to clips, and {empty} have none: give clips, or do without unknown")


def check_whole_number(name: str, value: int):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_finite(computed: torch.Tensor, dtype: torch.dtype, source: str):
    if not computed.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"the model gives NaN or infinity in {name} for {source}: load it in another dtype (float16 overflows "
            "where bfloat16 does not), or check its weights"
        )
