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
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..data import EpisodeVideos, collate_episodes, episodes_id, load_episodes, sample_episodes
from ..data.frame_memory import FrameMemory
from ..model.configuration_dmgal import DmgalConfig
from ..model.modeling_dmgal import DmgalModel
from ..model.video_processing_dmgal import DmgalVideoProcessor
from .arguments import DataArguments, EvaluateArguments
from .loading import load_videos


def evaluate_episodes(
    model: DmgalModel,
    processor: DmgalVideoProcessor,
    videos: Dataset,
    episodes: Dataset,
    accelerator: Accelerator,
    num_workers: int = 0,
    episodes_per_forward: int = 1,
    description: str = "Evaluating",
    memory: FrameMemory | None = None,
) -> dict[str, Any]:
    """
    Scores every query of every episode once, the episodes shared out among the processes.

    Args:
        model ([`DmgalModel`]): on the accelerator's device; it is put into eval mode.
        processor ([`DmgalVideoProcessor`]): of the model.
        videos (`datasets.Dataset`): columns `video` and `label` (`ClassLabel`).
        episodes (`datasets.Dataset`): an episode list over the rows of `videos`.
        accelerator (`Accelerator`): of the run.
        num_workers (`int`): processes that read videos, for each process that computes.
        episodes_per_forward (`int`): episodes a forward pass of a process; the result does not depend on it.
        description (`str`): of the progress bar.
        memory ([`FrameMemory`], *optional*): of `videos`, for lists that are evaluated again and again.

    Returns:
        `dict`, the same on every process: see [`summarize`].

    Raises:
        ValueError: several episodes a forward pass, and they are not of one size.
        VideoDecodeError: a video of an episode cannot be read.
    """
    if episodes_per_forward > 1:
        _check_equal_sizes(episodes)
    data = EpisodeVideos(videos, episodes, processor, memory=memory)
    loader = DataLoader(data, batch_size=episodes_per_forward, num_workers=num_workers, collate_fn=collate_episodes)
    loader = accelerator.prepare_data_loader(loader)
    model.eval()
    rows = []
    for batch in tqdm(loader, desc=description, disable=not accelerator.is_main_process, leave=False):
        with torch.no_grad(), accelerator.autocast():
            logits = model(
                support_pixel_values=processor.normalize(batch["support_pixel_values"]),
                support_labels=batch["support_labels"],
                query_pixel_values=processor.normalize(batch["query_pixel_values"]),
            ).logits
        # Classes of the episode -> classes of the dataset.
        way = logits.shape[-1]
        classes = torch.zeros_like(batch["support_classes"][:, :way])
        classes.scatter_(1, batch["support_labels"], batch["support_classes"])
        predicted = classes.gather(1, logits.argmax(-1))
        episode = batch["episode"][:, None].expand_as(predicted)
        rows.append(torch.stack([episode, batch["query_classes"], predicted], -1).flatten(0, 1))
    rows = accelerator.gather(accelerator.pad_across_processes(torch.cat(rows), pad_index=-1)).cpu().numpy()
    return summarize(rows, videos.features["label"].names, episodes)


def _check_equal_sizes(episodes: Dataset):
    sizes = {
        (max(support) + 1, len(support), len(query))
        for support, query in zip(episodes["support_labels"], episodes["query_labels"])
    }
    if len(sizes) > 1:
        raise ValueError(
            "the episodes are not of one size but have (classes, supports, queries) of "
            f"{', '.join(map(str, sorted(sizes)[:3]))}: set episodes_per_forward=1."
        )


def summarize(rows: np.ndarray, class_names: list[str], episodes: Dataset) -> dict[str, Any]:
    """
    Args:
        rows (`np.ndarray` of shape `(queries, 3)`): episode, true and predicted class; episode -1 is padding, and an
            episode that was handed to two processes counts once.
        class_names (`list[str]`): names of the dataset's classes.
        episodes (`datasets.Dataset`): the list that was evaluated.

    Returns:
        `dict` with `accuracy`, the mean over the episodes, and `confidence_interval`, half the width of its 95 %
        interval (1.96 standard errors; None of a single episode), both in percent; `num_episodes`, `num_queries`,
        `episodes_id`; `per_class`, accuracy in percent by class name; `confusion`, true class -> predicted class ->
        queries.
    """
    rows = rows[rows[:, 0] >= 0]
    num_queries = np.array([len(query) for query in episodes["query"]])
    order = np.argsort(rows[:, 0], kind="stable")
    rows = rows[order]
    # Ragged batches are padded by repeating episodes: keep the first of each.
    position = np.arange(len(rows)) - np.searchsorted(rows[:, 0], rows[:, 0])
    rows = rows[position < num_queries[rows[:, 0]]]
    correct = rows[:, 1] == rows[:, 2]
    accuracy = np.bincount(rows[:, 0], correct) / np.bincount(rows[:, 0])
    interval = 196 * float(accuracy.std(ddof=1) / np.sqrt(len(accuracy))) if len(accuracy) > 1 else None
    true, predicted = rows[:, 1], rows[:, 2]
    confusion = {
        class_names[c]: {
            class_names[p]: int(((true == c) & (predicted == p)).sum()) for p in np.unique(predicted[true == c])
        }
        for c in np.unique(true)
    }
    return {
        "accuracy": 100 * float(accuracy.mean()),
        "confidence_interval": interval,
        "num_episodes": len(accuracy),
        "num_queries": len(rows),
        "episodes_id": episodes_id(episodes),
        "per_class": {class_names[c]: 100 * float(correct[true == c].mean()) for c in np.unique(true)},
        "confusion": confusion,
    }


def evaluate(data: DataArguments, arguments: EvaluateArguments) -> list[dict[str, Any]]:
    """
    What scripts/evaluate.py does: one result for every number of shots, printed and, on request, written as JSON.

    A plain image backbone in place of a DMGAL checkpoint is the baseline without any training: its frames are matched
    as they are.

    Raises:
        ValueError: the split does not exist, or the episodes do not fit the data.
    """
    for name in ("resize", "crop_size", "image_mean", "image_std"):
        if getattr(data, name) != getattr(DataArguments, name):
            raise ValueError(f"{name}: frames are read as the processor of the model says, leave the option out.")
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
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
    model.to(accelerator.device)
    if arguments.episodes is not None:
        lists = [({"episodes": arguments.episodes}, load_episodes(arguments.episodes, labels))]
    else:
        draws = [
            {"way": arguments.way, "shot": shot, "query": arguments.query, "seed": arguments.seed}
            for shot in arguments.shot
        ]
        lists = [
            (draw, sample_episodes(labels, **draw, num_episodes=arguments.num_episodes, class_names=names))
            for draw in draws
        ]
    results = []
    for description, episodes in lists:
        metrics = evaluate_episodes(
            model, processor, videos, episodes, accelerator, data.num_workers, arguments.episodes_per_forward
        )
        results.append({"model": arguments.model, "split": arguments.split, **description, **metrics})
        accelerator.print(
            f"{', '.join(f'{name} {value}' for name, value in description.items())}: {format_accuracy(metrics, 2)} "
            f"over {metrics['num_episodes']} episodes of {arguments.split} ({metrics['episodes_id']})"
        )
    if arguments.json is not None and accelerator.is_main_process:
        Path(arguments.json).write_text(to_json(results))
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
