"""Trains DMGAL: `accelerate launch scripts/train.py [--config FILE.yaml] [--field value ...]`.

Without --config it runs the quick start, scripts/configs/motion_shapes_ft.yaml.

SIGTERM and Ctrl-C, sent to a training process, to the whole group or to the launcher, end the run with a state that
`--resume` goes on from. Its exit status is then 143 or 130; that of `accelerate launch`, 1.
"""

from pathlib import Path

from accelerate import PartialState

from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments
from dmgal_hf.training.training import describe_result, train

if __name__ == "__main__":
    arguments = parse_arguments(
        (DataArguments, ModelArguments, TrainArguments),
        default_config=Path(__file__).parent / "configs" / "motion_shapes_ft.yaml",
    )
    train(*arguments)
    describe_result(*arguments)
    PartialState().destroy_process_group()
