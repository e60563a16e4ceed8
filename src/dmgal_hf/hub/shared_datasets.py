"""Episode lists and made-up videos on the Hugging Face Hub, with dataset cards."""

import re

from datasets import Dataset, DatasetDict
from huggingface_hub import CommitInfo, DatasetCard, HfApi, hf_hub_download

from ..data.episodes import episodes_id
from ..data.motion_shapes import MOTION_SHAPES
from ..data.puppets import PUPPETS
from .upload import create_repo

_EPISODES_TEXT = """
# Episodes for few-shot evaluation

{number:,} episodes with the id `{id}`: two evaluations with the same id were made on the same rows. Each row names
videos by their row number in the dataset it was drawn for: `support` and `query`, with the classes of the episode in
`support_labels` and `query_labels`. The list holds no videos.

{videos}

```python
from dmgal_hf.data import load_episodes

episodes = load_episodes("{repo_id}", labels=videos["label"], split="{split}")
```

What it was drawn from:

```json
{origin}
```
"""

_MADE_UP_TEXT = """
# {title}

{what}
Splits have disjoint classes, for few-shot learning: base classes in `train`, novel ones in `test`. Made by dmgal_hf,
{origin}; nobody was filmed.

{splits}

Columns: `video` (an H.264 file), `label`, `video_id`. Loaded with `datasets.load_dataset("{repo_id}")`.

Limits: synthetic and simple. What is learned here need not help with real videos, and an accuracy reached here is not
to be compared with one on any other dataset.
"""

_MADE_UP = (
    (
        MOTION_SHAPES,
        "Short clips (two seconds, 112 x 112 pixels) of one shape on a background, whose classes differ by motion\n"
        "alone: a single frame says nothing about the class.",
    ),
    (
        PUPPETS,
        "Short clips (two seconds, 112 x 112 pixels) of jointed figures, whose classes differ by how the limbs move.\n"
        "Every action comes with its mirror image, its time reversal, or both, as classes of their own: they show\n"
        "the same poses in another order.",
    ),
)


def push_episodes(
    episodes: Dataset,
    repo_id: str,
    videos: str,
    split: str = "test",
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """
    Uploads an episode list with a dataset card, for others to evaluate on the very same episodes;
    [`load_episodes`](data.load_episodes) reads it back.

    Args:
        episodes (`datasets.Dataset`): as [`sample_episodes`] makes it.
        repo_id (`str`): "name" or "organisation/name".
        videos (`str`): one sentence on the videos whose rows are meant, for the card.
        split (`str`, *optional*, defaults to "test"): name of the split.
        private, revision, token: as [`push_to_hub`].

    Returns:
        `huggingface_hub.CommitInfo`: of the commit that completes the card.

    Raises:
        ValueError: the dataset is no episode list.
    """
    identifier = episodes_id(episodes)
    repo_id = create_repo(HfApi(token=token), repo_id, "dataset", private)
    text = _EPISODES_TEXT.format(
        number=len(episodes), id=identifier, videos=videos, repo_id=repo_id, split=split,
        origin=episodes.info.description or "not recorded",
    )  # fmt: skip
    episodes.push_to_hub(repo_id, split=split, private=private, revision=revision, token=token)
    return _push_dataset_card(repo_id, text, ["few-shot-learning", "episodes"], revision, token)


def push_made_up_videos(
    videos: DatasetDict, repo_id: str, private: bool = False, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """
    Uploads motion shapes or puppets, videos included, with a dataset card.

    Args:
        videos (`datasets.DatasetDict`): from [`load_motion_shapes`] or [`load_puppets`].
        repo_id, private, revision, token: as [`push_to_hub`].

    Returns:
        `huggingface_hub.CommitInfo`: of the commit that completes the card.

    Raises:
        ValueError: the classes are those of neither.
    """
    classes = videos["train"].features["label"].names
    name, what = next(((one.name, what) for one, what in _MADE_UP if list(one.splits) == classes), ("", ""))
    if not name:
        raise ValueError(
            f"these videos have the classes {', '.join(classes[:3])}, ...: neither those of motion shapes nor of "
            "puppets. Push other videos with their own `push_to_hub`."
        )
    repo_id = create_repo(HfApi(token=token), repo_id, "dataset", private)
    videos.push_to_hub(repo_id, private=private, revision=revision, token=token)
    made = re.search(r"/(\w+)-seed(\d+)-v(\d+)/", videos["train"][0]["video"]["path"] or "")
    origin = "preset {}, seed {}, generator version {}".format(*made.groups()) if made else "settings not recorded"
    splits = "\n".join(
        f"- `{split}`: {len(set(rows['label']))} classes, {len(rows)} clips" for split, rows in videos.items()
    )
    text = _MADE_UP_TEXT.format(title=name.capitalize(), what=what, origin=origin, splits=splits, repo_id=repo_id)
    return _push_dataset_card(repo_id, text, ["few-shot-learning", "action-recognition", "synthetic"], revision, token)


push_motion_shapes = push_made_up_videos  # its name before there were puppets


def _push_dataset_card(
    repo_id: str, text: str, tags: list[str], revision: str | None, token: str | None
) -> CommitInfo:
    """Completes the card that `datasets` has written, which lists features and files only."""
    path = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision, token=token)
    card = DatasetCard.load(path)
    card.data.license = "apache-2.0"
    card.data.tags = ["dmgal", *tags]
    card.data.task_categories = ["video-classification"]
    card.text = text
    return HfApi(token=token).upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id, repo_type="dataset",
        revision=revision, commit_message="Describe the dataset",
    )  # fmt: skip
