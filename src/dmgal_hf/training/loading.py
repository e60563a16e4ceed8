"""The dataset that a command line names."""

from datasets import Dataset, DatasetDict

from ..data.benchmarks import load_benchmark, load_video_folder
from ..data.motion_shapes import load_motion_shapes
from ..data.preparation import load_prepared
from ..data.puppets import load_puppets
from ..data.splits import BENCHMARKS
from .arguments import DataArguments

MADE_UP = {"motion_shapes": load_motion_shapes, "puppets": load_puppets}


def load_videos(arguments: DataArguments, validation: bool = True) -> DatasetDict:
    """
    The dataset that `arguments` name, with splits `train`, `validation` and `test` of disjoint classes; `validation`
    as in [`load_video_folder`].
    """
    if arguments.prepared is not None:
        return load_prepared(arguments.prepared, arguments.resize)
    if arguments.dataset in MADE_UP:
        return MADE_UP[arguments.dataset](arguments.preset, arguments.clips_per_class, cache_dir=arguments.cache_dir)
    if arguments.dataset != "folder" and arguments.dataset not in BENCHMARKS:
        known = f"{', '.join(MADE_UP)}, folder or one of {', '.join(BENCHMARKS)}"
        raise ValueError(f"dataset must be {known}, got {arguments.dataset!r}.")
    if arguments.videos is None:
        raise ValueError(f"dataset {arguments.dataset!r} needs videos: the folder or zip archive that holds them.")
    if arguments.dataset == "folder":
        return load_video_folder(arguments.videos, validation=validation)
    return load_benchmark(
        arguments.dataset, arguments.videos, arguments.splits, arguments.class_labels, arguments.allow_missing
    )


def num_classes(videos: Dataset) -> int:
    """Classes that have a video."""
    return len(videos.unique("label"))
