"""Clips that are encoded once: the same answers wherever they are kept, and none that is stale."""

import errno
import os
import shutil

import psutil
import pytest
import torch
from accelerate import Accelerator
from datasets import concatenate_datasets
from transformers import CLIPVisionConfig, ResNetConfig

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor, VideoDecodeError
from dmgal_hf.data import EpisodeVideos, KeptClips, encode_clips, kept_clips, load_motion_shapes, sample_episodes
from dmgal_hf.data.kept_clips import video_digest
from dmgal_hf.training import evaluate_episodes

PROCESSOR = DmgalVideoProcessor(size=36, crop_size=32)
CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8}  # fmt: skip


def make_model(paradigm="ft", seed=0):
    torch.manual_seed(seed)
    if paradigm == "ft":
        backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        model = DmgalModel(DmgalConfig(backbone_config=backbone, motion_reduction=4))
    else:
        config = DmgalConfig(
            backbone_config=CLIPVisionConfig(**CLIP), paradigm="adapter", adapter_config={"reduction": 2}
        )
        model = DmgalModel(config)
    for name, parameter in model.named_parameters():
        if ".up." in name or "gamma" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    load_motion_shapes(clips_per_class=3, cache_dir=folder)
    return folder


@pytest.fixture
def videos(original, tmp_path):
    """Three clips of three classes, in a folder of the test's own."""
    shutil.copytree(original, tmp_path / "videos")
    return load_motion_shapes(clips_per_class=3, cache_dir=tmp_path / "videos")["test"].select(range(9))


@pytest.fixture
def encoded(monkeypatch):
    """Counts the clips that models encode."""
    counts, encode = [], DmgalModel.encode_clips
    monkeypatch.setattr(DmgalModel, "encode_clips", lambda self, x: counts.append(len(x)) or encode(self, x))
    return lambda: [sum(counts), counts.clear()][0]


def evaluate_plainly(model, videos, episodes):
    """Logits of every episode as the model's forward gives them."""
    data = EpisodeVideos(videos, episodes, PROCESSOR)
    for item in (data[number] for number in range(len(data))):
        with torch.no_grad():
            yield model(
                support_pixel_values=PROCESSOR.normalize(item["support_pixel_values"])[None],
                support_labels=item["support_labels"][None],
                query_pixel_values=PROCESSOR.normalize(item["query_pixel_values"])[None],
            ).logits


@pytest.mark.slow
@pytest.mark.parametrize("paradigm", ["ft", "adapter"])
def test_wherever_clips_are_kept_the_logits_are_those_of_the_plain_way(videos, tmp_path, encoded, paradigm):
    model = make_model(paradigm)
    episodes = sample_episodes(videos["label"], 3, 1, 2, num_episodes=4, seed=1)
    expected = list(evaluate_plainly(model, videos, episodes))
    mapped = tmp_path / "clips.safetensors"
    in_memory = encode_clips(model, PROCESSOR, videos)
    assert encoded() == len(videos) == len(in_memory)
    in_memory.save(mapped)
    kinds = {
        "memory": in_memory,
        "workers": encode_clips(model, PROCESSOR, videos["video"][:], num_workers=1),
        "saved": KeptClips.load(mapped),
        "files": encode_clips(model, PROCESSOR, videos, kept_clips_gb=0),
        "files of a folder": encode_clips(model, PROCESSOR, videos, kept_clips_gb=0, kept_clips=tmp_path / "kept"),
        "read into memory": encode_clips(model, PROCESSOR, videos, kept_clips=tmp_path / "kept"),
    }
    assert encoded() == 3 * len(videos)
    for kept in kinds.values():
        for episode, logits in zip(episodes, expected):
            found = model.score_clips(
                kept[[episode["support"]]], torch.tensor([episode["support_labels"]]), kept[[episode["query"]]]
            )
            torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_evaluation_encodes_what_the_list_names_once(videos, encoded, tmp_path):
    model = make_model()
    few = sample_episodes(videos["label"], 3, 1, 1, num_episodes=2, seed=2)
    evaluate_episodes(model, PROCESSOR, videos, few, Accelerator())
    assert encoded() == len({row for part in ("support", "query") for rows in few[part] for row in rows})
    ragged = concatenate_datasets([few, sample_episodes(videos["label"], 3, 2, 1, 30, seed=3)])
    metrics = evaluate_episodes(model, PROCESSOR, videos, ragged, Accelerator(), kept_clips_gb=0)
    assert encoded() == len(videos)
    kept = encode_clips(model, PROCESSOR, videos)
    encoded()
    assert evaluate_episodes(model, PROCESSOR, videos, ragged, Accelerator(), kept=kept) == metrics
    assert encoded() == 0 and metrics["num_episodes"] == 32


def test_kept_clips_that_do_not_fit_are_refused(videos, tmp_path):
    model, episodes = make_model(), sample_episodes(videos["label"], 3, 1, 1, num_episodes=9)

    def evaluate(kept, processor=PROCESSOR, model=model):
        return evaluate_episodes(model, processor, videos, episodes, Accelerator(), kept=kept)

    kept = encode_clips(model, PROCESSOR, videos)
    with pytest.raises(ValueError, match="made with other weights, another config, processor"):
        evaluate(kept, model=make_model(seed=1))
    with pytest.raises(ValueError, match="made with other weights, another config, processor"):
        evaluate(kept, DmgalVideoProcessor(size=36, crop_size=32, image_mean=0.5))
    with pytest.raises(ValueError, match=r"name \d+ rows that are not among the kept clips, as 2"):
        evaluate(encode_clips(model, PROCESSOR, videos, rows=[0, 1]))
    with pytest.raises(IndexError, match="row 99 is not among the 9 clips"):
        kept[[0, 99]]
    paths = [video["path"] for video in videos["video"]]
    shutil.copy(paths[4], paths[3])
    with pytest.raises(ValueError, match=r"1 videos are not those .* of row 3"):
        evaluate(kept)
    unidentified = encode_clips(model, PROCESSOR, videos, identify=False)
    with pytest.raises(ValueError, match="identify=True"):
        unidentified.save(tmp_path / "clips.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"other\.safetensors is damaged"):
        KeptClips.load(tmp_path / "other.safetensors")


@pytest.mark.slow
def test_a_folder_of_kept_clips_serves_the_next_call_and_nothing_stale(videos, tmp_path, encoded):
    model, folder = make_model(), tmp_path / "kept"
    paths = [video["path"] for video in videos["video"]]

    def encode(model=model, processor=PROCESSOR, rows=None):
        encode_clips(model, processor, videos, rows, kept_clips=folder)
        return encoded()

    assert [encode(rows=[1, 2]), encode(), encode()] == [2, 7, 0]
    shutil.copy(paths[4], paths[3])  # now they have one content
    assert encode() == 0
    with open(paths[3], "ab") as file:
        file.write(b"\0" * 8)
    assert encode() == 1
    assert encode(make_model(seed=1)) == 9
    assert encode(processor=DmgalVideoProcessor(size=36, crop_size=32, image_mean=0.5)) == 9
    assert not list(folder.rglob(".*"))
    damaged = min(folder.glob("*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.safetensors is damaged .* delete it"):
        encode_clips(model, PROCESSOR, videos, kept_clips=folder)
        encode_clips(make_model(seed=1), PROCESSOR, videos, kept_clips=folder)
        encode_clips(model, DmgalVideoProcessor(size=36, crop_size=32, image_mean=0.5), videos, kept_clips=folder)


def test_a_folder_that_cannot_be_written_or_is_full(videos, tmp_path, monkeypatch, encoded):
    model, folder = make_model(), tmp_path / "kept"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"kept_clips=.*file.* cannot be written .*: give another folder"):
        encode_clips(model, PROCESSOR, videos, kept_clips=tmp_path / "file")
    assert encoded() == 0
    monkeypatch.setattr(kept_clips.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(OSError, match=r"has room for 0\.0 GB, and the clips to be kept there take"):
        encode_clips(model, PROCESSOR, videos, kept_clips=folder)
    monkeypatch.undo()
    save, written = kept_clips.save_file, []

    def save_five(*args, **kwargs):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(save(*args, **kwargs))

    monkeypatch.setattr(kept_clips, "save_file", save_five)
    with pytest.raises(OSError, match=r"No space left on device\); what was written before is whole and is kept"):
        encode_clips(model, PROCESSOR, videos, kept_clips=folder)
    monkeypatch.setattr(kept_clips, "save_file", save)
    assert len(list(folder.glob("*/*"))) == 5
    counts, encode = [], DmgalModel.encode_clips
    monkeypatch.setattr(DmgalModel, "encode_clips", lambda self, x: counts.append(len(x)) or encode(self, x))
    encode_clips(model, PROCESSOR, videos, kept_clips=folder)
    assert sum(counts) == len(videos) - 5


def test_memory_decides_and_files_go_with_the_clips(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_clips.constants, "HF_HOME", str(tmp_path))
    model = make_model()
    kept = encode_clips(model, PROCESSOR, videos)
    assert not (tmp_path / "dmgal_hf").exists()
    kept = encode_clips(model, PROCESSOR, videos, kept_clips_gb=1e-6)
    assert len(list((tmp_path / "dmgal_hf").glob("kept_clips_*/*.safetensors"))) == len(kept)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(kept_clips.psutil, "virtual_memory", lambda: free)
    other = encode_clips(model, PROCESSOR, videos)
    assert len(list((tmp_path / "dmgal_hf").glob("kept_clips_*"))) == 2
    del kept, other
    assert not list((tmp_path / "dmgal_hf").iterdir())


def test_a_broken_clip_or_a_row_that_is_not_there(videos):
    model, episodes = make_model(), sample_episodes(videos["label"], 3, 1, 1, num_episodes=9)
    short = videos.select(range(8))
    with pytest.raises(ValueError, match=r"drawn from another dataset|is out of range: the dataset has 8 videos"):
        evaluate_episodes(model, PROCESSOR, short, episodes, Accelerator())
    with pytest.raises(ValueError, match="rows 7 to 12 of 9 videos were asked for"):
        encode_clips(model, PROCESSOR, videos, rows=[7, 12])
    path = videos["video"][5]["path"]
    with open(path, "r+b") as file:
        file.truncate(400)
    scored = []
    model.score_clips = lambda *args: scored.append(args)
    with pytest.raises(VideoDecodeError, match=os.path.basename(path)):
        evaluate_episodes(model, PROCESSOR, videos, episodes, Accelerator(), num_workers=1)
    assert not scored


def test_clips_of_different_sizes(videos):
    with pytest.raises(ValueError, match=r"different sizes \(\(32, 32\) and .*set do_center_crop=True"):
        frames = [torch.zeros(8, 3, 32, 32), torch.zeros(8, 3, 32, 40)]
        kept_clips._stack(frames)


def test_what_tells_that_a_video_has_changed(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.jpg").write_bytes(b"one")
    before = video_digest(str(tmp_path / "frames"))
    assert video_digest({"path": str(tmp_path / "frames"), "bytes": None}) == before
    (tmp_path / "frames" / "2.jpg").write_bytes(b"two")
    assert video_digest(str(tmp_path / "frames")) != before
    shard = tmp_path / "shard.arrow"
    shard.write_bytes(b"frames")
    rows = video_digest(f"{shard}#0"), video_digest(f"{shard}#1")
    assert rows[0] != rows[1] and video_digest(f"{shard}#0") == rows[0]
    shard.write_bytes(b"other frames")
    assert video_digest(f"{shard}#0") != rows[0]
    assert video_digest(b"video") == video_digest({"path": "a.mp4", "bytes": b"video"}) != video_digest(b"other")
    assert video_digest("http://localhost/a.mp4") != video_digest("http://localhost/b.mp4")
