"""Command lines of the scripts: dataclass fields from a YAML file, overridden by `--field value`."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import yaml
from transformers import CONFIG_MAPPING, HfArgumentParser
from transformers.hf_argparser import HfArg

from ..data.splits import BENCHMARKS
from ..model.configuration_mga import spelling_hint


class _Named:
    """Arguments that know which of them somebody chose, and which are at their defaults unasked."""

    named: ClassVar[frozenset[str]] = frozenset()  # by a command line or a config file; see parse_arguments

    @property
    def given(self) -> frozenset[str]:
        """Fields that were named, or that are not at their defaults."""
        return self.named | {name for name, default in vars(type(self)()).items() if getattr(self, name) != default}


@dataclass
class DataArguments(_Named):
    """Which videos, and how they are read."""

    dataset: str = HfArg(
        default="motion_shapes", help=f"motion_shapes, puppets, folder, or a benchmark: {', '.join(BENCHMARKS)}."
    )
    videos: str | None = HfArg(default=None, help="Folder of the videos, or one zip of it (benchmarks and folder).")
    splits: str | None = HfArg(default=None, help="Folder of the split lists; fetched when not given.")
    class_labels: list[str] | None = HfArg(
        default=None, help="Label files of Something-Something V2 (train.json validation.json), to name its classes."
    )
    prepared: str | None = HfArg(
        default=None, help="A folder of scripts/prepare_data.py, which replaces dataset, videos and splits."
    )
    allow_missing: bool = HfArg(default=False, help="Go on without the videos that are not there.")
    preset: str = HfArg(default="plain", help="Made-up videos: plain or textured; puppets: or crowd.")
    clips_per_class: int = HfArg(default=40, help="Made-up videos: clips a class.")
    cache_dir: str | None = HfArg(default=None, help="Made-up videos: where the clips are kept.")
    resize: int = HfArg(default=256, help="Short side of the frames, in pixels.")
    crop_size: int = HfArg(default=224, help="Side of the square that is cut out, in pixels.")
    image_mean: float | None = HfArg(
        default=None, help="Mean of all channels; by default that of the pretrained backbone, else 0.45."
    )
    image_std: float | None = HfArg(
        default=None, help="Their standard deviation; by default the backbone's, else 0.225."
    )
    num_workers: int = HfArg(default=2, help="Processes that read videos, a training process.")


@dataclass
class ModelArguments(_Named):
    """The model: fields of DmgalConfig, and where its weights come from."""

    init_from: str | None = HfArg(
        default=None,
        help="Folder or id of a DMGAL checkpoint, or of adapters alone, where training starts. What it says "
        "stands in for the fields of the model that are not given, and for resize and crop_size.",
    )
    backbone: str | None = HfArg(
        default=None, help="Model id or folder of a pretrained backbone, or of a DMGAL checkpoint that has one."
    )
    backbone_config: dict | str | None = HfArg(
        default=None, help="Config of a backbone that starts from random weights, as YAML or JSON."
    )
    paradigm: str = HfArg(default="ft", help="ft or adapter.")
    motion_attention: bool = HfArg(default=True, help="false switches S-MGA, mixer and C-MGA off, all three.")
    self_motion_attention: bool = HfArg(default=True, help="S-MGA.")
    mixer: bool = HfArg(default=True, help="The temporal and channel mixer.")
    cross_motion_attention: bool = HfArg(default=True, help="C-MGA.")
    motion_directions: str = HfArg(default="both", help="both, forward or backward.")
    motion_scales: list[str] = HfArg(default_factory=lambda: ["half", "full"], help="Motion scales.")
    motion_reduction: int = HfArg(default=8, help="Channel reduction of the motion features.")
    num_frames: int = HfArg(default=8, help="Frames a video.")
    alignment: str = HfArg(default="bi_mhm", help="bi_mhm, otam or mean.")
    frame_pooling: str = HfArg(default="mean", help="mean or cls.")
    adapter_config: dict | str | None = HfArg(
        default=None, help="Adapters of paradigm adapter, as YAML or JSON; see DmgalConfig."
    )
    text_guidance: bool = HfArg(
        default=False, help="Names of classes take part as text (CLIP, SigLIP, SigLIP2, MetaCLIP 2); see DmgalConfig."
    )

    def __post_init__(self):
        for name in ("backbone_config", "adapter_config"):
            if isinstance(getattr(self, name), str):
                try:
                    setattr(self, name, yaml.safe_load(getattr(self, name)))
                except yaml.YAMLError as error:
                    raise ValueError(f"{name}={getattr(self, name)!r} is no YAML or JSON ({error})") from error
        if self.backbone is not None and self.backbone_config is not None:
            raise ValueError("give backbone (pretrained) or backbone_config (random weights), not both")
        for name in ("backbone", "init_from"):
            path = getattr(self, name)
            if path is not None and Path(path).is_dir():
                setattr(self, name, os.path.abspath(path))  # relative, it could be taken for a repository later
        if isinstance(self.backbone_config, dict):
            _check_backbone_config(self.backbone_config)

    def config_fields(self) -> dict[str, Any]:
        """Fields for [`DmgalConfig`], without the backbone."""
        switches = ("self_motion_attention", "mixer", "cross_motion_attention")
        names = ("paradigm", "motion_directions", "motion_scales", "motion_reduction", "num_frames", "alignment",
                 "frame_pooling", "adapter_config", "text_guidance")  # fmt: skip
        return {
            **{name: getattr(self, name) and self.motion_attention for name in switches},
            **{name: getattr(self, name) for name in names},
        }


@dataclass
class TrainArguments:
    """Episodes, optimisation and output."""

    output_dir: str = HfArg(default="runs/dmgal", help="Folder for the checkpoint and its records.")
    seed: int = HfArg(default=0, help="Of everything that is drawn.")
    way: int = HfArg(default=5, help="Classes an episode.")
    shot: int = HfArg(default=1, help="Supports a class.")
    query: int = HfArg(default=3, help="Training queries a class.")
    num_episodes: int = HfArg(default=500, help="Training episodes.")
    episodes_per_step: int = HfArg(default=1, help="Episodes a step of the optimizer, over all processes.")
    episodes_per_forward: int = HfArg(default=1, help="Episodes a forward pass of a process.")
    optimizer: str = HfArg(default="adamw", help="adamw or sgd.")
    learning_rate: float = HfArg(default=1e-3, help="Highest learning rate.")
    backbone_learning_rate: float | None = HfArg(
        default=None, help="Paradigm ft: that of the backbone; by default the same."
    )
    weight_decay: float = HfArg(default=0.01, help="Weight decay.")
    momentum: float = HfArg(default=0.0, help="Momentum of sgd.")
    lr_scheduler: str = HfArg(default="cosine", help="A schedule of transformers.get_scheduler.")
    warmup_ratio: float = HfArg(default=0.1, help="Share of the steps that warm up.")
    max_grad_norm: float | None = HfArg(default=None, help="Clip gradients to this norm.")
    class_loss_weight: float = HfArg(
        default=0.0, help="Weight of an extra loss that names the base class of every clip."
    )
    text_loss_weight: float = HfArg(
        default=0.0,
        help="Weight of an extra loss that names the base class of every clip by text; above 0 it sets text_guidance.",
    )
    head_only: bool = HfArg(
        default=False, help="Paradigm ft: the backbone stays as it is, and what is on top of it trains."
    )
    augment: bool = HfArg(default=True, help="The method's colour jitter, gray and erasing of queries.")
    horizontal_flip: bool = HfArg(default=False, help="Mirror half of the queries.")
    torch_compile: bool = HfArg(default=False, help="Compile every kind of block once.")
    cuda_graphs: bool | None = HfArg(
        default=None,
        help="Replay training steps as CUDA graphs; by default on one GPU, not with fp16 or gradient_checkpointing.",
    )
    gradient_checkpointing: bool = HfArg(default=False, help="Trade time for memory.")
    validation: str = HfArg(
        default="split",
        help="split, or none: the last weights are the result, and of a folder that is divided here the "
        "classes of that split train, too.",
    )
    validate_every: int = HfArg(default=100, help="Training episodes between validations.")
    validation_episodes: int = HfArg(default=100, help="Episodes a validation.")
    validation_way: int | None = HfArg(
        default=None, help="Classes an episode of validation; by default as many as there are, up to way."
    )
    test_episodes: int = HfArg(default=200, help="Test episodes at the end; 0 leaves the test out.")
    test_way: int | None = HfArg(default=None, help="The same of the test.")
    test_query: int = HfArg(default=1, help="Queries a class in validation and test.")
    cpu_threads: int | None = HfArg(
        default=None, help="Threads of a process that trains on the CPU (accelerate launch gives it 1)."
    )
    mixed_precision: str = HfArg(default="no", help="no, fp16 or bf16.")
    max_bad_steps: int = HfArg(
        default=5, help="A step with a loss that is not finite is left out; so many in a row stop the run."
    )
    max_broken: float = HfArg(default=0.01, help="Share of unreadable training videos above which the run stops.")
    frame_memory: float = HfArg(
        default=0.25,
        help="Part of the memory in which the decoded clips of a run are kept, if they fit; 0 keeps none.",
    )
    checkpoint_every: int = HfArg(default=500, help="Training episodes between resumable states.")
    keep_checkpoints: int = HfArg(default=2, help="Resumable states that are kept.")
    resume: bool = HfArg(default=False, help="Go on from the newest whole state in output_dir.")
    report_to: str = HfArg(default="none", help="Tracker: tensorboard, wandb, trackio or none.")

    def __post_init__(self):
        positive = ("num_episodes", "episodes_per_step", "episodes_per_forward", "validate_every", "checkpoint_every",
                    "keep_checkpoints", "max_bad_steps", "validation_episodes")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("class_loss_weight", "text_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must lie in [0, inf), got {getattr(self, name)}.")
        if self.validation not in ("split", "none"):
            raise ValueError(f"validation must be split or none, got {self.validation!r}.")
        if self.test_episodes < 0:
            raise ValueError(f"test_episodes must be at least 0, got {self.test_episodes}.")
        if not 0 <= self.frame_memory <= 1:
            raise ValueError(f"frame_memory must be a part of the memory, 0 to 1, got {self.frame_memory}.")
        if self.lr_scheduler == "reduce_lr_on_plateau":
            raise ValueError("lr_scheduler reduce_lr_on_plateau needs a validation every step: choose another.")
        if self.num_episodes % self.episodes_per_step:
            raise ValueError(
                f"num_episodes must be a multiple of episodes_per_step={self.episodes_per_step}, "
                f"got {self.num_episodes}."
            )
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be adamw or sgd, got {self.optimizer!r}.")
        if self.report_to not in ("tensorboard", "wandb", "trackio", "none"):
            raise ValueError(f"report_to must be tensorboard, wandb, trackio or none, got {self.report_to!r}.")
        _check_precision(self.mixed_precision)


@dataclass
class EvaluateArguments:
    """What is evaluated."""

    model: str = HfArg(help="Folder or id of a checkpoint, or of an image backbone (a baseline).")
    split: str = HfArg(default="test", help="Split of the dataset: train, validation or test.")
    way: int = HfArg(default=5, help="Classes an episode.")
    shot: list[int] = HfArg(default_factory=lambda: [1], help="Supports a class; several are allowed.")
    query: int = HfArg(default=1, help="Queries a class.")
    num_episodes: int = HfArg(default=10_000, help="Episodes.")
    seed: int = HfArg(default=0, help="Of the episodes.")
    episodes: str | None = HfArg(
        default=None, help="Folder, file or id of an episode list, in place of the five fields above."
    )
    episodes_per_forward: int | None = HfArg(
        default=None, help="Episodes a forward pass of a process; by default as memory allows."
    )
    kept_clips: str | None = HfArg(
        default=None, help="Folder where encoded clips are kept for the next call; by default none is."
    )
    kept_clips_gb: float | None = HfArg(
        default=None, help="Memory for encoded clips in GB, beyond which files take over; by default half of the free."
    )
    mixed_precision: str = HfArg(default="no", help="no, fp16 or bf16.")
    json: str | None = HfArg(default=None, help="File for the results.")

    def __post_init__(self):
        if not self.shot:
            raise ValueError("shot is empty: give at least one number of supports a class.")
        for name in ("way", "query", "num_episodes", "episodes_per_forward"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.kept_clips_gb is not None and not self.kept_clips_gb >= 0:
            raise ValueError(f"kept_clips_gb must be 0 or more, got {self.kept_clips_gb}.")
        _check_precision(self.mixed_precision)


def _check_backbone_config(config: dict[str, Any]):
    """A mistyped key would go into the config of the backbone unread."""
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"backbone_config has model_type {config.get('model_type')!r}, which transformers does not know: give "
            "that of a vision model, for example resnet."
        )
    known = [*CONFIG_MAPPING[config["model_type"]]().to_dict(), *CONFIG_MAPPING[config["model_type"]].attribute_map]
    for name in config:
        if name not in known:
            raise ValueError(
                f"backbone_config has the unknown field {name!r} for {config['model_type']!r}. "
                f"{spelling_hint(name, sorted(known))}"
            )


def _check_precision(mixed_precision: str):
    if mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision must be no, fp16 or bf16, got {mixed_precision!r}.")


def parse_arguments(
    classes: tuple[type, ...], argv: list[str] | None = None, default_config: str | Path | None = None
) -> tuple[Any, ...]:
    """
    Reads one instance of each dataclass from `--config FILE.yaml` (a flat mapping of field names) and the options
    `--field value`, which win.

    Args:
        classes (`tuple[type, ...]`): dataclasses without a field name in common.
        argv (`list[str]`, *optional*): the command line without the program, by default that of the process.
        default_config (`str` or `Path`, *optional*): the file that is read where `--config` is not given.

    Raises:
        ValueError: an unknown field, with the nearest known one; or a file that holds no mapping.
        FileNotFoundError: there is no such file.
    """
    argv = _join_dashed(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.add_argument("--config", default=default_config, help="YAML file of fields; options override it.")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=default_config)
    config = finder.parse_known_args(argv)[0].config
    # Not the types of the fields themselves, which HfArgumentParser changes.
    hints = [get_type_hints(group) for group in classes]
    known = {one.name: types[one.name] for group, types in zip(classes, hints) for one in fields(group) if one.init}
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"
        elif type(None) in get_args(known.get(action.dest)):
            action.type = partial(_none_or, action.type)
            if bool in get_args(known[action.dest]):
                action.nargs, action.const = "?", True  # as every switch
    values = {} if config is None else _read_yaml(Path(config))
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{config} has the unknown field {name!r}. {spelling_hint(str(name), sorted(known))}")
        if not _fits(value, known[name]):
            kind = getattr(known[name], "__name__", known[name])
            raise ValueError(f"{config} has {name}={value!r}, which must be {kind}.")
    parser.set_defaults(**values)
    *instances, _, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        name = rest[0].lstrip("-").split("=")[0]
        raise ValueError(f"unknown option {rest[0]!r}. {spelling_hint(name, sorted([*known, 'config']))}")
    options = {word.split("=")[0] for word in argv}
    named = {action.dest for action in parser._actions if options.intersection(action.option_strings)}
    for instance in instances:
        if isinstance(instance, _Named):
            instance.named = frozenset(one.name for one in fields(instance)) & named.union(values)
    return tuple(instances)


def _join_dashed(argv: Sequence[str]) -> list[str]:
    """`--query -M8qt69nljE.mp4` as one word, which argparse does not take for an option; YouTube has such names."""
    joined: list[str] = []
    for word in argv:
        dashed = re.match("-[^-]", word) and word != "-h" and joined and re.fullmatch(r"--\w+", joined[-1])
        joined[-1:] = [f"{joined[-1]}={word}"] if dashed else [*joined[-1:], word]
    return joined


def _none_or(kind: Callable[[str], Any], text: str) -> Any:
    """`null` on the command line unsets what a config file has set."""
    return None if text == "null" else kind(text)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from YAML is of the type of its field; text is for argparse to convert."""
    kinds = [get_origin(one) or one for one in (get_args(kind) if isinstance(kind, UnionType) else (kind,))]
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (str, *kinds)) or (isinstance(value, int) and float in kinds)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}: give --config the path of a YAML file")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of field names to values, got {type(values).__name__}.")
    return values
