"""Growth: time and peak memory of C-MGA against way, shot, queries, frames and resolution."""

import functools
from pathlib import Path
from typing import Any

import torch

from .head import Head, PlainHead, call_head
from .measuring import OURS, BenchmarkArguments, Contender, Group, Run

# One axis grows from an episode of 5 ways, 1 shot, 5 queries, 8 frames and 224 px; the features are ResNet-50's.
START = {"way": 5, "shot": 1, "queries": 5, "frames": 8, "pixels": 224}
AXES = {"way": (5, 20), "shot": (1, 5, 10), "queries": (5, 20, 80), "frames": (8, 32), "pixels": (224, 384)}
SMALL_AXES = {"way": (2, 4), "queries": (1, 4)}
LARGEST = {"way": 20, "shot": 10, "queries": 20, "frames": 8, "pixels": 384}
PLAIN = "plain PyTorch"


def prepare_growth(arguments: BenchmarkArguments, kind: str, episode: dict[str, int], training: bool) -> Run:
    channels = 32 if arguments.small else 2048
    torch.manual_seed(0)
    head = Head(channels)
    module = (head if kind == OURS else PlainHead(head)).to(arguments.device)
    side = episode["pixels"] // 32
    shape = (episode["frames"], channels, side, side)
    videos = (episode["way"] * episode["shot"], episode["queries"])
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(count, *shape, generator=generator).relu_().to(arguments.device) for count in videos]
    return call_head(module, "cross", maps, training, arguments.device)


def growth_groups(arguments: BenchmarkArguments) -> tuple[list[Group], list[str]]:
    groups = []
    for step in ("forward", "forward and backward"):
        prepare = functools.partial(prepare_growth, arguments, training=step != "forward")
        for axis, values in (SMALL_AXES if arguments.small else AXES).items():
            contenders = []
            for value in values:
                episode = START | {axis: value}
                ours = f"{axis} {value}, {OURS}"
                contenders.append(Contender(ours, functools.partial(prepare, OURS, episode)))
                plain = functools.partial(prepare, PLAIN, episode)
                contenders.append(Contender(f"{axis} {value}, {PLAIN}", plain, same_as=ours))
            groups.append(Group(f"C-MGA against {axis}: {step}", contenders))
    if not arguments.small:
        episodes = {"the first episode": START, "20-way 10-shot, 20 queries, 384 px": LARGEST}
        contenders = [
            Contender(name, functools.partial(prepare_growth, arguments, OURS, episode, False))
            for name, episode in episodes.items()
        ]
        groups.append(Group("C-MGA, the largest episode: forward", contenders))
    return groups, []


def plot_growth(groups: list[dict[str, Any]], path: str | Path) -> None:
    """
    Draws what [`growth_groups`] measured: time and memory relative to the smallest episode of ours, an axis a column.

    Raises:
        ModuleNotFoundError: matplotlib is missing (`pip install dmgal-hf[viz]`).
    """
    from matplotlib.figure import Figure

    groups = [group for group in groups if group["name"].startswith("C-MGA against ")]
    steps = list(dict.fromkeys(group["name"].split(": ")[1] for group in groups))
    columns = len(groups) // len(steps)
    figure = Figure(figsize=(2.6 * columns, 2.4 * 2 * len(steps)), layout="constrained")
    axes = figure.subplots(2 * len(steps), columns, squeeze=False)
    for number, group in enumerate(groups):
        axis, step = group["name"].removeprefix("C-MGA against ").split(": ")
        row, column = divmod(number, columns)
        for offset, (measure, label) in enumerate((("time_ratio", "time"), ("memory_ratio", "peak memory"))):
            panel = axes[2 * row + offset, column]
            for kind, style in ((OURS, "o-"), (PLAIN, "s--")):
                rows = [one for one in group["contenders"] if one["name"].endswith(kind) and measure in one]
                sizes = [int(one["name"].removeprefix(axis).split(",")[0]) for one in rows]
                panel.plot(sizes, [one[measure] for one in rows], style, label=kind)
            panel.set_xlabel(axis)
            panel.set_title(f"{label}, {step}", fontsize=8)
            panel.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7)
    axes[0, 0].set_ylabel("relative to the smallest")
    figure.savefig(path, dpi=120)
