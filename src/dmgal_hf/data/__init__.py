"""
Videos, splits, episodes: everything is a `datasets.Dataset`. Also transforms, preparation, kept clips and made-up
videos, and the calls of training and inference that a GPU replays.
Imports `model` alone.
"""

from .benchmarks import load_benchmark, load_video_folder
from .episode_videos import EpisodeCollator, EpisodeVideos, collate_episodes, seed_from
from .episodes import EpisodeSource, check_episodes, episodes_id, load_episodes, sample_episodes
from .feeding import augment_ahead, pack_episodes
from .kept_clips import KeptClips, encode_clips
from .motion_shapes import load_motion_shapes
from .puppets import load_puppets
from .reading_workers import obey_main_process
from .splits import BENCHMARKS
from .transforms import ClipAugmentation

__all__ = [
    "BENCHMARKS",
    "ClipAugmentation",
    "EpisodeCollator",
    "EpisodeSource",
    "EpisodeVideos",
    "KeptClips",
    "augment_ahead",
    "check_episodes",
    "collate_episodes",
    "encode_clips",
    "episodes_id",
    "load_benchmark",
    "load_episodes",
    "load_motion_shapes",
    "load_puppets",
    "load_video_folder",
    "obey_main_process",
    "pack_episodes",
    "sample_episodes",
    "seed_from",
]
