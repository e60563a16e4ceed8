"""Serves the demo page: `python scripts/demo/app.py --model ID`.

This folder is laid out as a Space of the Hub, where the variable DMGAL_MODEL names the model.
"""

import os
import signal
import sys
import tempfile
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from dmgal_hf.training.arguments import parse_arguments


@dataclass
class DemoArguments:
    """Which model, and where the page is served."""

    model: str | None = HfArg(
        default_factory=lambda: os.environ.get("DMGAL_MODEL"),
        help="Model id or folder; by default the environment variable DMGAL_MODEL.",
    )
    device: str = HfArg(default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    port: int | None = HfArg(default=None, help="Port of the page; by default the first free from 7860.")

    max_file_mb: int = HfArg(default=100, help="Megabytes of an uploaded clip, at most.")
    max_seconds: float = HfArg(default=60.0, help="Seconds of an uploaded clip, at most.")

    def __post_init__(self):
        if not self.model:
            raise ValueError(
                "no model: give --model ID_OR_FOLDER, or set DMGAL_MODEL (in a Space: Settings, Variables)"
            )


def serve(arguments: DemoArguments):
    """Serves the page until the process is told to end. All files of visitors go with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="dmgal_demo_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # Gradio asks for it when it is imported
        from dmgal_hf.inference.demo import build_demo

        page = build_demo(arguments.model, arguments.device, arguments.max_seconds)
        page.launch(server_port=arguments.port, max_file_size=f"{arguments.max_file_mb}mb")


if __name__ == "__main__":
    serve(*parse_arguments((DemoArguments,)))
