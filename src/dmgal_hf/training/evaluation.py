"""Few-shot evaluation: accuracy over a list of episodes, sharded over processes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..data import KeptClips, check_episodes, encode_clips, episodes_id, load_episodes, sample_episodes
from ..data.episodes import EPISODE_FEATURES, rows_of, sizes_of
from ..data.frame_memory import FrameMemory
from ..data.kept_clips import fingerprint_of_clips
from ..data.written_aside import replace_file
from ..model.configuration_dmgal import DmgalConfig
from ..model.modeling_dmgal import DmgalModel
from ..model.video_processing_dmgal import DmgalVideoProcessor
from .acceleration import hold_frozen_backbone, keep_freed_memory
from .arguments import DataArguments, EvaluateArguments
from .loading import load_videos

# Of the clips of a forward pass over episodes; what a CPU has gathered is then still in its cache.
BYTES_TOGETHER = {"cpu": 16 * 10**6, "gpu": 64 * 10**6}

PROCESSOR_FIELDS = ("resize", "crop_size", "image_mean", "image_std")  # of DataArguments, for training alone


def evaluate_episodes(
    model: DmgalModel,
    processor: DmgalVideoProcessor,
    videos: Dataset,
    episodes: Dataset,
    accelerator: Accelerator,
    num_workers: int = 0,
    episodes_per_forward: int | None = None,
    description: str = "Evaluating",
    memory: FrameMemory | None = None,
    kept_clips_gb: float | None = None,
    kept: KeptClips | None = None,
) -> dict[str, Any]:
    """
    Scores every query of every episode once. Each clip that the list names is encoded once; the episodes are then run
    on what is kept of the clips, shared out among the processes.

    Args:
        model ([`DmgalModel`]): on the accelerator's device; it is put into eval mode.
        processor ([`DmgalVideoProcessor`]): of the model.
        videos (`datasets.Dataset`): columns `video` and `label` (`ClassLabel`).
        episodes (`datasets.Dataset`): an episode list over the rows of `videos`.
        accelerator (`Accelerator`): of the run.
        episodes_per_forward (`int`, *optional*):
            Episodes a forward pass of a process, by default as many of one size as 64 MB of clips hold, on a CPU
            16 MB. The result does not depend on it.
        description (`str`): of the progress bars.
        memory ([`FrameMemory`], *optional*): of `videos`, for lists that are evaluated again and again.
        num_workers, kept_clips_gb: as in [`encode_clips`].
        kept ([`KeptClips`], *optional*): the clips, encoded before.

    Returns:
        `dict`, the same on every process: see [`summarize`].

    Raises:
        ValueError: several episodes a forward pass are asked for, and they are not of one size; or the list does not
            fit the videos; or the kept clips are not of this model, processor and these videos.
        VideoDecodeError: a video of an episode cannot be read.
    """
    labels = np.asarray(videos["label"])
    check_episodes(episodes, labels)
    sizes = sizes_of(episodes)
    kinds, kind_of = np.unique(sizes, axis=0, return_inverse=True)
    if len(kinds) > 1 and (episodes_per_forward or 1) > 1:
        shown = ", ".join(str(tuple(kind)) for kind in kinds[:3].tolist())
        raise ValueError(
            f"the episodes are not of one size but have (classes, supports, queries) of {shown}: set "
            "episodes_per_forward=1."
        )
    network = accelerator.unwrap_model(model).eval()
    rows = torch.from_numpy(rows_of(episodes))
    if kept is None:
        kept = encode_clips(
            network, processor, videos, rows, num_workers, accelerator, kept_clips_gb, identify=False,
            description=description, memory=memory,
        )  # fmt: skip
    else:
        kept.check(fingerprint_of_clips(network, processor, accelerator), videos, rows)
    batches = []
    for kind, (way, num_support, num_query) in enumerate(kinds.tolist()):
        numbers = np.flatnonzero(kind_of == kind)
        together = episodes_per_forward or _fitting(kept, num_support, num_query, accelerator.device)
        batches += [(way, part) for part in np.array_split(numbers, -(-len(numbers) // together))]
    tally = _Tally(len(episodes), labels, len(videos.features["label"].names), accelerator.device)
    bar = tqdm(total=len(episodes), desc=f"{description}: episodes", unit="episode", leave=False,
               disable=not accelerator.is_main_process)  # fmt: skip
    first, step = accelerator.process_index, accelerator.num_processes
    with bar, torch.no_grad(), accelerator.autocast():
        # As many for every process, as with FSDP they wait for each other: one that is handed out twice counts once.
        for place in range(first, first + -(-len(batches) // step) * step, step):
            way, numbers = batches[place % len(batches)]
            columns = episodes[numbers]
            batch = {name: torch.tensor(columns[name]) for name in EPISODE_FEATURES}  # (B, S) or (B, Q)
            logits = _score(network, kept, batch, way, accelerator.device)
            if place < len(batches):
                tally.add(numbers, batch, logits)
            bar.update(min(step * len(numbers), bar.total - bar.n))
    correct, confusion = accelerator.reduce((tally.correct, tally.confusion), "sum")
    names = videos.features["label"].names
    return summarize(correct.cpu().numpy(), sizes[:, 2], confusion.cpu().numpy(), names, episodes)


class _Tally:
    """
    What is counted of a list of episodes, on the device: right answers of each, and answers by class of the dataset.
    """

    def __init__(self, num_episodes: int, labels: np.ndarray, num_classes: int, device: torch.device):
        self.labels = torch.from_numpy(labels).to(device)
        self.correct = torch.zeros(num_episodes, dtype=torch.int32, device=device)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, numbers: np.ndarray, batch: dict[str, torch.Tensor], logits: torch.Tensor):
        """`logits` (B, Q, N) of the episodes with these numbers."""
        device = self.labels.device
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        # Classes of the episode -> classes of the dataset.
        true, of_support = self.labels[batch["query"]], self.labels[batch["support"]]
        classes = torch.zeros_like(of_support[:, : logits.shape[-1]])
        classes.scatter_(1, batch["support_labels"], of_support)
        predicted = classes.gather(1, logits.argmax(-1))
        self.correct[torch.from_numpy(numbers).to(device)] = (predicted == true).sum(1, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int64, device=device)
        self.confusion.index_put_((true, predicted), one, accumulate=True)


def _fitting(kept: KeptClips, num_support: int, num_query: int, device: torch.device) -> int:
    """Episodes whose clips, gathered for a forward pass, take BYTES_TOGETHER, but one at least."""
    an_episode = num_support * kept.bytes_of("support") + num_query * kept.bytes_of("query")
    return max(1, BYTES_TOGETHER["cpu" if device.type == "cpu" else "gpu"] // an_episode)


def _score(
    network: nn.Module, kept: KeptClips, batch: dict[str, torch.Tensor], way: int, device: torch.device
) -> torch.Tensor:
    """Logits (B, Q, N) of B episodes of one size."""
    clips = [
        {name: tensor.to(device, non_blocking=True) for name, tensor in gather(batch[part]).items()}
        for part, gather in (("support", kept.support), ("query", kept.query))
    ]
    return network.score_clips(clips[0], batch["support_labels"].to(device), clips[1], way)


def summarize(
    correct: np.ndarray, num_queries: np.ndarray, confusion: np.ndarray, class_names: list[str], episodes: Dataset
) -> dict[str, Any]:
    """
    Args:
        correct (`np.ndarray` of shape `(episodes,)`): queries that were recognised.
        num_queries (`np.ndarray` of shape `(episodes,)`): queries of each episode.
        confusion (`np.ndarray` of shape `(classes, classes)`): queries by true and predicted class of the dataset.

    Returns:
        `dict` with `accuracy`, the mean over the episodes, and `confidence_interval`, half the width of its 95 %
        interval (1.96 standard errors; None of a single episode), both in percent; `num_episodes`, `num_queries`,
        `episodes_id`; `per_class`, accuracy in percent by class name; `confusion`, true class -> predicted class ->
        queries.
    """
    accuracy = correct / num_queries
    interval = 196 * float(accuracy.std(ddof=1) / np.sqrt(len(accuracy))) if len(accuracy) > 1 else None
    asked = np.flatnonzero(confusion.any(1))
    return {
        "accuracy": 100 * float(accuracy.mean()),
        "confidence_interval": interval,
        "num_episodes": len(accuracy),
        "num_queries": int(num_queries.sum()),
        "episodes_id": episodes_id(episodes),
        "per_class": {class_names[c]: 100 * float(confusion[c, c] / confusion[c].sum()) for c in asked},
        "confusion": {
            class_names[c]: {class_names[p]: int(confusion[c, p]) for p in np.flatnonzero(confusion[c])} for c in asked
        },
    }


def evaluate(data: DataArguments, arguments: EvaluateArguments) -> list[dict[str, Any]]:
    """
    What scripts/evaluate.py does: one result for every number of shots, printed and, on request, written as JSON.

    A plain image backbone in place of a DMGAL checkpoint is the baseline without any training: its frames are matched
    as they are.

    Raises:
        ValueError: the split does not exist, or the episodes do not fit the data.
    """
    for name in PROCESSOR_FIELDS:
        if getattr(data, name) != getattr(DataArguments, name):
            raise ValueError(f"{name}: frames are read as the processor of the model says, leave the option out.")
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    processor = DmgalVideoProcessor.from_pretrained(arguments.model)
    if arguments.json is not None:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    with accelerator.local_main_process_first():
        splits = load_videos(replace(data, resize=min(processor.size.values())))
    if arguments.split not in splits:
        raise ValueError(f"the dataset has no split {arguments.split!r}; it has {', '.join(splits)}.")
    videos = splits[arguments.split]
    labels, names = videos["label"][:], videos.features["label"].names
    if isinstance(AutoConfig.from_pretrained(arguments.model), DmgalConfig):
        model = DmgalModel.from_pretrained(arguments.model)
    else:
        model = DmgalModel.untrained(arguments.model, text_guidance=False)
    hold_frozen_backbone(model, arguments.mixed_precision)
    model.to(accelerator.device)
    if arguments.episodes is not None:
        lists = [({"episodes": arguments.episodes}, load_episodes(arguments.episodes, labels))]
    else:
        lists = []
        for shot in arguments.shot:
            draw = {"way": arguments.way, "shot": shot, "query": arguments.query, "seed": arguments.seed}
            lists.append(
                (draw, sample_episodes(labels, **draw, num_episodes=arguments.num_episodes, class_names=names))
            )
    rows = np.concatenate([rows_of(episodes) for _, episodes in lists])
    kept = encode_clips(
        model, processor, videos, rows, data.num_workers, accelerator, arguments.kept_clips_gb, arguments.kept_clips,
        description="Evaluating",
    )  # fmt: skip
    results = []
    for description, episodes in lists:
        metrics = evaluate_episodes(
            model, processor, videos, episodes, accelerator, episodes_per_forward=arguments.episodes_per_forward,
            kept=kept,
        )  # fmt: skip
        results.append({"model": arguments.model, "split": arguments.split, **description, **metrics})
        accelerator.print(
            f"{', '.join(f'{name} {value}' for name, value in description.items())}: {format_accuracy(metrics, 2)} "
            f"over {metrics['num_episodes']} episodes of {arguments.split} ({metrics['episodes_id']})"
        )
    if arguments.json is not None and accelerator.is_main_process:
        replace_file(Path(arguments.json), to_json(results))
    return results


def format_accuracy(metrics: dict[str, Any], digits: int) -> str:
    """Accuracy with its interval, in percent."""
    interval = metrics["confidence_interval"]
    return f"{metrics['accuracy']:.{digits}f}" + (" %" if interval is None else f" ± {interval:.{digits}f} %")


def to_json(content: Any) -> str:
    """JSON, which has no NaN or infinity: they become null."""

    def clean(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: clean(value) for name, value in part.items()}
        if isinstance(part, list):
            return [clean(value) for value in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(clean(content), indent=2, allow_nan=False)
