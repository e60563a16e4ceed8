"""Draws what a model looks at: `python scripts/visualize.py --model ID --support DIR --query FILE --output DIR`.

--support is a folder with one folder of clips a class. Writes episode.png and, for a model that returns its attention,
motion_association.png, self_attention.png and cross_attention.png.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class VisualizeArguments:
    """What is drawn, and where."""

    model: str = field(metadata={"help": "Model id or folder."})
    support: str = field(metadata={"help": "Folder of class folders."})
    query: str = field(metadata={"help": "A video."})
    output: str = field(metadata={"help": "Folder for the pictures."})
    frame: int | None = field(default=None, metadata={"help": "Frame of the attention; by default one in the middle."})
    patch: int | None = field(
        default=None, metadata={"help": "Patch of the query in cross_attention.png; by default one in the middle."}
    )
    pooled_grid: int | None = field(
        default=None, metadata={"help": "Average the patches of motion_association.png over such a grid, e.g. 3."}
    )
    dpi: int = field(default=120, metadata={"help": "Pixels an inch."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, mps, ..."})


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, by name. Raises `FileNotFoundError` where there is nothing."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    if not entries:
        raise FileNotFoundError(f"{folder} is no folder with something in it: --support holds one folder a class")
    return entries
