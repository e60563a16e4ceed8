"""Measuring contenders side by side: time in turns, memory in processes of their own."""

import dataclasses
import functools
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers.hf_argparser import HfArg

NUM_FRAMES = 8
OURS = "dmgal_hf"
PARTS = ("head", "growth", "adapter", "support", "data", "train", "feed", "evaluate")
GPU_PARTS = ("head", "train", "support", "feed")  # in one call of a few minutes
GROUP_SECONDS = 10  # after which no further round of a group begins on a GPU: all parts are to take 6 minutes
SCRIPT = Path(__file__).resolve().parents[1] / "benchmark.py"
PEAK_RESET = Path("/proc/self/clear_refs")  # of Linux: what "5" is written to counts the peak of memory anew


@dataclass(frozen=True)
class BenchmarkArguments:
    """What is measured, and how often."""

    only: list[str] | None = HfArg(
        default=None,
        help=f"{', '.join(PARTS)}: one or several; by default all, on a GPU {', '.join(GPU_PARTS)}.",
    )
    device: str = HfArg(default="cpu", help="cpu, or cuda.")
    repeats: int = HfArg(default=5, help="Rounds that are timed, after one that is not.")
    threads: int = HfArg(default_factory=lambda: os.cpu_count() or 1, help="Threads of torch.")
    small: bool = HfArg(default=False, help="Tiny shapes, to try the script; the figures mean nothing.")
    memory: bool = HfArg(default=True, help="Measure peak memory (Linux), each in a process of its own.")
    reference: str | None = HfArg(default=None, help="Checkout of ReverseSuzhou/DMGAL (head, train).")
    json: str | None = HfArg(default=None, help="Write everything measured into this JSON file.")
    plot: str | None = HfArg(default=None, help="Draw the curves of growth into this PNG file.")
    folder: str | None = HfArg(default=None, help="Keep the made videos and checkpoints here; by default none stays.")
    measure_memory: str | None = HfArg(
        default=None, help="GROUP|CONTENDER: print the bytes that its first call adds, nothing else."
    )

    def __post_init__(self):
        if self.only is None:
            object.__setattr__(self, "only", list(PARTS if torch.device(self.device).type == "cpu" else GPU_PARTS))
        unknown = [part for part in self.only if part not in PARTS]
        if unknown or not self.only:
            raise ValueError(f"only must name parts out of {', '.join(PARTS)}, got {unknown or self.only}.")
        if self.plot is not None and "growth" not in self.only:
            raise ValueError(f"plot draws the part growth, and only is {', '.join(self.only)}: add growth.")
        for name in ("repeats", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if torch.device(self.device).type not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device!r}, but torch sees no CUDA device: use cpu.")


@dataclass(frozen=True)
class Run:
    """
    What is timed, and the module whose dropout is off while outputs are compared. `describe` makes further facts of
    the median of the seconds; `close` is called at the end. Floating-point operations are counted unless they are
    given: those of a CUDA graph cannot be seen. A run that is not `local` does its work in other processes, and tells
    itself what it took. Its call does the same `times` times, or that part of it, and seconds are those of once.
    """

    call: Callable[[], Any]
    module: nn.Module | None = None
    note: str = ""
    describe: Callable[[float], dict[str, Any]] = lambda seconds: {}
    close: Callable[[], None] = lambda: None
    times: float = 1
    flops: int | None = None
    local: bool = True


@dataclass(frozen=True)
class Contender:
    """`prepare` is not timed. The output must be that of the contender `same_as`, where one is named."""

    name: str
    prepare: Callable[[], Run]
    same_as: str | None = None


def relative_difference(output: Any, expected: Any) -> dict[str, Any]:
    """
    Norm of the difference of two tuples of tensors, relative to that of the expected one; the largest of the tuple.

    Not the largest difference: rounding tips a few of millions of ReLUs over, and their gradients are another then.
    """
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(output, expected, strict=True)]
    return {"difference": max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)}


@dataclass(frozen=True)
class Reach:
    """A figure that a contender is to reach: a fact of its row, or its ratio to that of the contender `to`."""

    contender: str
    fact: str
    to: str | None = None
    at_most: float | None = None
    at_least: float | None = None

    def measure(self, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        value = rows[self.contender][self.fact]
        if self.to is not None and self.fact == "seconds":  # round by round, as the machine is not always as fast
            value = statistics.median(mine / other for mine, other in zip(value, rows[self.to][self.fact]))
        elif self.to is not None:
            value /= rows[self.to][self.fact]
        reached = value >= self.at_least if self.at_most is None else value <= self.at_most
        return {**dataclasses.asdict(self), "value": value, "reached": reached}


@dataclass(frozen=True)
class Group:
    """Contenders to be measured side by side; ratios are to the first."""

    name: str
    contenders: list[Contender]
    memory: bool = True
    compare: Callable[[Any, Any], dict[str, Any]] = relative_difference
    most_repeats: int | None = None
    reaches: tuple[Reach, ...] = ()


@dataclass(frozen=True)
class Count:
    """Floating-point operations of contenders that are counted and not run; ratios are to the first."""

    name: str
    flops: dict[str, Callable[[], int]]


# Measuring


def measure_count(count: Count) -> dict[str, Any]:
    rows = [{"name": name, "flops": flops()} for name, flops in count.flops.items()]
    for row in rows:
        row["flop_ratio"] = row["flops"] / rows[0]["flops"]
    return {"name": count.name, "baseline": rows[0]["name"], "contenders": rows}


def measure_group(group: Group, arguments: BenchmarkArguments) -> dict[str, Any]:
    runs = {contender.name: contender.prepare() for contender in group.contenders}
    outputs = {}
    for name, run in runs.items():  # also the round that is not timed
        with without_dropout(run.module):
            outputs[name] = run.call()
    facts = {
        one.name: group.compare(outputs[one.name], outputs[one.same_as]) if one.same_as else {}
        for one in group.contenders
    }
    del outputs
    repeats = min(arguments.repeats, group.most_repeats or arguments.repeats)
    seconds = time_interleaved({name: run.call for name, run in runs.items()}, repeats, arguments.device)
    seconds = {name: [one / runs[name].times for one in seconds[name]] for name in runs}
    first = group.contenders[0].name
    rows = []
    for name, run in runs.items():
        ratio = statistics.median(mine / base for mine, base in zip(seconds[name], seconds[first]))
        median = statistics.median(seconds[name])
        row = {"name": name, "median_seconds": median, "seconds": seconds[name], "time_ratio": ratio}
        row |= {**facts[name], **run.describe(median), "note": run.note}
        if on_gpu(arguments.device):
            row |= measure_on_gpu(run, arguments.device) if run.local else {}
        if row.get("flops"):
            row["flops_per_second"] = row["flops"] / median
        if row.get("flops") and on_gpu(arguments.device):
            ceiling = measure_ceilings(arguments.device)["bf16_flops_per_second"]
            row["ceiling_share"] = row["flops_per_second"] / ceiling
        rows.append(row)
        run.close()
    del run, runs
    gc.collect()
    if group.memory and arguments.memory and not on_gpu(arguments.device) and PEAK_RESET.exists():
        for row in rows:
            row["peak_bytes"] = memory_of_its_own_process(f"{group.name}|{row['name']}", arguments)
        for row in rows:
            row["memory_ratio"] = row["peak_bytes"] / max(rows[0]["peak_bytes"], 1)
    reaches = [reach.measure({row["name"]: row for row in rows}) for reach in group.reaches]
    return {"name": group.name, "baseline": first, "contenders": rows, "reaches": reaches}


def on_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def measure_on_gpu(run: Run, device: str) -> dict[str, Any]:
    """What one call takes of the device: its kernels, operations and memory."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    facts = profile_kernels(run.call)
    facts["memory_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30  # a graph's is its own
    facts["flops"] = run.flops if run.flops is not None else count_flops(run.call)
    return facts


def profile_kernels(call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds that the GPU was at work in one call, and how many kernels and copies it ran."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spans = [(e.time_range.start, e.time_range.end) for e in events if not getattr(e, "is_user_annotation", False)]
    return {"kernel_seconds": covered(spans) / 1e6, "launches": len(spans)}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, (start, end) each: what runs at the same time counts once."""
    length, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        length += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return length


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the products of one call, forward and backward; compiled code runs uncompiled."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@functools.cache
def measure_ceilings(device: str) -> dict[str, float]:
    """What the device does at best: bf16 products of 8192 x 8192 matrices, and copies (bytes read and written)."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "bf16_flops_per_second": 2 * 8192**3 / _median_on_gpu(lambda: left @ right),
        "copied_bytes_per_second": 2 * source.nbytes / _median_on_gpu(lambda: target.copy_(source)),
    }


def _median_on_gpu(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds[10:])


def as_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, which no host is waited for in; it returns the same tensors each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay():
        graph.replay()
        return output

    return replay


def time_interleaved(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    seconds = {name: [] for name in calls}
    names, began = list(calls), time.perf_counter()
    for round_number in range(repeats):
        if round_number > 0 and on_gpu(device) and time.perf_counter() - began > GROUP_SECONDS:
            break
        shift = round_number % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            gc.collect()
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: str) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


@contextmanager
def without_dropout(module: nn.Module | None) -> Iterator[None]:
    layers = [] if module is None else [layer for layer in module.modules() if isinstance(layer, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before):
            layer.p = p


def memory_of_its_own_process(case: str, arguments: BenchmarkArguments) -> int:
    command = [sys.executable, str(SCRIPT), "--measure_memory", case, "--device", arguments.device]
    command += ["--threads", str(arguments.threads), "--only", *arguments.only]
    command += ["--small"] if arguments.small else []
    for name in ("reference", "folder"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", getattr(arguments, name)]
    # With a fixed threshold glibc returns freed tensors at once; else what the preparation freed would hide the rest.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures the memory of {case!r} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def measure_memory(case: str, groups: list[Group], device: str) -> int:
    """Bytes that the first call of one contender adds at its peak; run it in a fresh process."""
    cases = {f"{group.name}|{contender.name}": contender for group in groups for contender in group.contenders}
    if case not in cases:
        raise ValueError(f"measure_memory must be one of {'; '.join(cases)}, got {case!r}.")
    call = cases[case].prepare().call
    gc.collect()
    PEAK_RESET.write_text("5")
    before = _peak_resident()
    call()
    return max(_peak_resident() - before, 0)


def _peak_resident() -> int:
    # Not getrusage: a new process starts with the peak of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
