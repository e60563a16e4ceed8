"""Trains one variant after the other with the same seed and budget, and prints their novel-class accuracy as markdown.

python scripts/ablate.py --config scripts/configs/motion_shapes_ft.yaml --output_dir runs/ablation [--only NAME ...]

Variants that are finished under output_dir are not trained again; one that was interrupted goes on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from dmgal_hf.arguments import DataArguments, ModelArguments, TrainArguments, parse_arguments
from dmgal_hf.checkpoints import list_checkpoints
from dmgal_hf.training import train

# What differs from the config, by the name of the variant.
FT_VARIANTS = {
    "full": {},
    "no S-MGA": {"self_motion_attention": False},
    "no mixer": {"mixer": False},
    "no C-MGA": {"cross_motion_attention": False},
    "mixer alone": {"self_motion_attention": False, "cross_motion_attention": False},
    "none of the three": {"motion_attention": False},
    "forward motion alone": {"motion_directions": "forward"},
    "backward motion alone": {"motion_directions": "backward"},
    "one scale": {"motion_scales": []},
    "OTAM": {"alignment": "otam"},
    "mean prototypes": {"alignment": "mean"},
}
ADAPTER_VARIANTS = {
    "both": {},
    "Smga alone": {"cmga_layers": []},
    "Cmga alone": {"smga_layers": []},
    "values without attention": {"attention": False},
    "forward motion alone": {"directions": "forward"},
    "backward motion alone": {"directions": "backward"},
}


@dataclass
class AblationArguments:
    """Which variants."""

    only: list[str] | None = field(default=None, metadata={"help": "Names of variants; by default all."})


def main(data: DataArguments, model: ModelArguments, arguments: TrainArguments, ablation: AblationArguments):
    adapter = model.paradigm == "adapter"
    variants = ADAPTER_VARIANTS if adapter else FT_VARIANTS
    names = list(variants) if ablation.only is None else ablation.only
    unknown = [name for name in names if name not in variants]
    if unknown:
        raise ValueError(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}.")
    results = {}
    for name in names:
        changes = {"adapter_config": {**model.adapter_config, **variants[name]}} if adapter else variants[name]
        output_dir = Path(arguments.output_dir, name.replace(" ", "_"))
        finished = output_dir / "metrics.json"
        if not finished.exists():
            resume = bool(list_checkpoints(output_dir))
            train(data, replace(model, **changes), replace(arguments, output_dir=str(output_dir), resume=resume))
        results[name] = json.loads(finished.read_text())["test"]
    print("| variant | accuracy, % | episodes |\n|---|---|---|")
    for name, test in results.items():
        print(f"| {name} | {test['accuracy']:.1f} ± {test['confidence_interval']:.1f} | {test['num_episodes']} |")


if __name__ == "__main__":
    main(*parse_arguments((DataArguments, ModelArguments, TrainArguments, AblationArguments)))
