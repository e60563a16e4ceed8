"""Converts checkpoints of the DMGAL authors' code to DmgalModel, and back with --to_official.

python scripts/convert_checkpoint.py --checkpoint FILE.pt --output DIR
python scripts/convert_checkpoint.py --checkpoint DIR --output FILE.pt --to_official
"""

from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from dmgal_hf import DmgalModel, DmgalVideoProcessor
from dmgal_hf.hub.conversion import convert_official_checkpoint, official_state_dict
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class ConvertArguments:
    """What is converted."""

    checkpoint: str = HfArg(help="The authors' file; with --to_official a folder or id of ours.")
    output: str = HfArg(help="Folder to write; with --to_official the file.")
    to_official: bool = HfArg(default=False, help="Write a file for the authors' code.")


if __name__ == "__main__":
    (arguments,) = parse_arguments((ConvertArguments,))
    if arguments.to_official:
        model = DmgalModel.from_pretrained(arguments.checkpoint)
        torch.save({"model_state_dict": official_state_dict(model)}, arguments.output)
    else:
        model = convert_official_checkpoint(arguments.checkpoint)
        model.save_pretrained(arguments.output)
        DmgalVideoProcessor(num_frames=model.config.num_frames).save_pretrained(arguments.output)
    print(f"wrote {arguments.output}")
