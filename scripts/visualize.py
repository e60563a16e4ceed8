"""Draws what a model looks at: `python scripts/visualize.py --model ID --support DIR --query FILE --output DIR`.

--support is a folder with one folder of clips a class. Writes episode.png, for a model with S-MGA self_attention.png
and motion_association.png, and for one with C-MGA cross_attention.png.
"""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from transformers import pipeline
from transformers.hf_argparser import HfArg

from dmgal_hf.data.benchmarks import list_class_clips
from dmgal_hf.inference.pipeline import TASK
from dmgal_hf.inference.visualization import (
    plot_cross_attention,
    plot_episode,
    plot_motion_association,
    plot_self_attention,
)
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class VisualizeArguments:
    """What is drawn, and where."""

    model: str = HfArg(help="Model id or folder.")
    support: str = HfArg(help="Folder of class folders.")
    query: str = HfArg(help="A video.")
    output: str = HfArg(help="Folder for the pictures.")
    frame: int | None = HfArg(default=None, help="Frame of the attention; by default one in the middle.")
    patch: int | None = HfArg(
        default=None, help="Patch of the query in cross_attention.png; by default one in the middle."
    )
    pooled_grid: int | None = HfArg(
        default=None, help="Average the patches of motion_association.png over such a grid, e.g. 3."
    )
    dpi: int = HfArg(default=120, help="Pixels an inch.")
    device: str = HfArg(default="cpu", help="cpu, cuda, cuda:1, mps, ...")


def main(arguments: VisualizeArguments):
    examples = list_class_clips(arguments.support)
    classifier = pipeline(TASK, model=arguments.model, device=arguments.device)
    model, processor = classifier.model, classifier.image_processor
    episode = processor(support=examples, query=arguments.query)
    query = episode["query_pixel_values"][0, 0]
    frame = (len(query) - 1) // 2 if arguments.frame is None else arguments.frame

    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    def write(name: str, figure: Figure):
        figure.savefig(output / f"{name}.png", dpi=arguments.dpi)
        print(f"wrote {output / name}.png")

    write("episode", plot_episode(model, processor, episode))
    if model.self_attention is not None:
        write("self_attention", plot_self_attention(model, processor, arguments.query))
    if model.cross_attention is not None:
        attention = plot_cross_attention(model, processor, episode, frame=frame, patch=arguments.patch)
        write("cross_attention", attention)
    if model.self_attention is not None:
        association = plot_motion_association(model, query, frame, processor, pooled_grid=arguments.pooled_grid)
        write("motion_association", association)
    if model.self_attention is None or model.cross_attention is None:
        print(f"{arguments.model} lacks S-MGA or C-MGA of its own (adapters return no attention): no more to draw")


if __name__ == "__main__":
    main(*parse_arguments((VisualizeArguments,)))
