"""Checkpoints and datasets on the Hugging Face Hub: what is uploaded, and cards written from what was measured."""

import json
import os
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    DatasetCard,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import get_peft_model_state_dict
from safetensors.torch import save
from transformers.dynamic_module_utils import custom_object_save

from .configuration_dmgal import DmgalConfig
from .data.episodes import episodes_id
from .modeling_dmgal import DmgalModel
from .video_processing_dmgal import DmgalVideoProcessor

PAPER = "arXiv 2411.11335"
# Arguments of a run that tell of the machine and not of the model: they stay there.
LOCAL_ARGUMENTS = (
    "output_dir", "videos", "splits", "class_labels", "prepared", "cache_dir", "num_workers", "resume", "report_to",
)  # fmt: skip

# Which classes `trust_remote_code=True` loads without dmgal_hf, by the file that says so.
_CODE = {
    DmgalConfig: "configuration_dmgal.DmgalConfig",
    DmgalModel: "modeling_dmgal.DmgalModel",
    DmgalVideoProcessor: "video_processing_dmgal.DmgalVideoProcessor",
}
AUTO_MAPS = {
    "config.json": {"AutoConfig": _CODE[DmgalConfig], "AutoModel": _CODE[DmgalModel]},
    "preprocessor_config.json": {
        "AutoProcessor": _CODE[DmgalVideoProcessor],
        "AutoImageProcessor": _CODE[DmgalVideoProcessor],
    },
}


@dataclass(frozen=True)
class VideoSource:
    """How a card calls the videos: `name` for readers, `hub_id` in metadata, `kind` for what is known of them."""

    name: str
    hub_id: str
    kind: str


VIDEO_SOURCES = {
    "ssv2-full": VideoSource("Something-Something V2, OTAM split (SSv2-Full)", "something-something-v2", "ssv2"),
    "ssv2-small": VideoSource("Something-Something V2, CMN split (SSv2-Small)", "something-something-v2", "ssv2"),
    "kinetics-100": VideoSource("Kinetics-100, CMN split", "kinetics-100", "kinetics"),
    "hmdb51": VideoSource("HMDB51, ARN split", "hmdb51", "hmdb51"),
    "ucf101": VideoSource("UCF101, ARN split", "ucf101", "ucf101"),
    "motion_shapes": VideoSource("motion shapes, made by dmgal_hf", "motion-shapes", "motion_shapes"),
}
# Any other JSON file in the folder is somebody else's.
JSON_FILES = (
    "config.json", "preprocessor_config.json", "adapter_config.json", "metrics.json", "model.safetensors.index.json",
)  # fmt: skip
PUBLISHED_JSON = JSON_FILES[:4]  # the index of the weights stays as it is
# The releases that are intended, and what they start from.
BENCHMARKS = ("ssv2-full", "ssv2-small", "kinetics-100", "hmdb51", "ucf101")
RELEASE_BACKBONES = {"ft": "microsoft/resnet-50", "adapter": "openai/clip-vit-base-patch16"}
RELEASE_FIELDS = {"ft": {}, "adapter": {"frame_pooling": "cls"}}
# What an adapter's repository cannot hold and its user has to give, where it is not the default.
MODEL_FIELDS = ("num_frames", "frame_pooling", "alignment", "cosine_epsilon", "otam_smoothing")
PARTS = {
    "self_motion_attention": "self motion-guided attention (S-MGA)",
    "mixer": "a temporal and channel mixer",
    "cross_motion_attention": "cross motion-guided attention (C-MGA)",
}
MATCHINGS = {
    "bi_mhm": "the bidirectional mean Hausdorff metric (Bi-MHM)",
    "otam": "ordered temporal alignment (OTAM)",
    "mean": "the distance of mean frame descriptors",
}
_DEFAULT = {name: getattr(DmgalConfig, name) for name in MODEL_FIELDS}


# Model cards


def render_model_card(
    output_dir: str | os.PathLike, repo_id: str | None = None, adapter_only: bool = False
) -> ModelCard:
    """
    Writes the card of a checkpoint from what a training run left in its folder: the arguments in `config.yaml`, the
    results in `metrics.json`, and `config.json` or, of an adapter, `adapter_config.json`. What is not there is not on
    the card: no number that was not measured, no training that did not happen.

    Args:
        output_dir (`str` or `os.PathLike`): folder of the run, or of any checkpoint.
        repo_id (`str`, *optional*): where the checkpoint is going to be; by default the card speaks of the folder.
        adapter_only (`bool`, *optional*, defaults to `False`): the card of the adapters alone, see [`collect_files`].

    Returns:
        `huggingface_hub.ModelCard`: `str()` of it is the README, `.data` its metadata, `.validate()` asks the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it says what model it holds.
        ValueError: a file is not readable as JSON or YAML.
    """
    folder = _checkpoint_folder(output_dir)
    adapter = _read(folder / "adapter_config.json")
    config = _read(folder / "config.json")
    arguments = _read(folder / "config.yaml")
    metrics = _read(folder / "metrics.json")
    base_model = _base_model(adapter, config, arguments)
    is_adapter = adapter_only or bool(adapter)
    state = "untested"
    if not any(folder.glob("*.safetensors")):
        state = "untrained"
    elif "test" in metrics:
        state = "tested"
    return _model_card(
        name=repo_id or str(output_dir),
        # peft names the blocks as it finds them: in a DmgalModel, or in the backbone itself.
        adapted="model" if "backbone" in str(adapter.get("target_modules")) else "model.backbone",
        **_describe_model(config, is_adapter, adapter.get("num_frames")),
        dataset=arguments.get("dataset"),
        base_model=base_model,
        from_scratch=bool(arguments) and not is_adapter and arguments.get("backbone") is None,
        state=state,
        metrics=metrics,
        arguments=_portable(arguments, base_model),
    )


def render_planned_card(paradigm: str, benchmark: str) -> ModelCard:
    """
    The card of an intended release, `dmgal-<paradigm>-<benchmark>`, before it is trained: it promises no number.

    Args:
        paradigm (`str`): "ft" or "adapter".
        benchmark (`str`): one of [`BENCHMARKS`].
    """
    return _model_card(
        name=f"org/dmgal-{paradigm}-{benchmark}",
        adapted="model.backbone",
        **_describe_model({"paradigm": paradigm, **RELEASE_FIELDS[paradigm]}, paradigm == "adapter"),
        dataset=benchmark,
        base_model=RELEASE_BACKBONES[paradigm],
        from_scratch=False,
        state="untrained",
        metrics={},
        arguments={},
    )


def write_planned_cards(folder: str | os.PathLike):
    """Writes the cards of all intended releases into `folder`, as `model_cards/` holds them."""
    for paradigm in RELEASE_BACKBONES:
        for benchmark in BENCHMARKS:
            render_planned_card(paradigm, benchmark).save(Path(folder) / f"dmgal-{paradigm}-{benchmark}.md")


def _describe_model(config: dict[str, Any], is_adapter: bool, num_frames: int | None = None) -> dict[str, Any]:
    """What the card says of the model, by its config.json; an adapter's repository has none."""
    adapters = {} if is_adapter else config.get("adapter_config")
    return {
        "paradigm": "adapter" if is_adapter else config.get("paradigm", "ft"),
        "is_adapter": is_adapter,
        "adapters": None if adapters is None else adapters.get("peft_type", "MGA"),
        "backbone_type": config.get("backbone_config", {}).get("model_type"),
        "parts": [name for field, name in PARTS.items() if config.get(field, True)],
        "matching": MATCHINGS[config.get("alignment", _DEFAULT["alignment"])],
        "num_frames": config.get("num_frames") or num_frames or _DEFAULT["num_frames"],
        "model_fields": {
            name: config[name] for name in MODEL_FIELDS if config.get(name, _DEFAULT[name]) != _DEFAULT[name]
        },
    }


def _model_card(name: str, dataset: str | None, metrics: dict[str, Any], **facts: Any) -> ModelCard:
    source = VIDEO_SOURCES.get(dataset)
    if source and facts["arguments"].get("preset") and source.kind == "motion_shapes":
        source = replace(source, name=f"{source.name}, preset {facts['arguments']['preset']}")
    title = name.rstrip("/").split("/")[-1]
    results = [_eval_result(metrics["test"], dataset, source)] if facts["state"] == "tested" else None
    data = ModelCardData(
        # Weights that no run of ours has made, such as converted ones, come under terms of their own.
        license="apache-2.0" if facts["arguments"] or facts["state"] == "untrained" else None,
        library_name="peft" if facts["is_adapter"] else "transformers",
        pipeline_tag="video-classification",
        tags=["dmgal", "few-shot-learning", "action-recognition", "motion-guided-attention", "arxiv:2411.11335"],
        base_model=facts["base_model"],
        base_model_relation=("adapter" if facts["is_adapter"] else "finetune") if facts["base_model"] else None,
        datasets=[source.hub_id] if source else None,
        metrics=["accuracy"] if results else None,
        model_name=title if results else None,
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_str=_template(),
        title=title,
        repo_id=name,
        paper=PAPER,
        source=source,
        has_license=data.license is not None,
        test=metrics.get("test"),
        validation=metrics.get("validation"),
        training=metrics.get("training"),
        **facts
        | {
            "arguments": yaml.safe_dump(facts["arguments"], sort_keys=False) if facts["arguments"] else None,
            "model_fields": "".join(
                f", {field}={json.dumps(value)}" for field, value in facts["model_fields"].items()
            ),
        },
    )


def _eval_result(test: dict[str, Any], dataset: str | None, source: VideoSource | None) -> EvalResult:
    conditions = ("way", "shot", "query", "num_episodes", "episodes_id")
    interval = test["confidence_interval"]
    return EvalResult(
        task_type="video-classification",
        task_name="Few-shot action recognition",
        dataset_type=source.hub_id if source else "videos",
        dataset_name=source.name if source else str(dataset or "videos"),
        # The Hub merges results that agree in type, config, split and revision: way and shot must keep them apart.
        dataset_config=f"{test['way']}-way {test['shot']}-shot",
        dataset_split="test",
        dataset_args={name: test[name] for name in conditions},
        metric_type="accuracy",
        metric_name="Accuracy in percent, mean over the episodes",
        metric_value=round(test["accuracy"], 2),
        # One episode alone has no interval.
        metric_args={"confidence_interval_95": round(interval, 2)} if interval is not None else None,
    )


def _template() -> str:
    packaged = resources.files(__package__) / "model_card_template.md"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    # In a checkout it lies beside the cards; building a wheel copies it into the package.
    return (Path(__file__).parents[2] / "model_cards" / "template.md").read_text(encoding="utf-8")


def _portable(arguments: dict[str, Any], base_model: str | None) -> dict[str, Any]:
    """The arguments of a run without the paths and settings of the machine it ran on."""
    portable = {name: value for name, value in arguments.items() if name not in LOCAL_ARGUMENTS}
    if portable.get("backbone") and base_model is None:
        portable["backbone"] = f"a local folder, {Path(portable['backbone']).name}"
    return portable


def _base_model(adapter: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """The repository that a checkpoint started from, where that is known."""
    names = (
        adapter.get("base_model_name_or_path"),
        arguments.get("backbone"),
        config.get("backbone_config", {}).get("_name_or_path"),
    )
    return next((hub_name for hub_name in map(_hub_name, names) if hub_name), None)


def _hub_name(name: str | None) -> str | None:
    """`name` where it is that of a repository and not of a folder."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove it to go on without") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def _checkpoint_folder(output_dir: str | os.PathLike) -> Path:
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the output_dir of a training run")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint, neither config.json nor adapter_config.json: give the output_dir of a "
            "finished training run"
        )
    return folder


# Checkpoints


def collect_files(
    output_dir: str | os.PathLike, repo_id: str | None = None, adapter_only: bool = False
) -> dict[str, Path | bytes]:
    """
    What a checkpoint's repository is made of: the folder's own safetensors and JSON files, the source that
    `trust_remote_code` needs, and the card. Everything else stays where it is: resumable states, logs, pickles,
    `config.yaml` (its content is on the card), whatever else was put into the folder.

    Args:
        output_dir (`str` or `os.PathLike`): folder of a training run, or of any checkpoint of [`DmgalModel`] or of an
            adapter.
        repo_id (`str`, *optional*): where it goes, for the card.
        adapter_only (`bool`, *optional*, defaults to `False`): of a checkpoint with adapters inside, only these, as
            peft saves adapters of the bare backbone; `PeftModel.from_pretrained(backbone, repo_id)` reads them.

    Returns:
        `dict[str, Path | bytes]`: name in the repository -> file, or content where it differs from the folder's.

    Raises:
        FileNotFoundError: there is no such folder, no checkpoint in it, or no safetensors file.
        ValueError: a file is damaged, or the checkpoint is of another kind or of a newer format than this release;
            with `adapter_only`, it has no adapters inside, or its backbone is not known by the name of a repository.
    """
    folder = _checkpoint_folder(output_dir)
    files: dict[str, Path | bytes] = {
        path.name: path
        for pattern in ("*.safetensors", *JSON_FILES)
        for path in sorted(folder.glob(pattern))
        if not path.name.startswith(".")
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise FileNotFoundError(
            f"{folder} holds no weights (*.safetensors): let the training finish, or save the model there by "
            "save_pretrained"
        )
    if "config.json" in files:
        _check_config(folder)
    has_source = "config.json" in files and not adapter_only
    files |= {name: _public_json(files[name], has_source) for name in PUBLISHED_JSON if name in files}
    if has_source:
        files |= _source_files()
    elif "config.json" in files:
        kept = ("preprocessor_config.json", "metrics.json")
        files = _extract_adapters(folder) | {name: files[name] for name in kept if name in files}
    files["README.md"] = str(render_model_card(folder, repo_id, adapter_only)).encode()
    return files


def push_to_hub(
    output_dir: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    adapter_only: bool = False,
) -> CommitInfo | None:
    """
    Uploads a checkpoint in one commit; see [`collect_files`] for what goes up. The repository and the branch are
    created where they do not exist.

    Args:
        output_dir (`str` or `os.PathLike`): folder of a finished training run.
        repo_id (`str`): "name" or "organisation/name".
        private (`bool`, *optional*, defaults to `False`): whether only you can see the repository.
        revision (`str`, *optional*): branch to push to, by default "main".
        dry_run (`bool`, *optional*, defaults to `False`): print the list of files and the card, and upload nothing.
        token (`str`, *optional*): by default that of `hf auth login` or `HF_TOKEN`.
        adapter_only (`bool`, *optional*, defaults to `False`): of a checkpoint with adapters inside, only these.

    Returns:
        `huggingface_hub.CommitInfo`, or `None` after a dry run.

    Raises:
        FileNotFoundError, ValueError: as [`collect_files`]; and `ValueError` where `private` is asked for a repository
            that is public, or the Hub refuses the card.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses the token, the name or the upload.
    """
    files = collect_files(output_dir, repo_id, adapter_only)
    if dry_run:
        print(_describe(files))
        return None
    api = HfApi(token=token, library_name="dmgal_hf")
    repo_id = _create_repo(api, repo_id, "model", private)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    return api.create_commit(repo_id, operations, commit_message="Upload DMGAL checkpoint", revision=revision)


def _create_repo(api: HfApi, repo_id: str, repo_type: str, private: bool) -> str:
    """Its full name; one that is there already stays as it is."""
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(f"{repo_id} exists and is public: make it private in its settings, or push without private")
    return repo_id


def _check_config(folder: Path):
    model_type = _read(folder / "config.json").get("model_type")
    if model_type != DmgalConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {model_type!r}, not {DmgalConfig.model_type!r}")
    DmgalConfig.from_pretrained(folder)


def _source_files() -> dict[str, bytes]:
    """The modules of this package that the classes of a checkpoint need, by transformers' own search."""
    with TemporaryDirectory() as folder:
        paths = [path for code in _CODE for path in custom_object_save(code, folder)]
        return {path.name: path.read_bytes() for path in sorted(set(paths))}


def _public_json(path: Path, has_source: bool) -> bytes:
    """A JSON file without paths of this machine, and with a map to the source where that lies beside it."""
    content = _read(path)
    content.pop("auto_map", None)
    if has_source and path.name in AUTO_MAPS:
        content["auto_map"] = AUTO_MAPS[path.name]
    backbone = content.get("backbone_config", {})
    if "_name_or_path" in backbone:
        backbone["_name_or_path"] = _hub_name(backbone["_name_or_path"]) or ""
    if "base_model_name_or_path" in content:
        content["base_model_name_or_path"] = _hub_name(content["base_model_name_or_path"])
    training = content.get("training", {})
    if "broken_videos" in training:  # others need to know which, not where
        training["broken_videos"] = [Path(name).name for name in training["broken_videos"]]
    return _as_json(content)


def _extract_adapters(folder: Path) -> dict[str, bytes]:
    """The adapters inside a checkpoint of [`DmgalModel`], as peft's save_pretrained writes those of its backbone."""
    config, arguments = _read(folder / "config.json"), _read(folder / "config.yaml")
    if config.get("adapter_config") is None:
        raise ValueError(
            f"{folder} has no adapters inside (paradigm {config.get('paradigm')!r}, no adapter_config): push it "
            "without adapter_only"
        )
    base_model = _base_model({}, config, arguments)
    if base_model is None:
        raise ValueError(
            f"the backbone of {folder} ({arguments.get('backbone')!r}) is not named after a repository, and nobody "
            "could load adapters without it: push the whole checkpoint, without adapter_only"
        )
    backbone = DmgalModel.from_pretrained(folder).backbone
    adapter_config = backbone.peft_config["default"]
    adapter_config.base_model_name_or_path, adapter_config.inference_mode = base_model, True
    weights = {f"base_model.model.{name}": weight for name, weight in get_peft_model_state_dict(backbone).items()}
    with TemporaryDirectory() as saved:
        adapter_config.save_pretrained(saved)
        content = (Path(saved) / "adapter_config.json").read_bytes()
    return {"adapter_model.safetensors": save(weights, metadata={"format": "pt"}), "adapter_config.json": content}


def _as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _describe(files: dict[str, Path | bytes]) -> str:
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    lines = [f"{size:>14,}  {name}" for name, size in sizes.items()]
    lines.append(f"{sum(sizes.values()):>14,}  bytes in {len(files)} files")
    return "\n".join(lines) + "\n\n" + files["README.md"].decode()


# Datasets

_EPISODES_TEXT = """
# Episodes for few-shot evaluation

{number:,} episodes with the id `{id}`: two evaluations with the same id were made on the same rows. Each row names
videos by their row number in the dataset it was drawn for: `support` and `query`, with the classes of the episode in
`support_labels` and `query_labels`. The list holds no videos.

{videos}

```python
from dmgal_hf.data import load_episodes

episodes = load_episodes("{repo_id}", labels=videos["label"], split="{split}")
```

What it was drawn from:

```json
{origin}
```
"""

_MOTION_SHAPES_TEXT = """
# Motion shapes

Short clips (two seconds, 112 x 112 pixels) of one shape on a background, whose classes differ by motion alone: a
single frame says nothing about the class. Splits have disjoint classes, for few-shot learning: base classes in
`train`, novel ones in `test`. Made by dmgal_hf, {origin}; nobody was filmed.

{splits}

Columns: `video` (an H.264 file), `label`, `video_id`. Loaded with `datasets.load_dataset("{repo_id}")`.

Limits: synthetic and simple. What is learned here need not help with real videos, and an accuracy reached here is not
to be compared with one on any other dataset.
"""


def push_episodes(
    episodes: Dataset,
    repo_id: str,
    videos: str,
    split: str = "test",
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Uploads an episode list with a dataset card, for others to evaluate on the very same episodes;
    [`load_episodes`](data.load_episodes) reads it back.

    Args:
        episodes (`datasets.Dataset`): as [`sample_episodes`] makes it.
        repo_id (`str`): "name" or "organisation/name".
        videos (`str`): one sentence on the videos whose rows are meant, for the card.
        split (`str`, *optional*, defaults to "test"): name of the split.
        private, revision, token: as [`push_to_hub`].

    Returns:
        `huggingface_hub.CommitInfo`: of the commit that completes the card.

    Raises:
        ValueError: the dataset is no episode list.
    """
    identifier = episodes_id(episodes)
    repo_id = _create_repo(HfApi(token=token), repo_id, "dataset", private)
    text = _EPISODES_TEXT.format(
        number=len(episodes), id=identifier, videos=videos, repo_id=repo_id, split=split,
        origin=episodes.info.description or "not recorded",
    )  # fmt: skip
    episodes.push_to_hub(repo_id, split=split, private=private, revision=revision, token=token)
    return _push_dataset_card(repo_id, text, ["few-shot-learning", "episodes"], revision, token)


def push_motion_shapes(
    shapes: DatasetDict, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads motion shapes, videos included, with a dataset card.

    Args:
        shapes (`datasets.DatasetDict`): from [`load_motion_shapes`].
        repo_id, private, revision, token: as [`push_to_hub`].

    Returns:
        `huggingface_hub.CommitInfo`: of the commit that completes the card.
    """
    repo_id = _create_repo(HfApi(token=token), repo_id, "dataset", private)
    shapes.push_to_hub(repo_id, private=private, revision=revision, token=token)
    made = re.search(r"/(\w+)-seed(\d+)-v(\d+)/", shapes["train"][0]["video"]["path"] or "")
    origin = "preset {}, seed {}, generator version {}".format(*made.groups()) if made else "settings not recorded"
    splits = "\n".join(
        f"- `{name}`: {len(set(videos['label']))} classes, {len(videos)} clips" for name, videos in shapes.items()
    )
    text = _MOTION_SHAPES_TEXT.format(origin=origin, splits=splits, repo_id=repo_id)
    return _push_dataset_card(repo_id, text, ["few-shot-learning", "action-recognition", "synthetic"], revision, token)


def _push_dataset_card(
    repo_id: str, text: str, tags: list[str], revision: str | None, token: str | None
) -> CommitInfo:
    """Completes the card that `datasets` has written, which lists features and files only."""
    path = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, token=token)
    card = DatasetCard.load(path)
    card.data.license = "apache-2.0"
    card.data.tags = ["dmgal", *tags]
    card.data.task_categories = ["video-classification"]
    card.text = text
    return HfApi(token=token).upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset",
        revision=revision, commit_message="Describe the dataset",
    )  # fmt: skip
