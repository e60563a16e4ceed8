"""Model cards, written from what a run measured; and the cards of the releases that are planned."""

import json
import os
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data.splits import BENCHMARKS
from ..model.configuration_dmgal import DmgalConfig

PAPER = "arXiv 2411.11335"
# Arguments of a run that tell of the machine and not of the model: they stay there.
LOCAL_ARGUMENTS = (
    "output_dir", "videos", "splits", "class_labels", "prepared", "cache_dir", "num_workers", "resume", "report_to",
)  # fmt: skip


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
    "puppets": VideoSource("puppets, made by dmgal_hf", "puppets", "puppets"),
}
# What the releases that are intended start from.
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
    folder = checkpoint_folder(output_dir)
    adapter = read_mapping(folder / "adapter_config.json")
    config = read_mapping(folder / "config.json")
    arguments = read_mapping(folder / "config.yaml")
    metrics = read_mapping(folder / "metrics.json")
    is_adapter = adapter_only or bool(adapter)
    started_from = None if is_adapter else arguments.get("init_from")
    base_model = repository_name(started_from) or find_base_model(adapter, config, arguments)
    state = "untested"
    if not any(folder.glob("*.safetensors")):
        state = "untrained"
    elif "test" in metrics:
        state = "tested"
    return _model_card(
        name=repo_id or str(output_dir),
        # peft names the blocks as it finds them: in a DmgalModel, or in the backbone itself.
        adapted="model" if "backbone" in str(adapter.get("target_modules")) else "model.backbone",
        **_describe_model(config, is_adapter, adapter.get("num_frames"), arguments.get("text_loss_weight")),
        dataset=arguments.get("dataset"),
        base_model=base_model,
        started_from=_portable_name(started_from),
        head_only=arguments.get("head_only"),
        from_scratch=bool(arguments)
        and not is_adapter
        and arguments.get("backbone") is None
        and arguments.get("init_from") is None,
        state=state,
        metrics=metrics,
        arguments=_portable(arguments),
    )


def render_planned_card(paradigm: str, benchmark: str) -> ModelCard:
    """The card of an intended release, `dmgal-<paradigm>-<benchmark>`, before it is trained: it promises no number."""
    return _model_card(
        name=f"org/dmgal-{paradigm}-{benchmark}",
        adapted="model.backbone",
        **_describe_model({"paradigm": paradigm, **RELEASE_FIELDS[paradigm]}, paradigm == "adapter"),
        dataset=benchmark,
        base_model=RELEASE_BACKBONES[paradigm],
        started_from=None,
        head_only=False,
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


def _describe_model(
    config: dict[str, Any], is_adapter: bool, num_frames: int | None = None, text_loss_weight: float | None = None
) -> dict[str, Any]:
    """What the card says of the model, by its config.json; an adapter's repository has none."""
    adapters = {} if is_adapter else config.get("adapter_config")
    return {
        "paradigm": "adapter" if is_adapter else config.get("paradigm", "ft"),
        "is_adapter": is_adapter,
        "adapters": None if adapters is None else adapters.get("peft_type", "MGA"),
        "backbone_type": config.get("backbone_config", {}).get("model_type"),
        "parts": [name for field, name in PARTS.items() if config.get(field, True)],
        "matching": MATCHINGS[config.get("alignment", _DEFAULT["alignment"])],
        "text": _describe_text(config, text_loss_weight) if config.get("text_guidance") and not is_adapter else None,
        "num_frames": config.get("num_frames") or num_frames or _DEFAULT["num_frames"],
        "model_fields": "".join(
            f", {name}={json.dumps(config[name])}"
            for name in MODEL_FIELDS
            if config.get(name, _DEFAULT[name]) != _DEFAULT[name]
        ),
    }


def _describe_text(config: dict[str, Any], loss_weight: float | None) -> dict[str, Any]:
    """How names of classes take part as text."""
    name = config.get("text_model")
    own = "the text tower in this repository" if name is None else "a text tower in a local folder"
    return {
        "tower": f"the text tower of {name}" if repository_name(name) else own,
        "weight": config.get("text_weight", DmgalConfig.text_weight),
        "loss_weight": loss_weight,
        "templates": config.get("text_templates", list(DmgalConfig.text_templates)),
    }


def _model_card(name: str, dataset: str | None, metrics: dict[str, Any], **facts: Any) -> ModelCard:
    source = VIDEO_SOURCES.get(dataset)
    if source and facts["arguments"].get("preset") and source.kind in ("motion_shapes", "puppets"):
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
        **facts | {"arguments": yaml.safe_dump(facts["arguments"], sort_keys=False) if facts["arguments"] else None},
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
    return (Path(__file__).parents[3] / "model_cards" / "template.md").read_text(encoding="utf-8")


def _portable(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run without the paths and settings of the machine it ran on."""
    portable = {name: value for name, value in arguments.items() if name not in LOCAL_ARGUMENTS}
    return portable | {name: _portable_name(portable[name]) for name in ("backbone", "init_from") if name in portable}


def _portable_name(name: str | None) -> str | None:
    return name if not name or repository_name(name) else f"a local folder, {Path(name).name}"


def find_base_model(adapter: dict[str, Any], config: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """The repository that a checkpoint started from, where that is known."""
    names = (
        adapter.get("base_model_name_or_path"),
        arguments.get("backbone"),
        config.get("backbone_config", {}).get("_name_or_path"),
    )
    return next((name for name in map(repository_name, names) if name), None)


def repository_name(name: str | None) -> str | None:
    """`name` where it is that of a repository and not of a folder."""
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def read_mapping(path: Path) -> dict[str, Any]:
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


def checkpoint_folder(output_dir: str | os.PathLike) -> Path:
    folder = Path(output_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the output_dir of a training run")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(
            f"{folder} holds no checkpoint, neither config.json nor adapter_config.json: give the output_dir of a "
            "finished training run"
        )
    return folder
