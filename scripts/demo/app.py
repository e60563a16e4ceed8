"""Serves the demo page: `python scripts/demo/app.py --model ID`.

This folder is laid out as a Space of the Hub, where the variable DMGAL_MODEL names the model.
"""

import os
import sys
from dataclasses import dataclass, field

from dmgal_hf.inference.demo import build_demo
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class DemoArguments:
    """Which model, and where the page is served."""

    model: str | None = field(
        default_factory=lambda: os.environ.get("DMGAL_MODEL"),
        metadata={"help": "Model id or folder; by default the environment variable DMGAL_MODEL."},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, mps, ..."})
    port: int | None = field(default=None, metadata={"help": "Port of the page; by default the first free from 7860."})

    def __post_init__(self):
        if not self.model:
            raise ValueError(
                "no model: give --model ID_OR_FOLDER, or set DMGAL_MODEL (in a Space: Settings, Variables)"
            )


if __name__ == "__main__":
    (arguments,) = parse_arguments((DemoArguments,), sys.argv[1:])
    build_demo(arguments.model, arguments.device).launch(server_port=arguments.port)
