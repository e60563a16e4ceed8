"""Episodic training of DMGAL with Accelerate: what scripts/train.py runs."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from datasets import DatasetDict
from huggingface_hub import constants
from transformers import AutoModel, AutoProcessor

from ..data import EpisodeSource
from ..data.preparation import prepared_source
from ..data.written_aside import replace_file
from .arguments import DataArguments, ModelArguments, TrainArguments
from .checkpoints import StopSignal, keep_others_out, list_checkpoints
from .evaluation import format_accuracy
from .loading import load_videos, num_classes
from .starting import settle_arguments
from .training_run import TrainingRun, build_accelerator

logger = get_logger(__name__)


def train(data: DataArguments, model: ModelArguments, arguments: TrainArguments) -> dict[str, Any]:
    """
    Trains on the base classes, keeps the model that is best on the validation classes, and tests it on novel ones. A
    split of one class, of which no episode can be drawn, is left out and said so; without validation the last weights
    are the result. Validation and test are of clips alone, also where names of classes take part as text.

    The run is a pure function of its arguments: every episode, every augmentation and every dropout mask is drawn
    from the seed and the number of the episode, whatever the number of processes and workers, and whether the run was
    interrupted or not.

    Writes into `output_dir`: the model and its processor, `config.yaml`, `metrics.json`, a model card, `checkpoints/`.

    Returns:
        `dict`: what metrics.json holds.

    Raises:
        ValueError: arguments that do not fit each other, the data or the number of processes.
        RuntimeError: too many steps in a row without a finite loss, or too many unreadable videos.
        OSError: there is no room for a state or a model: the folder, what it needs and what is free are named.
        SystemExit: SIGTERM (143), Ctrl-C (130) or, as if by SIGTERM, the end of the launcher; after a resumable state
            was written.
    """
    with StopSignal() as stop, stop.at_once():
        return _train(data, model, arguments, stop)


def _train(data: DataArguments, model: ModelArguments, arguments: TrainArguments, stop: StopSignal) -> dict[str, Any]:
    if arguments.cpu_threads is not None:
        torch.set_num_threads(arguments.cpu_threads)
    accelerator = build_accelerator(arguments)
    output_dir = Path(arguments.output_dir)
    if list_checkpoints(output_dir) and not arguments.resume:
        raise ValueError(
            f"{output_dir} holds the states of an earlier run: go on with --resume, give another output_dir, or "
            "remove that folder."
        )
    with accelerator.local_main_process_first():
        data, model = settle_arguments(data, model, arguments)
        videos, notes = load_splits(data, arguments)
    if model.init_from is not None:
        notes.append(
            f"Starts from {model.init_from}: paradigm {model.paradigm}, {model.num_frames} frames a video, "
            f"frame_pooling {model.frame_pooling}, alignment {model.alignment}."
        )
    for note in notes:
        accelerator.print(note)
    fields = run_fields(data, model, arguments)
    with keep_others_out(output_dir, accelerator), folder_for_frames(output_dir, accelerator) as frames:
        run = TrainingRun(accelerator, data, model, arguments, videos, fields, frames)
        if accelerator.is_main_process:
            replace_file(output_dir / "config.yaml", yaml.safe_dump(fields, sort_keys=False))
        accelerator.init_trackers("dmgal", {name: str(value) for name, value in fields.items()})
        with stop.held():
            run.train(stop)
        metrics = run.finish()
    for tracker in accelerator.trackers:
        tracker.finish()
    # Before the process group: a DistributedDataParallel that outlives it waits for gloo's thread, which waits for the
    # interpreter (torch 2.13). The group itself stays, for another run in this process.
    del run
    accelerator.free_memory()
    return metrics


def load_splits(data: DataArguments, arguments: TrainArguments) -> tuple[DatasetDict, list[str]]:
    """
    The splits that take part in a run, and a sentence for each that cannot: an episode needs two classes.

    Raises:
        ValueError: a split that was not left out is missing.
    """
    validates, notes = arguments.validation == "split", []
    videos = load_videos(data, validates)
    for split in ("train", *["validation"] * validates, *["test"] * (arguments.test_episodes > 0)):
        if split not in videos:
            raise ValueError(
                f"the dataset has no split {split!r}, only {', '.join(videos)}: add it, or do without (validation "
                "none, test_episodes 0)."
            )
    if validates and num_classes(videos["validation"]) < 2:
        videos, validates = load_videos(data, validation=False), False
        notes.append(
            "The validation split has one class, too few for an episode: as with validation none, the last weights "
            f"are the result, and {num_classes(videos['train'])} classes train."
        )
    if not validates:
        videos.pop("validation", None)
    if "test" in videos and num_classes(videos["test"]) < 2:
        del videos["test"]
        if arguments.test_episodes:
            notes.append("The test split has one class, too few for an episode: the model is not tested.")
    return videos, notes


@contextmanager
def folder_for_frames(output_dir: Path, accelerator: Accelerator) -> Iterator[Path]:
    """Where the decoded frames of a run may lie: beside the other caches, gone at its end, or when it is resumed."""
    digest = hashlib.sha256(str(output_dir.absolute()).encode()).hexdigest()[:16]
    folder = Path(constants.HF_HOME, "dmgal_hf", "frames", digest)
    if accelerator.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        yield folder
    finally:
        if accelerator.is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def run_fields(data: DataArguments, model: ModelArguments, arguments: TrainArguments) -> dict[str, Any]:
    """All arguments of a run in one mapping, as config.yaml has them; the dataset is what a prepared folder is of."""
    fields = {**asdict(data), **asdict(model), **asdict(arguments)}
    return fields | (prepared_source(data.prepared) if data.prepared is not None else {})


def describe_result(data: DataArguments, model: ModelArguments, arguments: TrainArguments):
    """Shows what a finished run left behind: loads it through the Auto classes and lets it name one novel clip."""
    if not PartialState().is_main_process:
        return
    output_dir = Path(arguments.output_dir)
    metrics = json.loads((output_dir / "metrics.json").read_text())
    network, processor = AutoModel.from_pretrained(output_dir), AutoProcessor.from_pretrained(output_dir)
    print(f"saved in {output_dir}, loaded again as {type(network).__name__} and {type(processor).__name__}")
    videos = load_videos(replace(data, resize=min(processor.size.values()))).get("test")
    if videos is not None and (way := min(arguments.test_way or arguments.way, num_classes(videos))) > 1:
        names = videos.features["label"].names
        episode = EpisodeSource(videos["label"], way, arguments.shot, 1, arguments.seed)[0]
        support: dict[str, list[dict[str, Any]]] = {}
        for row in episode["support"]:
            support.setdefault(names[videos[row]["label"]], []).append(videos[row]["video"])
        clip = videos[episode["query"][0]]
        inputs = processor(support=support, query=[clip["video"]])
        with torch.no_grad():
            logits = network(**inputs).logits[0, 0]
        answer = list(support)[logits.argmax()]
        print(f"{clip['video']['path']} shows {names[clip['label']]!r}; the model says {answer!r}")
    if "test" in metrics:
        test = metrics["test"]
        print(
            f"novel classes, {test['way']}-way {test['shot']}-shot: {format_accuracy(test, 1)} over "
            f"{test['num_episodes']} episodes"
        )
