"""
What is uploaded and how it is described: model and dataset cards, uploads, and conversion of the authors' files.
Imports `model` and `data`, and neither `inference` nor `training`.
"""

from .cards import render_model_card, write_planned_cards
from .conversion import convert_official_checkpoint, official_state_dict
from .shared_datasets import push_episodes, push_made_up_videos, push_motion_shapes
from .upload import collect_files, push_to_hub

__all__ = [
    "collect_files",
    "convert_official_checkpoint",
    "official_state_dict",
    "push_episodes",
    "push_made_up_videos",
    "push_motion_shapes",
    "push_to_hub",
    "render_model_card",
    "write_planned_cards",
]
