"""Evaluates a checkpoint on few-shot episodes: `accelerate launch scripts/evaluate.py --model DIR_OR_ID [...]`.

Prints the accuracy with its 95 % confidence interval for every number of shots, and writes all of it with --json.
"""

from dmgal_hf.training.arguments import DataArguments, EvaluateArguments, parse_arguments
from dmgal_hf.training.evaluation import evaluate

if __name__ == "__main__":
    evaluate(*parse_arguments((DataArguments, EvaluateArguments)))
