"""
Training and evaluation: arguments, the data they name, runs with Accelerate, their states and batch statistics.
Imports `model`, `data` and `hub`, and never `inference`.
"""

from .arguments import DataArguments, EvaluateArguments, ModelArguments, TrainArguments, parse_arguments
from .evaluation import evaluate, evaluate_episodes
from .training import train

__all__ = [
    "DataArguments",
    "EvaluateArguments",
    "ModelArguments",
    "TrainArguments",
    "evaluate",
    "evaluate_episodes",
    "parse_arguments",
    "train",
]
