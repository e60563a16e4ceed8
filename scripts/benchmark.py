"""Speed and memory, ours beside the alternatives: `python scripts/benchmark.py --only head data --json FILE`.

Contenders of a group take turns in one run, so that whatever else the machine does falls on all of them. Shown are
medians, and the median of each round's ratio to the first contender of the group. Peak memory is what one call adds to
what rests in memory before it, each contender in a process of its own. Where contenders compute the same thing, their
outputs are compared before the clock runs. On a GPU (`--device cuda`) each is shown with its peak memory (of a process
that trains all it holds; of a call that is replayed nothing, as its graph keeps it), the time that kernels run, their
number, and its share of what products of bf16 matrices reach in the same run.

What is to be reached on an H100 stands below its table, as reached or MISSED (`--device cuda --reference DIR`):
train: the adapters' 1-shot step, as a share of the ceiling and beside LoRA's; DMGAL-FT's step beside the authors'; the
seconds until blocks are compiled. head: the whole head, its memory, and C-MGA alone, beside the authors'. support: one
query beside a CUDA graph of the bare backbone. feed: the share of time that a run waits for data. Whether anything on
a CPU is slower than at another commit, its checkout tells: head, adapter and support there and here.

Parts: head (S-MGA, mixer, C-MGA), growth (C-MGA as episodes grow; `--plot FILE` draws it), adapter (MGA in a frozen
ViT), support (kept supports), data (frames, cache, lists), train (steps of training in processes of accelerate), feed
(training episodes as they reach the device), evaluate (every clip encoded once for all episodes).
Contenders that are not installed are named at the end: decord, torchcodec, and the authors' modules and model, which
`--reference DIR` takes from a checkout of their repository. The code in that checkout is run.
"""

import importlib.metadata
import json
import os
import platform
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapter import adapter_groups
from benchmarks.data import data_groups
from benchmarks.evaluate import evaluate_groups
from benchmarks.feed import feed_groups
from benchmarks.growth import growth_groups, plot_growth
from benchmarks.head import head_groups
from benchmarks.measuring import (
    BenchmarkArguments,
    Count,
    Group,
    measure_ceilings,
    measure_count,
    measure_group,
    measure_memory,
    on_gpu,
)
from benchmarks.support import support_groups
from benchmarks.train import train_groups
from dmgal_hf.training.arguments import parse_arguments

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "av", "numpy", "decord", "torchcodec")
GROUPS = {
    "head": head_groups,
    "growth": growth_groups,
    "adapter": adapter_groups,
    "support": support_groups,
    "data": data_groups,
    "train": train_groups,
    "feed": feed_groups,
    "evaluate": evaluate_groups,
}


def describe_environment(arguments: BenchmarkArguments) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": device_name(arguments.device),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "small": arguments.small,
        "versions": versions,
        "ceilings": measure_ceilings(arguments.device) if on_gpu(arguments.device) else {},
    }


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def format_environment(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    more = " Tiny shapes: the figures mean nothing." if environment["small"] else ""
    if ceilings := environment["ceilings"]:
        more += (
            f"\nCeilings: bf16 products {ceilings['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s, copies "
            f"{ceilings['copied_bytes_per_second'] / 1e12:.2f} TB/s (read + write)."
        )
    return (
        f"{environment['device']}, {environment['cpus']} CPUs, {environment['threads']} threads, "
        f"{environment['repeats']} rounds; {versions}.{more}\n"
    )


def format_group(group: dict[str, Any]) -> str:
    """A markdown table."""
    if "flop_ratio" in group["contenders"][0]:
        lines = [f"### {group['name']}", "", "| | operations, relative | TFLOP, by count |", "|---|---|---|"]
        lines += [
            f"| {row['name']} | {row['flop_ratio']:.2f} | {row['flops'] / 1e12:.4g} |" for row in group["contenders"]
        ]
        return "\n".join(lines) + "\n"
    lines = [f"### {group['name']}", "", "| | time, relative | median | peak memory, relative | MB | |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in group["contenders"]:
        cells = [row["name"], f"{row['time_ratio']:.2f}", format_seconds(row["median_seconds"])]
        has_memory = "peak_bytes" in row
        cells += [f"{row['memory_ratio']:.2f}", f"{row['peak_bytes'] / 1e6:.1f}"] if has_memory else ["", ""]
        lines.append(f"| {' | '.join([*cells, format_facts(row)])} |")
    lines += ["", *map(format_reach, group["reaches"])] if group["reaches"] else []
    return "\n".join(lines) + "\n"


def format_reach(reach: dict[str, Any]) -> str:
    limit = f"at least {reach['at_least']}" if reach["at_most"] is None else f"at most {reach['at_most']:.3g}"
    of = "" if reach["to"] is None else f" in parts of {reach['to']}"
    state = "reached" if reach["reached"] else "MISSED"
    return f"- {state}: {reach['contender']}, {reach['fact']}{of}: {reach['value']:.3g}, {limit}"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def format_facts(row: dict[str, Any]) -> str:
    facts = [row["note"]] if row["note"] else []
    if "difference" in row:
        facts.append(f"differs by {row['difference']:.0e}" if row["difference"] else "equal")
    if row.get("wrong_frames"):
        facts.append(f"WRONG: {row['wrong_frames']} of {row['fetched_frames']} are other frames")
    elif "wrong_frames" in row:
        facts.append(f"right frames, at most {row['grey_levels']:.0f} grey levels apart")
    if "episodes_per_second" in row:
        facts.append(f"{row['episodes_per_second']:.3g} episodes/s")
    if "data_wait_share" in row:
        facts.append(f"{row['data_wait_share']:.1%} of the time waiting for data")
    if row.get("replayed") is False:
        facts.append("NOT REPLAYED")
    if "memory_gib" in row:
        facts.append(f"{row['memory_gib']:.2f} GiB")
    if "warm_up_seconds" in row:
        facts.append(f"first three steps {format_seconds(row['warm_up_seconds'])}")
    if "kernel_seconds" in row:
        facts.append(f"kernels {format_seconds(row['kernel_seconds'])}, {row['launches']:.0f} launches")
    if "flops_per_second" in row:
        facts.append(f"{row['flops_per_second'] / 1e12:.3g} TFLOP/s")
    if "ceiling_share" in row:
        facts.append(f"{row['ceiling_share']:.1%} of the ceiling")
    return "; ".join(facts)


def run_benchmark(arguments: BenchmarkArguments) -> dict[str, Any]:
    result = {"environment": describe_environment(arguments), "parts": {}}
    print(format_environment(result["environment"]), flush=True)
    for part in arguments.only:
        groups, skipped = GROUPS[part](arguments)
        measured = []
        for group in groups:
            count = isinstance(group, Count)
            measured.append(measure_count(group) if count else measure_group(group, arguments))
            print(format_group(measured[-1]), flush=True)
        if skipped:
            print(f"Not measured: {'; '.join(skipped)}.\n", flush=True)
        result["parts"][part] = {"groups": measured, "skipped": skipped}
    return result


def main(arguments: BenchmarkArguments) -> None:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() if arguments.folder is None else nullcontext(arguments.folder) as folder:
        arguments = BenchmarkArguments(**{**vars(arguments), "folder": folder})
        if arguments.measure_memory is not None:
            groups = [one for part in arguments.only for one in GROUPS[part](arguments)[0] if isinstance(one, Group)]
            print(measure_memory(arguments.measure_memory, groups, arguments.device))
            return
        result = run_benchmark(arguments)
    if arguments.plot is not None:
        plot_growth(result["parts"]["growth"]["groups"], arguments.plot)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*parse_arguments((BenchmarkArguments,)))
