"""The example clips of a few-shot classifier: read from what users give, checked, kept, and found again."""

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import extract_commit_hash

from ..model.backbones import has_adapters
from ..model.configuration_dmgal import DmgalConfig, check_text_weight
from ..model.modeling_dmgal import DmgalSupport
from ..model.video_processing_dmgal import (
    DmgalVideoProcessor,
    _list_videos,
    undecoded_column,
)

if TYPE_CHECKING:
    import datasets

UNKNOWN = "unknown"
SUPPORT_FILE, ABOUT_FILE = "support.safetensors", "support.json"
SUPPORT_FORMAT = 1
UNNAMED_MODEL = "a model that was never saved or got adapters afterwards"

_ABOUT_FIELDS = {"labels": list, "unknown": (int, float, type(None)), "unknown_is_auto": bool,
                 "temperature": (int, float), "clip_digests": list, "model": (str, type(None)),
                 "revision": (str, type(None)), "dtype": str, "fingerprint": str}  # fmt: skip

TEXT_PROTOTYPES = "text.classes"  # among the tensors of a kept support set


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


# Example clips


def read_classes(
    support: Any, video_column: str, label_column: str, with_text: bool = False
) -> dict[str, dict[str, Any]]:
    """For each label its videos, by the names that errors call them; there may be none of a label `with_text`."""
    import datasets  # takes longer to import than all of dmgal_hf

    if isinstance(support, datasets.DatasetDict):
        raise ValueError(f"`support` is a DatasetDict of the splits {list(support)}: give one of them")
    if isinstance(support, (datasets.Dataset, datasets.IterableDataset)):
        support = _group_rows(support, video_column, label_column)
    if not isinstance(support, Mapping):
        raise ValueError(
            f"`support` is a mapping of labels to videos or a datasets.Dataset, not a {type(support).__name__}"
        )
    if not support:
        raise ValueError("`support` is empty: give at least one class")
    for label in support:
        if not isinstance(label, str):
            raise ValueError(f"the label {label!r} is a {type(label).__name__}: labels are strings")
    return {
        label: {}
        if with_text and (examples is None or (isinstance(examples, (list, tuple)) and not examples))
        else _list_videos(examples, f"support[{label!r}]")
        for label, examples in support.items()
    }


def _group_rows(dataset: "datasets.Dataset", video_column: str, label_column: str) -> dict[str, list[Any]]:
    import datasets

    names = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know its own
    for name in (video_column, label_column):
        if name not in names:
            raise ValueError(f"the dataset has no column {name!r}; its columns are {names}")
    feature, classes = (dataset.features or {}).get(label_column), {}
    if isinstance(dataset, datasets.IterableDataset):  # one pass
        dataset = undecoded_column(dataset[video_column]).source
        rows = ((row[label_column], row[video_column]) for row in dataset)
    else:
        rows = zip(dataset[label_column], undecoded_column(dataset[video_column]))
    for row, (label, video) in enumerate(rows):
        for name, value in ((label_column, label), (video_column, video)):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                raise ValueError(f"row {row} of the dataset has no {name}")
        name = feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label)
        classes.setdefault(name, []).append(video)
    return classes


def clip_digests(classes: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    return {name: _digest(video) for videos in classes.values() for name, video in videos.items()}


def _digest(video: Any) -> str | None:
    """What tells whether two clips are the same video: a hash of the file's content, or of the address of others."""
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        if os.path.isfile(path):
            return _file_digest(path)
        return hashlib.sha256((os.path.realpath(path) if os.path.exists(path) else path).encode()).hexdigest()
    return hashlib.sha256(video).hexdigest() if isinstance(video, (bytes, bytearray, memoryview)) else None


def _file_digest(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def warn_of_repeats(classes: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str | None], seen: dict[str, str]):
    """`seen`: labels by the digests of clips that are there already."""
    for label, videos in classes.items():
        for name, video in videos.items():
            digest = digests[name]
            if digest is not None and seen.setdefault(digest, label) != label:
                shown = os.fspath(video) if isinstance(video, (str, os.PathLike)) else name
                warnings.warn(
                    f"{shown} is an example of {label!r}, and the same video is one of {seen[digest]!r}: the two "
                    "cannot be told apart by it",
                    stacklevel=3,
                )


def numbered(support: DmgalSupport, numbers: list[int], way: int) -> DmgalSupport:
    labels = torch.tensor([numbers], dtype=torch.int64, device=support.labels.device)
    return replace(support, labels=labels, way=way)


def check_same_size(first: DmgalSupport, other: DmgalSupport):
    sizes = [
        {name: state.shape[-2] // part.features.shape[1] for name, state in part.states.items() if state.ndim > 1}
        for part in (first, other)
    ]
    if sizes[0] != sizes[1] or first.features.shape[2:] != other.features.shape[2:]:
        raise ValueError(
            "the clips come out in different sizes: set do_center_crop=True of the processor, or give clips of one "
            "size"
        )


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


# Models and kept support sets


def load_processor(model: PreTrainedModel) -> DmgalVideoProcessor:
    name = model_id(model)
    if not name:
        raise ValueError(
            "the model does not come from a checkpoint, so there is no processor to go with it: pass "
            "image_processor=DmgalVideoProcessor(...)."
        )
    try:
        return DmgalVideoProcessor.from_pretrained(name, revision=model_revision(model))
    except OSError as error:
        raise ValueError(
            f"{name} has no preprocessor_config.json: save its DmgalVideoProcessor there, or pass image_processor=."
        ) from error


def model_id(model: PreTrainedModel) -> str | None:
    """Id or absolute folder of the checkpoint, None for a model that has none."""
    name = getattr(model, "name_or_path", None)
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None


def kept_model_id(model: PreTrainedModel) -> str | None:
    """[`model_id`] if that checkpoint alone gives the model, None if it never was one or got adapters afterwards."""
    # peft calls the model in itself by the name of the checkpoint; transformers' own load_adapter() marks the model.
    changed = isinstance(model, PeftModel) or getattr(model.backbone, "_hf_peft_config_loaded", False)
    built_here = _is_of_backbone(model) and (model.config.paradigm != "adapter" or has_adapters(model.backbone))
    return None if changed or built_here else model_id(model)


def fields_of_untrained(model: PreTrainedModel) -> dict[str, Any] | None:
    """
    What `DmgalModel.untrained` needs beside the backbone to give this model again; `None` for one of a checkpoint.
    """
    if not _is_of_backbone(model) or kept_model_id(model) is None:
        return None
    names = set(DmgalConfig.__annotations__) & set(DmgalConfig.__dataclass_fields__)
    left_out = {"backbone_config", "adapter_config", "format_version", "text_model"}
    return {name: getattr(model.config, name) for name in sorted(names - left_out)}


def _is_of_backbone(model: PreTrainedModel) -> bool:
    """Whether it is named after its backbone, as by from_backbone(), and not after a checkpoint of its own."""
    return bool(model.name_or_path) and model.name_or_path == model.backbone.name_or_path


def model_revision(model: PreTrainedModel) -> str | None:
    """Commit of the checkpoint on the Hub; transformers no longer keeps it, and then it is that of the cached main."""
    name = model_id(model)
    if name is None or os.path.isabs(name):
        return None
    cached = try_to_load_from_cache(name, "config.json")
    known = getattr(model.config, "_commit_hash", None)
    return extract_commit_hash(cached if isinstance(cached, str) else None, known)


def write_support(
    folder: str | os.PathLike, support: DmgalSupport, about: dict[str, Any], text_embeds: torch.Tensor | None = None
):
    """
    Both files of a kept support set, with the prototypes (N, E) by text if there are any. They replace those of before
    once they are whole. The second names the first by its hash, so they cannot be mixed up.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if text_embeds is not None:
        support = replace(support, states=support.states | {TEXT_PROTOTYPES: text_embeds[None]})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".aside") as aside:
        tensors, fields = Path(aside, SUPPORT_FILE), Path(aside, ABOUT_FILE)
        support.save(tensors)
        text = json.dumps(about | {"tensors": _file_digest(tensors)}, indent=2, ensure_ascii=False)
        fields.write_text(text + "\n", "utf-8", errors="backslashreplace")  # half a character, as JSON writes it
        os.replace(tensors, folder / SUPPORT_FILE)
        os.replace(fields, folder / ABOUT_FILE)


def read_support(about: dict[str, Any], path: Path) -> tuple[DmgalSupport, torch.Tensor | None]:
    """
    The tensors that `about` describes, and the prototypes (N, E) by text where it has them. Raises `ValueError` if
    they are damaged, or those of another support set.
    """
    try:
        support = DmgalSupport.load(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): fit again from the clips, and save") from error
    # The hash is younger than the format.
    same = "tensors" not in about or about["tensors"] == _file_digest(path)
    if not same or (support.way, support.labels.numel()) != (len(about["labels"]), len(about["clip_digests"])):
        raise ValueError(
            f"{path} and the {ABOUT_FILE} beside it are not of one support set: copy both files of a folder that "
            "save() wrote, or fit again from the clips"
        )
    text_embeds = support.states.pop(TEXT_PROTOTYPES, None)
    return support, None if text_embeds is None else text_embeds[0]


def check_kept_support(support: DmgalSupport, one: DmgalSupport, path: Path, text_embeds: torch.Tensor | None = None):
    """
    Raises `ValueError` unless `support`, read from `path`, is what the model makes of clips. `one` is what it makes of
    a single clip: as `support`, but for the number of clips and of the patches of each. With `text_embeds`, prototypes
    (N, E), classes may have no clip.
    """

    def refuse(name: str, problem: str):
        raise ValueError(f"{path} is damaged ({name}: {problem}): fit again from the clips, and save")

    if support.states.keys() != one.states.keys():
        refuse("states", f"{sorted(support.states)} in place of {sorted(one.states)}")
    empty = text_embeds is not None and not support.labels.numel()
    clips = max(1, support.labels.numel())
    pairs = {"features": (support.features, one.features, 1), "labels": (support.labels, one.labels, 1)}
    pairs |= {name: (state, one.states[name], -2) for name, state in support.states.items() if name != "num_support"}
    for name, (found, like, axis) in pairs.items():
        shapes = [list(tensor.shape) for tensor in (found, like)]
        if (
            found.dtype != like.dtype
            or found.ndim != like.ndim
            or (0 in found.shape and not empty)
            or found.shape[axis] % clips
        ):
            refuse(
                name, f"{found.dtype} of shape {shapes[0]}, where the model gives {like.dtype} of {shapes[1]} a clip"
            )
        for shape in shapes:
            del shape[axis]
        if shapes[0] != shapes[1]:
            refuse(name, f"a shape of {list(found.shape)}, where the model gives {list(like.shape)} a clip")
        if not found.isfinite().all():
            refuse(name, "NaN or infinity")
    if text_embeds is not None:
        like = (support.way, one.states["text.videos"].shape[-1]) if "text.videos" in one.states else None
        if tuple(text_embeds.shape) != like or not text_embeds.isfinite().all():
            refuse(TEXT_PROTOTYPES, f"{list(text_embeds.shape)} in place of {like}, or NaN or infinity")
    with_clips = sorted(set(support.labels[0].tolist()))
    if with_clips != list(range(support.way)) and (
        text_embeds is None or not set(with_clips) <= set(range(support.way))
    ):
        refuse("labels", f"not the numbers 0 to {support.way - 1}")
    if support.states.get("num_support", torch.tensor([clips])).tolist() != [clips]:
        refuse("num_support", f"not {clips}")


def find_support(
    folder_or_id: str | os.PathLike, revision: str | None, token: str | bool | None
) -> tuple[dict[str, Any], Path]:
    """What `support.json` says, and the path of the tensors."""
    name = os.fspath(folder_or_id)
    if os.path.isdir(name):
        about, tensors = Path(name, ABOUT_FILE), Path(name, SUPPORT_FILE)
        missing = [path.name for path in (about, tensors) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{name} holds no support set: {', '.join(missing)} is missing. save() writes it.")
    else:
        try:
            about, tensors = (
                Path(hf_hub_download(name, file, revision=revision, token=token))
                for file in (ABOUT_FILE, SUPPORT_FILE)
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(f"{name} is no folder and no support set on the Hub ({error})") from error
    try:
        fields = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{about} is damaged ({error}): fit again from the clips, and save") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != SUPPORT_FORMAT:
        raise ValueError(
            f"{about} has format version {version!r}; this release of dmgal_hf reads {SUPPORT_FORMAT}. Update it with "
            "`pip install -U dmgal-hf`, or fit again."
        )
    for name, kind in _ABOUT_FIELDS.items():
        problem = f"no {name!r}" if name not in fields else f"{name!r} is {fields[name]!r}"
        if name not in fields or not isinstance(fields[name], kind):
            raise ValueError(f"{about} is damaged ({problem}): fit again from the clips, and save")
    try:
        check_text_weight(fields.setdefault("text_weight", 0.0))
        if not isinstance(fields.setdefault("model_fields", None), dict | None):
            raise ValueError(f"'model_fields' is {fields['model_fields']!r}")
    except ValueError as error:
        raise ValueError(f"{about} is damaged ({error}): fit again from the clips, and save") from error
    labels, digests = fields["labels"], fields["clip_digests"]
    if len(labels) < 2 or len(set(map(str, labels))) < len(labels) or not all(isinstance(one, str) for one in labels):
        raise ValueError(f"{about} is damaged ('labels' are no two names or more): fit again from the clips, and save")
    if not all(isinstance(digest, str | None) for digest in digests):
        raise ValueError(f"{about} is damaged ('clip_digests' are no texts): fit again from the clips, and save")
    return fields, tensors


def support_card(repo_id: str, base_model: str | None, shots: Mapping[str, int]) -> str:
    """
    Model card of a pushed support set. `base_model`: the model's id on the Hub, without which the call asks for it;
    `shots`: example clips a class.
    """
    model = "" if base_model else ', model="FOLDER_OR_ID"'
    lines = ["---", "library_name: dmgal-hf", "pipeline_tag: video-classification", "tags:", "- few-shot-learning"]
    lines += [f"base_model: {base_model}"] if base_model else []
    lines += ["---", "", "# A few-shot video classifier", "", "| class | example clips |", "|---|---|"]
    lines += [f"| {_escaped(label)} | {count} |" for label, count in shots.items()]
    lines += [
        "",
        "```python",
        "from dmgal_hf import FewShotVideoClassificationPipeline",
        "",
        f'clf = FewShotVideoClassificationPipeline.from_pretrained("{repo_id}"{model})',
        'clf("query.mp4")',
        "```",
        "",
    ]
    lines += (
        [] if base_model else ["The model is not on the Hub: give the folder or id of the one it was made with.", ""]
    )
    return "\n".join(lines)


def _escaped(label: str) -> str:
    """A label as the cell of a Markdown table that shows just its characters, on one line."""
    text = " ".join(label.encode("utf-8", "replace").decode().split())
    return re.sub(r"[^\w\s]", lambda mark: f"&#{ord(mark[0])};", text)
