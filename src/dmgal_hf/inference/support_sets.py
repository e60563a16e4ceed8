"""Support sets on disk and on the Hub: written, found, read and checked."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..model.configuration_dmgal import DmgalConfig, check_text_weight
from ..model.kept_supports import DmgalSupport
from ..model.video_processing_dmgal import DmgalVideoProcessor
from .classifier_models import (
    MODEL_FOLDER,
    UNNAMED_MODEL,
    fields_of_untrained,
    goes_beside,
    kept_model_id,
    model_revision,
)
from .fitted_support import FittedSupport

SUPPORT_FILE, ABOUT_FILE = "support.safetensors", "support.json"
SUPPORT_FORMAT = 1

_ABOUT_FIELDS = {"labels": list, "unknown": (int, float, type(None)), "unknown_is_auto": bool,
                 "temperature": (int, float), "text_weight": (int, float), "clip_digests": list,
                 "model": (str, type(None)), "model_fields": (dict, type(None)), "model_beside": bool,
                 "revision": (str, type(None)), "dtype": str, "fingerprint": str}  # fmt: skip
# Younger than the format: what a file without them means.
_YOUNGER_FIELDS = {"text_weight": 0.0, "model_fields": None, "model_beside": False}

TEXT_PROTOTYPES = "text.classes"  # among the tensors of a kept support set


def write_support(
    folder: str | os.PathLike,
    fitted: FittedSupport,
    model: PreTrainedModel,
    processor: DmgalVideoProcessor,
    temperature: float,
    text_weight: float,
):
    """
    Both files of a kept support set, and the model itself if it [`goes_beside`] them. They replace those of before
    once they are whole. The second file names the first by its hash, so they cannot be mixed up.
    """
    # Brings `datasets` along, which takes longer to import than all else.
    from ..data.kept_clips import file_digest, fingerprint
    from ..data.written_aside import replace_folder

    about = {
        "format_version": SUPPORT_FORMAT,
        "labels": list(fitted.labels),
        "unknown": fitted.unknown,
        "unknown_is_auto": fitted.auto,
        "temperature": temperature,
        "text_weight": text_weight,
        "model_fields": fields_of_untrained(model),
        "clip_digests": list(fitted.digests),
        "model": kept_model_id(model),
        "model_beside": goes_beside(model),
        "revision": model_revision(model),
        "dtype": _dtype_name(model),
        "fingerprint": fingerprint(model, processor),
    }
    support, text_embeds = fitted.support, fitted.text_embeds
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if text_embeds is not None:
        support = replace(support, states=support.states | {TEXT_PROTOTYPES: text_embeds[None]})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".aside") as aside:
        tensors, fields = Path(aside, SUPPORT_FILE), Path(aside, ABOUT_FILE)
        support.save(tensors)
        text = json.dumps(about | {"tensors": file_digest(tensors)}, indent=2, ensure_ascii=False)
        fields.write_text(text + "\n", "utf-8", errors="backslashreplace")  # half a character, as JSON writes it
        if about["model_beside"]:
            model.save_pretrained(Path(aside, MODEL_FOLDER))
            processor.save_pretrained(Path(aside, MODEL_FOLDER))
            replace_folder(folder / MODEL_FOLDER, Path(aside, MODEL_FOLDER))
        os.replace(tensors, folder / SUPPORT_FILE)
        os.replace(fields, folder / ABOUT_FILE)


def check_made_with(about: dict[str, Any], model: PreTrainedModel, processor: DmgalVideoProcessor, name: str):
    """Raises `ValueError` unless the support set `name` was made with this model and processor; both are named."""
    from ..data.kept_clips import fingerprint

    if fingerprint(model, processor) != about["fingerprint"]:
        made_by = f"{about['model'] or UNNAMED_MODEL} (revision {about['revision']}, {about['dtype']})"
        raise ValueError(
            f"the support set {name!r} was made with {made_by}, and this classifier has "
            f"{kept_model_id(model) or UNNAMED_MODEL} (revision {model_revision(model)}, {_dtype_name(model)}): "
            "weights, config or preprocessing differ, so the kept features mean nothing here. Load that model, or fit "
            "again from the clips."
        )


def made_with(
    about: dict[str, Any],
    name: str,
    model: str | PreTrainedModel | None,
    revision: str | None,
    token: str | bool | None,
) -> dict[str, Any]:
    """
    What `pipeline()` needs for the model of the support set `name` of that `revision`; `model` is where it lies now,
    if it moved.
    """
    if model is None and about["model_beside"]:
        if not os.path.isdir(name):
            name = snapshot_download(name, revision=revision, token=token, allow_patterns=f"{MODEL_FOLDER}/*")
        about = about | {"model": os.path.abspath(os.path.join(name, MODEL_FOLDER)), "revision": None}
    fields, found = about["model_fields"], {"model": model}
    if model is None:
        model = about["model"]
        if not model or (os.path.isabs(model) and not os.path.isdir(model)):
            raise FileNotFoundError(
                f"the model of {name!r} was {model or UNNAMED_MODEL}, which is not here: pass model= with the model, "
                "its folder or its id"
            )
        found = {"model": model, "revision": about["revision"], "model_fields": fields}
    elif not hasattr(model, "encode_support") and fields:
        is_object = isinstance(model, PreTrainedModel)
        config = model.config if is_object else AutoConfig.from_pretrained(model, token=token)
        found["model_fields"] = None if config.model_type == DmgalConfig.model_type else fields
    return found | ({"dtype": about["dtype"]} if isinstance(model, (str, os.PathLike)) else {})


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def read_support(about: dict[str, Any], path: Path) -> tuple[DmgalSupport, torch.Tensor | None]:
    """
    The tensors that `about` describes, and the prototypes (N, E) by text where it has them. Raises `ValueError` if
    they are damaged, or those of another support set.
    """
    from ..data.kept_clips import file_digest

    try:
        support = DmgalSupport.load(path)
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, error) from error
    # The hash is younger than the format.
    same = "tensors" not in about or about["tensors"] == file_digest(path)
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
        raise _damaged(path, f"{name}: {problem}")

    if support.states.keys() != one.states.keys():
        refuse("states", f"{sorted(support.states)} in place of {sorted(one.states)}")
    empty = text_embeds is not None and not support.labels.numel()
    clips = max(1, support.labels.numel())
    pairs = {"features": (support.features, one.features, 1), "labels": (support.labels, one.labels, 1)}
    pairs |= {name: (state, one.states[name], -2) for name, state in support.states.items()}
    for name, (found, like, axis) in pairs.items():
        kinds = [(tensor.dtype, tensor.shape[:axis], tensor.shape[axis + 1 :]) for tensor in (found, like)]
        if kinds[0] != kinds[1] or (0 in found.shape and not empty) or found.shape[axis] % clips:
            shapes = [f"{tensor.dtype} of {list(tensor.shape)}" for tensor in (found, like)]
            refuse(name, f"{shapes[0]}, where the model gives {shapes[1]} a clip")
        if not found.isfinite().all():
            refuse(name, "NaN or infinity")
    if text_embeds is not None:
        like = (support.way, one.states["text.videos"].shape[-1]) if "text.videos" in one.states else None
        if tuple(text_embeds.shape) != like or not text_embeds.isfinite().all():
            refuse(TEXT_PROTOTYPES, f"{list(text_embeds.shape)} in place of {like}, or NaN or infinity")
    with_clips, classes = set(support.labels[0].tolist()), set(range(support.way))
    if not with_clips <= classes or (with_clips < classes and text_embeds is None):
        refuse("labels", f"not the numbers 0 to {support.way - 1}")


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
        raise _damaged(about, error) from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != SUPPORT_FORMAT:
        raise ValueError(
            f"{about} has format version {version!r}; this release of dmgal_hf reads {SUPPORT_FORMAT}. Update it with "
            "`pip install -U dmgal-hf`, or fit again."
        )
    fields = _YOUNGER_FIELDS | fields
    for name, kind in _ABOUT_FIELDS.items():
        if name not in fields:
            raise _damaged(about, f"no {name!r}")
        if not isinstance(fields[name], kind):
            raise _damaged(about, f"{name!r} is {fields[name]!r}")
    try:
        check_text_weight(fields["text_weight"])
    except ValueError as error:
        raise _damaged(about, error) from error
    labels, digests = fields["labels"], fields["clip_digests"]
    if len(labels) < 2 or len(set(map(str, labels))) < len(labels) or not all(isinstance(one, str) for one in labels):
        raise _damaged(about, "'labels' are no two names or more")
    if not all(isinstance(digest, str | None) for digest in digests):
        raise _damaged(about, "'clip_digests' are no texts")
    return fields, tensors


def _damaged(path: Path, problem: object) -> ValueError:
    return ValueError(f"{path} is damaged ({problem}): fit again from the clips, and save")


def support_card(repo_id: str, base_model: str | None, shots: Mapping[str, int], beside: bool = False) -> str:
    """
    Model card of a pushed support set. `base_model`: the model's id on the Hub, if it has one; `shots`: example clips
    a class; `beside`: whether the model is pushed with the set. Where it is in neither place, the call asks for it.
    """
    found = base_model or beside
    model = "" if found else ', model="FOLDER_OR_ID"'
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
    lines += [] if found else ["The model is not on the Hub: give the folder or id of the one it was made with.", ""]
    return "\n".join(lines)


def _escaped(label: str) -> str:
    """A label as the cell of a Markdown table that shows just its characters, on one line."""
    text = " ".join(label.encode("utf-8", "replace").decode().split())
    return re.sub(r"[^\w\s]", lambda mark: f"&#{ord(mark[0])};", text)
