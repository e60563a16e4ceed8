"""Trains one variant after the other with the same seeds and budget, and prints their novel-class accuracy.

python scripts/ablate.py --config scripts/configs/motion_shapes_ft.yaml --output_dir runs/ablation [--only NAME ...]
    [--seeds 0 1 2] [--processes 2] [--shots 1 5]

The markdown table, one for every number of shots, is also written into output_dir/table.md.

Variants that are finished under output_dir are not trained again; one that was interrupted goes on.
"""

import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from dmgal_hf.model.configuration_mga import MgaConfig
from dmgal_hf.training import train
from dmgal_hf.training.arguments import (
    DataArguments,
    EvaluateArguments,
    ModelArguments,
    TrainArguments,
    parse_arguments,
)
from dmgal_hf.training.checkpoints import FREE_FIELDS, differing_fields, list_checkpoints
from dmgal_hf.training.evaluation import PROCESSOR_FIELDS, evaluate, format_accuracy
from dmgal_hf.training.loading import load_videos
from dmgal_hf.training.starting import settle_arguments
from dmgal_hf.training.training import run_fields

# What differs from the config, by the name of the variant: fields of ModelArguments.
FT_VARIANTS = {
    "full": {},
    "no S-MGA": {"self_motion_attention": False},
    "no mixer": {"mixer": False},
    "no C-MGA": {"cross_motion_attention": False},
    "S-MGA alone": {"mixer": False, "cross_motion_attention": False},
    "mixer alone": {"self_motion_attention": False, "cross_motion_attention": False},
    "C-MGA alone": {"self_motion_attention": False, "mixer": False},
    "none of the three": {"motion_attention": False},
    "forward motion alone": {"motion_directions": "forward"},
    "backward motion alone": {"motion_directions": "backward"},
    "one scale": {"motion_scales": []},
    "half scale added": {"motion_scales": ["half"]},
    "full scale added": {"motion_scales": ["full"]},
    "OTAM": {"alignment": "otam"},
    "mean prototypes": {"alignment": "mean"},
    "none of the three, OTAM": {"motion_attention": False, "alignment": "otam"},
    "none of the three, mean prototypes": {"motion_attention": False, "alignment": "mean"},
}
# The same; adapter_config is merged into the config's.
ADAPTER_VARIANTS = {
    "both": {},
    "Smga alone": {"adapter_config": {"cmga_layers": []}},
    "Cmga alone": {"adapter_config": {"smga_layers": []}},
    "values without attention": {"adapter_config": {"attention": False}},
    "forward motion alone": {"adapter_config": {"directions": "forward"}},
    "backward motion alone": {"adapter_config": {"directions": "backward"}},
    "Smga in the first block alone": {"adapter_config": {"smga_layers": [0], "cmga_layers": []}},
    "the last two blocks alone": {"adapter_config": {"smga_layers": [-2], "cmga_layers": [-1]}},
    "Cmga in the first block": {"adapter_config": {"cmga_layers": [0]}},
    "Cmga in the last two blocks": {"adapter_config": {"cmga_layers": [-2, -1]}},
    "supports pooled 2x2": {"adapter_config": {"support_pooling": 2}},
    "class token": {"frame_pooling": "cls"},
    "mean of the patches": {"frame_pooling": "mean"},
    "OTAM": {"alignment": "otam"},
    "mean prototypes": {"alignment": "mean"},
    "LoRA of equal size": {"adapter_config": "LORA"},
    "frozen backbone": {"adapter_config": None},
    "frozen backbone, OTAM": {"adapter_config": None, "alignment": "otam"},
    "frozen backbone, mean prototypes": {"adapter_config": None, "alignment": "mean"},
}


@dataclass
class AblationArguments:
    """Which variants."""

    only: list[str] | None = HfArg(default=None, help="Names of variants; by default all.")
    seeds: list[int] | None = HfArg(default=None, help="One run of every variant a seed, in place of seed.")
    processes: int = HfArg(
        default=1, help="Runs side by side, each on one CPU thread; what one prints goes into its output.txt."
    )
    shots: list[int] | None = HfArg(
        default=None, help="Supports a class of the test, each in a table of its own; by default as in training."
    )
    backbones: list[str] = HfArg(
        default_factory=list,
        help="A variant more each: id or folder of a pretrained backbone, or the YAML of a random one.",
    )

    def __post_init__(self):
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}.")
        if min(self.shots or [1]) < 1:
            raise ValueError(f"shots must be at least 1 each, got {self.shots}.")


def list_variants(model: ModelArguments, backbones: list[str]) -> dict[str, dict[str, Any]]:
    """Variants of a config by name, without those that are what it says anyway."""
    variants = dict(ADAPTER_VARIANTS if model.paradigm == "adapter" else FT_VARIANTS)
    if model.backbone_config is not None and "depths" in model.backbone_config:
        deeper = [depth + 1 for depth in model.backbone_config["depths"]]
        variants["a block more in every stage"] = {"backbone_config": {**model.backbone_config, "depths": deeper}}
    if (model.backbone_config or {}).get("model_type") == "resnet" and "hidden_sizes" in model.backbone_config:
        sizes = {name: model.backbone_config[name] for name in ("hidden_sizes", "depths")}
        sizes["num_stages"] = len(sizes["depths"])
        variants["ConvNeXt backbone"] = {"backbone_config": {"model_type": "convnext", **sizes}}
    for backbone in backbones:
        value = yaml.safe_load(backbone)
        random = isinstance(value, dict)
        variants[f"backbone {backbone}"] = {
            "backbone": None if random else backbone,
            "backbone_config": value if random else None,
        }
    return {
        name: changes for name, changes in variants.items() if not changes or change_model(model, changes) != model
    }


def change_model(model: ModelArguments, changes: dict[str, Any]) -> ModelArguments:
    """The model of a variant."""
    adapters = changes.get("adapter_config")
    if adapters == "LORA":
        budget = {one.name for one in fields(MgaConfig)} & (model.adapter_config or {}).keys()
        adapters = {"peft_type": "LORA", "budget": {name: model.adapter_config[name] for name in budget}}
    elif adapters is not None:
        adapters = {**(model.adapter_config or {}), **adapters}
    return replace(model, **changes | ({"adapter_config": adapters} if "adapter_config" in changes else {}))


def run_variant(
    data: DataArguments, model: ModelArguments, arguments: TrainArguments, shots: list[int]
) -> dict[int, dict[str, Any]]:
    """The metrics of a run, trained now or before, by the number of shots of its test."""
    output_dir = Path(arguments.output_dir)
    metrics = output_dir / "metrics.json"
    if not metrics.exists() or "test" not in json.loads(metrics.read_text()):
        train(data, model, replace(arguments, resume=bool(list_checkpoints(output_dir))))
    before = yaml.safe_load((output_dir / "config.yaml").read_text())
    now = run_fields(*settle_arguments(data, model, arguments), arguments)
    differing = differing_fields(before, now, FREE_FIELDS - {"test_episodes"})
    if differing:
        raise ValueError(f"{output_dir} holds another run: {'; '.join(differing)}. Give another output_dir.")
    found = json.loads(metrics.read_text())
    test = found["test"]
    tests = {shot: test if shot == test["shot"] else test_again(data, arguments, test, shot) for shot in shots}
    return {shot: found | {"test": one} for shot, one in tests.items()}


def test_again(data: DataArguments, arguments: TrainArguments, test: dict[str, Any], shot: int) -> dict[str, Any]:
    """The metrics of the test of a trained model with another number of shots, tested now or before."""
    path = Path(arguments.output_dir, f"test_{shot}shot.json")
    if path.exists():
        return json.loads(path.read_text())[0]
    draw = EvaluateArguments(
        model=arguments.output_dir, way=test["way"], shot=[shot], query=test["query"], seed=test["seed"],
        num_episodes=test["num_episodes"], mixed_precision=arguments.mixed_precision, json=str(path),
    )  # fmt: skip
    as_trained = {one.name: one.default for one in fields(DataArguments) if one.name in PROCESSOR_FIELDS}
    return evaluate(replace(data, **as_trained), draw)[0]


def run_alone(
    data: DataArguments, model: ModelArguments, arguments: TrainArguments, shots: list[int]
) -> dict[int, dict[str, Any]]:
    """[`run_variant`] on one CPU thread in a process of its own."""
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / "output.txt", "a") as file, redirect_stdout(file), redirect_stderr(file):
        return run_variant(replace(data, num_workers=0), model, replace(arguments, cpu_threads=1), shots)


def run_side_by_side(jobs: list[tuple], processes: int) -> list[dict[int, dict[str, Any]]]:
    """What jobs give, in their order. Ctrl-C reaches the runs too: each saves its state and ends."""
    if PartialState().num_processes > 1:
        raise ValueError(f"processes={processes}: start this script as one process to train runs side by side.")
    load_videos(jobs[0][0])  # made-up clips are made once, not by every run
    pool = ThreadPoolExecutor(processes)
    try:
        runs = [pool.submit(run_in_a_process, *job) for job in jobs]
        for run in tqdm(as_completed(runs), total=len(runs), desc="Training", unit="run"):
            run.result()  # the first that fails ends the rest, as it would one after the other
        return [run.result() for run in runs]
    finally:
        pool.shutdown(cancel_futures=True)


def run_in_a_process(*job) -> dict[int, dict[str, Any]]:
    """
    [`run_alone`] in a new process, as accelerate's state is a process's own. Processes that serve several runs would
    have the next one in their queue, and begin it after Ctrl-C.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_alone, *job).result()


# 97.5 % quantiles of Student's t for 1 to 9 degrees of freedom; more seeds than ten take the last.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval_over_seeds(accuracies: list[float]) -> float:
    """Half the width of the 95 % interval of the mean, from how much training with other seeds varies."""
    quantile = STUDENT_T[min(len(accuracies) - 1, len(STUDENT_T)) - 1]
    return quantile * statistics.stdev(accuracies) / math.sqrt(len(accuracies))


def format_table(results: dict[str, list[dict[str, Any]]], seeds: list[int]) -> str:
    """
    Markdown; `results` has the metrics of every seed by variant. The interval of the accuracy is that of the mean over
    the episodes of all seeds; how much training itself varies is in the interval over the seeds.
    """
    by_seed = len(seeds) > 1
    seed_column = " by seed (95 % interval over seeds) |" if by_seed else ""
    lines = [f"| variant | trainable parameters | accuracy, % |{seed_column} episodes |"]
    lines.append("|---|---|---|---|---|" if by_seed else "|---|---|---|---|")
    for name, runs in results.items():
        tests = [run["test"] for run in runs]
        accuracy = sum(test["accuracy"] for test in tests) / len(tests)
        intervals = [test["confidence_interval"] for test in tests]
        interval = None if None in intervals else math.hypot(*intervals) / len(tests)
        result = format_accuracy({"accuracy": accuracy, "confidence_interval": interval}, 1).removesuffix(" %")
        cells = [name, f"{runs[0]['training']['trainable_parameters']:,}", result]
        if by_seed:
            single = [test["accuracy"] for test in tests]
            cells.append(f"{', '.join(f'{one:.1f}' for one in single)} (± {interval_over_seeds(single):.1f})")
        lines.append(f"| {' | '.join([*cells, str(sum(test['num_episodes'] for test in tests))])} |")
    return "\n".join(lines)


def main(data: DataArguments, model: ModelArguments, arguments: TrainArguments, ablation: AblationArguments):
    variants = list_variants(model, ablation.backbones)
    names = ablation.only or list(variants)
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise ValueError(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}.")
    if not arguments.test_episodes:
        raise ValueError("test_episodes must be at least 1 to compare variants, got 0.")
    seeds, shots = ablation.seeds or [arguments.seed], ablation.shots or [arguments.shot]
    models = {name: change_model(model, variants[name]) for name in names}  # all of them, before hours of training
    jobs = []
    for seed in seeds:
        for name in names:
            folder = Path(arguments.output_dir, name.replace(" ", "_").replace("/", "_"), f"seed_{seed}")
            jobs.append((data, models[name], replace(arguments, seed=seed, output_dir=str(folder)), shots))
    if ablation.processes > 1:
        runs = run_side_by_side(jobs, ablation.processes)
    else:
        runs = [run_variant(*job) for job in jobs]
    if PartialState().is_main_process:
        tables = []
        for shot in shots:
            with_shots = [run[shot] for run in runs]
            results = {name: with_shots[number :: len(names)] for number, name in enumerate(names)}
            heading = f"{with_shots[0]['test']['way']}-way {shot}-shot\n\n" if len(shots) > 1 else ""
            tables.append(heading + format_table(results, seeds))
        text = "\n\n".join(tables)
        Path(arguments.output_dir, "table.md").write_text(text + "\n")
        print(text)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*parse_arguments((DataArguments, ModelArguments, TrainArguments, AblationArguments)))
