"""Reads every video of a dataset once: `python scripts/prepare_data.py --dataset hmdb51 --videos DIR --output DIR`.

Writes an index and a report of broken files, and with --frames jpeg or raw a cache of the frames; train with
--prepared DIR then. Run it again to go on after an interruption, or after videos were added or replaced.
"""

from dmgal_hf.data.preparation import PrepareArguments, describe_report, describe_source, prepare_videos
from dmgal_hf.training.arguments import DataArguments, parse_arguments
from dmgal_hf.training.loading import load_videos

if __name__ == "__main__":
    data, arguments = parse_arguments((DataArguments, PrepareArguments))
    if data.prepared is not None:
        raise ValueError(f"prepared={data.prepared} is made already: name the dataset and videos to prepare.")
    print(describe_report(prepare_videos(load_videos(data), arguments, describe_source(data))))
