"""One episodic training run with Accelerate: optimizer, steps, validation and states."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, gather_object, set_seed
from datasets import Dataset, DatasetDict
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModel, get_scheduler

from ..data import (
    ClipAugmentation,
    EpisodeSource,
    EpisodeVideos,
    augment_ahead,
    collate_episodes,
    obey_main_process,
    pack_episodes,
    sample_episodes,
    seed_from,
)
from ..data.cuda_graphs import ReplayedCall
from ..data.frame_memory import FrameMemory, keep_frames
from ..data.written_aside import replace_file
from ..hub import render_model_card
from ..model.modeling_dmgal import DmgalModel
from .acceleration import compile_regions, hold_frozen_backbone, keep_freed_memory, why_not_replayed
from .arguments import DataArguments, ModelArguments, TrainArguments
from .batch_statistics import BatchStatistics
from .checkpoints import Progress, StopSignal, load_checkpoint, save_checkpoint, write_aside
from .episode_learner import EpisodeLearner
from .evaluation import evaluate_episodes, format_accuracy, to_json
from .loading import num_classes
from .starting import build_model

logger = get_logger(__name__)


def build_optimizer(learner: nn.Module, arguments: TrainArguments) -> torch.optim.Optimizer:
    """Over what is trainable; gains, biases and norms are free of weight decay; a backbone may have its own rate."""
    trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    rates = [(trainable, arguments.learning_rate)]
    if arguments.backbone_learning_rate is not None:
        backbone = [parameter for parameter in learner.model.backbone.parameters() if parameter.requires_grad]
        known = {id(parameter) for parameter in backbone}
        rest = [parameter for parameter in trainable if id(parameter) not in known]
        rates = [(rest, arguments.learning_rate), (backbone, arguments.backbone_learning_rate)]
    groups = []
    for parameters, rate in rates:
        groups.append(
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": arguments.weight_decay, "lr": rate}
        )
        groups.append({"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": rate})
    fused = all(parameter.is_cuda for parameter in trainable)
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=arguments.learning_rate, momentum=arguments.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, fused=fused)


def build_accelerator(arguments: TrainArguments) -> Accelerator:
    """The accelerator of a run: it accumulates so that a step has `episodes_per_step` episodes over all processes."""
    if arguments.report_to != "none" and arguments.report_to not in map(str, get_available_trackers()):
        raise ValueError(
            f"report_to={arguments.report_to!r} is not installed: `pip install {arguments.report_to}`, or use none."
        )
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
        # Steps are whole at the end of the data, which the way to a GPU reaches a batch before the step does.
        gradient_accumulation_plugin=GradientAccumulationPlugin(sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # Batch statistics are averaged once a step instead, see BatchStatistics.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError("accelerate shards models with FSDP on GPUs alone: start CPU processes without --use_fsdp.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP version 1 is not supported: use --fsdp_version 2.")
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = None  # autocast as everywhere: the normalised frames are float32
        # Reading the weights in the main process alone fails in accelerate 1.15 with the buffers of a batch norm.
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # for from_pretrained
    together = accelerator.num_processes * arguments.episodes_per_forward
    if arguments.episodes_per_step % together:
        raise ValueError(
            f"episodes_per_step={arguments.episodes_per_step} cannot be shared out to {accelerator.num_processes} "
            f"processes of episodes_per_forward={arguments.episodes_per_forward}: make it a multiple of {together}, "
            "or start fewer processes."
        )
    accelerator.gradient_accumulation_steps = arguments.episodes_per_step // together
    accelerator.print(
        f"Training with {accelerator.num_processes} processes on {accelerator.device.type}: "
        f"{arguments.episodes_per_step} episodes a step, {arguments.episodes_per_forward} a forward pass"
    )
    return accelerator


def shard_by_blocks(accelerator: Accelerator, model: DmgalModel):
    """Has FSDP gather the backbone block by block where it was started with no policy, or with none it can follow."""
    plugin = accelerator.state.fsdp_plugin
    if model.text_head is not None:
        plugin.ignored_modules = [model.text_head]  # frozen, and of scalars, which cannot be sharded
    if plugin.auto_wrap_policy is None or plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        present = {type(module).__name__ for module in model.backbone.modules()}
        blocks = sorted(present.intersection(model.backbone._no_split_modules or ()))
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or blocks


class TrainingRun:
    """Everything that a run holds; see [`train`]. `frames` is a folder in which decoded frames may be kept."""

    def __init__(
        self,
        accelerator: Accelerator,
        data: DataArguments,
        model: ModelArguments,
        arguments: TrainArguments,
        videos: DatasetDict,
        fields: dict[str, Any],
        frames: Path | None = None,
    ):
        self.accelerator, self.arguments, self.videos = accelerator, arguments, videos
        self.output_dir = Path(arguments.output_dir)
        self.num_workers = data.num_workers
        with _naming("train"):
            self.episodes = EpisodeSource(
                videos["train"]["label"], arguments.way, arguments.shot, arguments.query, arguments.seed,
                videos["train"].features["label"].names,
            )  # fmt: skip
        # Drawn now: what does not fit is to be known before hours of training.
        self.ways: dict[str, int] = {}
        self.validation = self._episode_list("validation", arguments.validation_episodes)
        self.test = self._episode_list("test", arguments.test_episodes)
        set_seed(arguments.seed)
        network, self.processor = build_model(model, data)
        if arguments.head_only:
            network.backbone.requires_grad_(False)
        if arguments.gradient_checkpointing:
            if not network.supports_gradient_checkpointing:
                kind = network.config.backbone_config.model_type
                raise ValueError(
                    f"gradient_checkpointing: the backbone {kind!r} has none in transformers, leave it out."
                )
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.memories: dict[str, FrameMemory] = {}
        if frames is not None:  # test clips are read once
            of_splits = {split: videos[split] for split in ("train", "validation") if split in videos}
            self.memories = keep_frames(of_splits, self.processor, arguments.frame_memory, frames)
        self._hold(network)
        self.network = network
        self.num_trainable = sum(one.numel() for one in network.parameters() if one.requires_grad)
        self.progress = Progress(arguments=fields | {"labelled_videos": _describe_labels(videos)})
        if self.num_trainable:
            self._prepare_training()
        else:
            self.learner = network.to(accelerator.device)

    def _prepare_training(self):
        """Optimizer, schedule and what accelerate makes of them; continues the state of an earlier run on request."""
        accelerator, arguments = self.accelerator, self.arguments
        names, base = self.videos["train"].features["label"].names, self.videos["train"].unique("label")
        learner = EpisodeLearner(
            self.network.to(accelerator.device), self.processor, len(names), arguments.class_loss_weight,
            arguments.text_loss_weight, {number: names[number] for number in base},
        )  # fmt: skip
        if arguments.torch_compile:
            compile_regions(self.network)
        optimizer = build_optimizer(learner.to(accelerator.device), arguments)
        if accelerator.distributed_type == DistributedType.FSDP:
            shard_by_blocks(accelerator, self.network)
        self.learner, self.optimizer = accelerator.prepare(learner, optimizer)
        for half in ("encode_clips", "score_clips"):
            register_fsdp_forward_method(self.learner, half)  # does nothing without FSDP
        steps = arguments.num_episodes // arguments.episodes_per_step
        self.scheduler = get_scheduler(
            arguments.lr_scheduler, self.optimizer.optimizer, round(arguments.warmup_ratio * steps), steps
        )
        if arguments.resume:
            self.progress = load_checkpoint(accelerator, self.output_dir, self.progress.arguments)
            self.scheduler.load_state_dict(self.progress.scheduler)
        self.statistics = BatchStatistics(self.learner, accelerator)
        self.replayed, reason = None, why_not_replayed(accelerator, arguments.gradient_checkpointing)
        if reason is None and arguments.cuda_graphs is not False:
            self.replayed = self._replayed_step()
        elif arguments.cuda_graphs:
            accelerator.print(f"cuda_graphs: steps run plainly, as {reason}.")

    def _replayed_step(self) -> ReplayedCall:
        weights, buffers = list(self.learner.parameters()), list(self.learner.buffers())

        def changed() -> list[torch.Tensor]:
            return [*buffers, *(weight.grad for weight in weights if weight.grad is not None)]

        def places() -> list[int]:
            return [tensor.data_ptr() for tensor in (*weights, *changed())]

        return ReplayedCall(self._loss_and_gradients, changed, places)

    def _hold(self, network: DmgalModel):
        if self.accelerator.distributed_type != DistributedType.FSDP:  # which shards weights of one dtype
            hold_frozen_backbone(network, self.arguments.mixed_precision)

    def _way(self, split: str) -> int:
        way, classes = self.arguments.way, num_classes(self.videos[split])
        given = getattr(self.arguments, f"{split}_way")
        if given is None and classes < way:
            self.accelerator.print(f"Episodes of the split {split} have {classes} classes, as many as there are.")
        return min(way, classes) if given is None else given

    def _episode_list(self, split: str, number: int) -> Dataset | None:
        if split not in self.videos or number == 0:
            return None
        labels = self.videos[split].features["label"]
        self.ways[split] = self._way(split)
        with _naming(split):
            return sample_episodes(
                self.videos[split]["label"], self.ways[split], self.arguments.shot, self.arguments.test_query, number,
                self.arguments.seed, labels.names,
            )  # fmt: skip

    def _loader(self) -> Iterable[dict[str, Any]]:
        """Training episodes from where the run stands. A GPU augments them itself, else the workers do."""
        arguments, processor = self.arguments, self.processor
        crop, resize = processor.crop_size["height"], processor.size["shortest_edge"]
        support = ClipAugmentation.for_support(crop, resize, resample=processor.resample)
        query = support
        if arguments.augment:
            query = ClipAugmentation.for_query(
                crop, resize, horizontal_flip=arguments.horizontal_flip, resample=processor.resample
            )
        elif arguments.horizontal_flip:
            query = ClipAugmentation(crop, resize, horizontal_flip=True, resample=processor.resample)
        on_gpu = self.accelerator.device.type == "cuda"
        data = EpisodeVideos(
            self.videos["train"], self.episodes, processor, (support, query), arguments.seed, replace_broken=True,
            raw=on_gpu, memory=self.memories.get("train"),
        )  # fmt: skip
        loader = DataLoader(
            data,
            batch_size=arguments.episodes_per_forward,
            sampler=range(self.progress.episodes, arguments.num_episodes),
            num_workers=self.num_workers,
            collate_fn=pack_episodes if on_gpu else collate_episodes,
            pin_memory=on_gpu,
            worker_init_fn=obey_main_process,
        )
        loader = self.accelerator.prepare_data_loader(loader, device_placement=not on_gpu)
        return augment_ahead(loader, (support, query), self.accelerator.device) if on_gpu else loader

    def train(self, stop: StopSignal):
        """Runs the training episodes that are left, validating and saving along the way."""
        arguments, progress = self.arguments, self.progress
        if not self.num_trainable:
            self.accelerator.print(
                "This model has nothing to train (a frozen backbone without adapters): it is tested."
            )
            return self._validate()
        if progress.validation_due:
            with stop.at_once():
                self._validate()
        bar = tqdm(
            total=arguments.num_episodes,
            initial=progress.episodes,
            desc="Training",
            unit="episode",
            disable=not self.accelerator.is_main_process,
        )
        batches = iter(self._loader() if progress.episodes < arguments.num_episodes else ())
        self.learner.train()
        while progress.episodes < arguments.num_episodes:
            started = time.perf_counter()
            record, waited = self.step(batches, stop)
            progress.episodes += arguments.episodes_per_step
            now = time.perf_counter()
            record |= {
                "episodes": progress.episodes,
                "episodes_per_second": arguments.episodes_per_step / (now - started),
                "data_wait_share": waited / (now - started),
                "memory_gib": memory_in_use(self.accelerator.device),
            }
            self.accelerator.log(record, step=progress.episodes)
            progress.history.append(record)
            bar.update(arguments.episodes_per_step)
            recent = progress.history[-50:]
            bar.set_postfix(
                loss=f"{sum(r['loss'] for r in recent) / len(recent):.3f}",
                accuracy=f"{sum(r['accuracy'] for r in recent) / len(recent):.1f}",
            )
            self._milestones(stop)
        bar.close()

    def _forward_backward(self, batch: dict[str, Any]) -> tuple[torch.Tensor, list[str]]:
        # Dropout depends on the episode alone: the same whatever the processes, and after resuming.
        torch.manual_seed(seed_from(self.arguments.seed, f"dropout/{int(batch['episode'][0])}"))
        tensors = {name: value for name, value in batch.items() if torch.is_tensor(value) and name != "episode"}
        with self.accelerator.accumulate(self.learner):
            loss, logits = (self.replayed or self._loss_and_gradients)(tensors)
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        broken = torch.full_like(accuracy, len(batch["broken"]))
        return torch.stack([loss.float(), 100 * accuracy, broken]), batch["broken"]

    def _loss_and_gradients(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of a batch, whose gradients are added to those of the weights."""
        with self.accelerator.autocast():
            loss, output = self.learner(batch, way=self.arguments.way)
        self.accelerator.backward(loss)
        return loss.detach(), output.logits.detach()

    def step(self, batches: Iterator[dict[str, Any]], stop: StopSignal) -> tuple[dict[str, float], float]:
        """
        One step of the optimizer.

        Returns:
            What there is to log, and the seconds that were spent waiting for data.
        """
        records, waited = [], 0.0
        while not records or not self.accelerator.sync_gradients:
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            records.append(self._forward_backward(batch))
        return self._update(records, stop), waited

    def _update(self, records: list[tuple[torch.Tensor, list[str]]], stop: StopSignal) -> dict[str, float]:
        """Updates the weights after the last backward pass of a step."""
        arguments, progress = self.arguments, self.progress
        values = torch.stack([values for values, _ in records]).mean(0)
        values = self.accelerator.reduce(torch.cat([values, values.new_tensor(stop.flags())]), "mean")
        limit = math.inf if arguments.max_grad_norm is None else arguments.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        # All at once: reading is the only time in a step that a GPU has to be waited for.
        loss, accuracy, broken, *stop_flags, norm = torch.cat([values, norm[None].to(values)]).tolist()
        stop.agree(stop_flags)
        if broken:
            self._note_broken([path for _, paths in records for path in paths])
        record = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "gradient_norm": norm,
        }
        # With fp16 the gradient scaler itself leaves out steps whose gradient overflows.
        if math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.scaler is not None):
            self.optimizer.step()
            self.statistics.average()
            progress.bad_in_a_row = 0
        else:
            self.statistics.restore()
            progress.bad_steps += 1
            progress.bad_in_a_row += 1
            logger.warning(
                f"After {progress.episodes} episodes the loss is {loss} and the norm of its gradient {norm}: "
                "the step is left out."
            )
        self.optimizer.zero_grad(set_to_none=self.replayed is None)  # a graph adds to gradients where they lie
        self.scheduler.step()
        if progress.bad_in_a_row >= arguments.max_bad_steps:
            raise RuntimeError(
                f"Loss or gradient were not finite in {progress.bad_in_a_row} steps in a row (max_bad_steps): lower "
                "learning_rate, set max_grad_norm, or train without mixed_precision."
            )
        return record

    def _note_broken(self, paths: list[str]):
        """Names unreadable videos of any process once, and stops the run when they are too many."""
        if self.accelerator.num_processes > 1:
            paths = gather_object(paths)
        for path in dict.fromkeys(paths):
            if path not in self.progress.broken:
                logger.warning(f"{path} cannot be read; another clip of its class takes its place.")
                self.progress.broken.append(path)
        share = len(self.progress.broken) / len(self.videos["train"])
        if share > self.arguments.max_broken:
            raise RuntimeError(
                f"{len(self.progress.broken)} of {len(self.videos['train'])} training videos cannot be read, more "
                f"than max_broken={self.arguments.max_broken:.2%}. The first: {', '.join(self.progress.broken[:5])}."
            )

    def _milestones(self, stop: StopSignal):
        """What is due after a step: a resumable state, the end on request, validation."""
        arguments, progress = self.arguments, self.progress
        done, step = progress.episodes == arguments.num_episodes, arguments.episodes_per_step
        progress.validation_due = done or (
            self.validation is not None and _passed(progress.episodes, arguments.validate_every, step)
        )
        # Validation may take longer than a pre-empted run is given: the state is saved before it.
        if progress.validation_due or stop.agreed or _passed(progress.episodes, arguments.checkpoint_every, step):
            progress.scheduler = self.scheduler.state_dict()
            needed = _bytes_of(self.learner.state_dict(), *self.optimizer.optimizer.state.values())
            save_checkpoint(self.accelerator, self.output_dir, progress, arguments.keep_checkpoints, needed)
        if stop.agreed:
            stop.leave(stop.agreed)
        if progress.validation_due:
            with stop.at_once():
                self._validate()

    def _validate(self):
        progress = self.progress
        progress.validation_due = False
        if self.validation is None:
            self._keep_model()
            return
        metrics = self._evaluate(self.learner, "validation", self.validation, "Validating")
        accuracy = metrics["accuracy"]
        self.accelerator.log({"validation_accuracy": accuracy}, step=progress.episodes)
        if self.num_trainable:
            self.learner.train()
            progress.history[-1]["validation_accuracy"] = accuracy
        if self.accelerator.is_main_process:
            result = format_accuracy(metrics, 1)
            tqdm.write(
                f"episode {progress.episodes}: validation accuracy {result} ({metrics['num_episodes']} episodes)"
            )
        if accuracy > progress.best_accuracy:
            progress.best_accuracy = accuracy
            self._keep_model()

    def _keep_model(self):
        """Makes these weights the result so far: the best in validation or, without, the last."""
        self._save_model(self.output_dir / "best")
        self.progress.best_episodes = self.progress.episodes

    def _evaluate(self, model: nn.Module, split: str, episodes: Dataset, description: str) -> dict[str, Any]:
        return evaluate_episodes(
            model, self.processor, self.videos[split], episodes, self.accelerator, self.num_workers,
            description=description, memory=self.memories.get(split),
        )  # fmt: skip

    def _save_model(self, folder: Path):
        # Of a class of its own: FSDP gives the network in training another, whose source would be saved beside it.
        with torch.device("meta"):
            network = DmgalModel(self.network.config)
        network.name_or_path = self.network.name_or_path  # where a text tower may lie that goes along
        state = self.network.state_dict()
        if self.num_trainable:
            state = {
                name.removeprefix("model."): tensor
                for name, tensor in self.accelerator.get_state_dict(self.learner).items()
                if name.startswith("model.")
            }
        with write_aside(folder, self.accelerator, _bytes_of(state)) as aside:
            if self.accelerator.is_main_process:
                network.save_pretrained(aside, state_dict=state)
                self.processor.save_pretrained(aside)

    def finish(self) -> dict[str, Any]:
        """Puts the best model in validation, else the last, into `output_dir`; tests it and writes metrics.json."""
        accelerator, arguments, progress = self.accelerator, self.arguments, self.progress
        network = AutoModel.from_pretrained(self.output_dir / "best")
        if accelerator.is_main_process:
            network.save_pretrained(self.output_dir)
            self.processor.save_pretrained(self.output_dir)
        metrics = {
            "training": {
                "episodes": progress.episodes,
                "best_episodes": progress.best_episodes,
                "trainable_parameters": self.num_trainable,
                "bad_steps": progress.bad_steps,
                "broken_videos": progress.broken,
                "history": progress.history,
            },
        }
        if self.validation is not None:
            metrics["validation"] = {
                "way": self.ways["validation"],
                "accuracy": progress.best_accuracy,
                "num_episodes": arguments.validation_episodes,
            }
        self._record(metrics)  # before the test, which may find a broken video
        self._hold(network)
        if self.test is not None:
            metrics["test"] = {
                "way": self.ways["test"],
                "shot": arguments.shot,
                "query": arguments.test_query,
                "seed": arguments.seed,
                **self._evaluate(network.to(accelerator.device), "test", self.test, "Testing"),
            }
            self._record(metrics)
        return metrics

    def _record(self, metrics: dict[str, Any]):
        if self.accelerator.is_main_process:
            replace_file(self.output_dir / "metrics.json", to_json(metrics))
            render_model_card(self.output_dir).save(self.output_dir / "README.md")


@contextmanager
def _naming(split: str) -> Iterator[None]:
    """Errors inside are of this split."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"split {split!r}: {error}") from error


def _describe_labels(videos: DatasetDict) -> str:
    """What changes where a run would not go on with the videos it began with."""
    digest, number = hashlib.sha256(), 0
    for split in ("train", *(["validation"] if "validation" in videos else [])):
        digest.update(json.dumps([videos[split].features["label"].names, videos[split]["label"][:]]).encode())
        number += len(videos[split])
    return f"{number} for training and validation, digest {digest.hexdigest()[:8]}"


def _bytes_of(*states: Mapping[str, Any]) -> int:
    """What the tensors of these take."""
    tensors = (value for state in states for value in state.values() if torch.is_tensor(value))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _passed(episodes: int, every: int, step: int) -> bool:
    """Whether the last step of `step` episodes reached or passed a multiple of `every`."""
    return episodes // every > (episodes - step) // every


def memory_in_use(device: torch.device) -> float:
    """Memory in GiB: the peak of the GPU where there is one, else what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
