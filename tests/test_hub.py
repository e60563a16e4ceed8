"""Pushing and pulling over real HTTP, by unmodified clients in processes of their own; and what the cards say."""

import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from hub_server import TOKEN, LocalHub
from huggingface_hub import DatasetCard, HfApi, ModelCard, hf_hub_download
from transformers import AutoModel, AutoProcessor, ViTConfig

from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport, DmgalVideoProcessor
from dmgal_hf.data import episodes_id, load_episodes, load_motion_shapes, sample_episodes
from dmgal_hf.hub import (
    collect_files,
    push_episodes,
    push_motion_shapes,
    push_to_hub,
    render_model_card,
    write_planned_cards,
)

ROOT = Path(__file__).parents[1]
# Written by the first release of format version 1, with the logits it gave; never to be written again.
CHECKPOINT = Path(__file__).parent / "fixtures" / "checkpoint_v1"
LOGITS = json.loads((CHECKPOINT.parent / "checkpoint_v1_logits.json").read_text())
SOURCE = {
    "alignment.py", "configuration_dmgal.py", "configuration_mga.py", "modeling_dmgal.py", "modeling_mga.py",
    "motion_adapters.py",
    "extracted_frames.py", "motion_attention.py", "video_decoding.py", "video_processing_dmgal.py", "zip_archive.py",
}  # fmt: skip
METRICS = {
    "training": {"episodes": 40, "best_episodes": 30, "bad_steps": 0, "broken_videos": ["/home/me/videos/a.mp4"],
                 "history": []},
    "validation": {"accuracy": 61.25, "num_episodes": 20},
    "test": {"way": 5, "shot": 1, "query": 3, "seed": 0, "accuracy": 54.3219, "confidence_interval": 1.2345,
             "num_episodes": 200, "num_queries": 3000, "episodes_id": "0123456789abcdef", "per_class": {},
             "confusion": {}},
}  # fmt: skip
ARGUMENTS = {"dataset": "ssv2-small", "videos": "/home/me/videos", "output_dir": "/home/me/run", "backbone": None,
             "way": 5, "learning_rate": 0.001}  # fmt: skip

# The same episode in any process, and in one that has torch and transformers alone.
EPISODE = """
import torch

numbers = torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)
videos = [torch.sin(numbers * 0.37 * (1 + video) ** 2 + video).mul(1.5) for video in range(5)]
pixels = torch.stack(videos).float().view(1, 5, 4, 3, 32, 32)
inputs = dict(support_pixel_values=pixels[:, :3], support_labels=torch.tensor([[0, 1, 1]]))
inputs["query_pixel_values"] = pixels[:, 3:]
"""
WITHOUT_DMGAL_HF = """
import sys

sys.modules["dmgal_hf"] = None  # as if it were not installed: importing it raises ModuleNotFoundError
import json
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

report = {}
for name in ("org/run", snapshot_download("org/run"), "org/model", "org/adapter"):
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    with torch.no_grad():
        report[name] = model(**inputs).logits.tolist()
config = AutoConfig.from_pretrained("org/run", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("org/run", trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained("org/run", trust_remote_code=True)
pixel_values = processor(torch.arange(6 * 3 * 40 * 50).view(6, 3, 40, 50).remainder(256).byte()).pixel_values
report["classes"] = [type(part).__name__ for part in (model, config, processor, image_processor)]
report["pixel_values"] = [list(pixel_values.shape), pixel_values.double().sum().item()]
print(json.dumps(report))
"""


def episode():
    names = {}
    exec(EPISODE, names)
    return names["inputs"]


@torch.no_grad()
def logits_of(name, **kwargs):
    return AutoModel.from_pretrained(name, **kwargs).eval()(**episode()).logits.tolist()


def make_run(folder, metrics=METRICS, arguments=ARGUMENTS):
    """A run folder as training leaves it, and what users leave there."""
    shutil.copytree(CHECKPOINT, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(arguments))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    for below in ("checkpoints/episode-000000040", "best"):
        shutil.copytree(CHECKPOINT, folder / below)
    for name in ("optimizer.bin", "train.log", "secrets.json", "notes.py", ".metrics.json"):
        (folder / name).write_text("{}")
    return folder


def make_adapter_run(folder):
    torch.manual_seed(0)
    backbone = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                         image_size=32, patch_size=8)  # fmt: skip
    adapters = {"reduction": 2, "init_weights": False}
    config = DmgalConfig(backbone_config=backbone, paradigm="adapter", num_frames=4, adapter_config=adapters)
    DmgalModel(config).save_pretrained(folder)
    shutil.copy(CHECKPOINT / "preprocessor_config.json", folder)
    return folder


# Clients


@contextmanager
def client_process(hub, home, **environment):
    """A process whose Hub libraries are imported when the environment says where the Hub is."""
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            yield lambda function, *args, **kwargs: executor.submit(function, *args, **kwargs).result(120)


@pytest.fixture(scope="module")
def hub():
    with LocalHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def client(hub, home):
    with client_process(hub, home, HF_TOKEN=TOKEN) as client:
        yield client


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def pushed(hub, client, run):
    """The repository of a run, one that transformers' own push_to_hub has filled, and one with adapters inside."""
    client(push_to_hub, run, "org/run")
    client(push_parts, "org/model")
    client(push_to_hub, client(make_adapter_run, run.parent / "adapter-run"), "org/adapter")
    return hub


def push_parts(repo_id):
    DmgalModel.from_pretrained(CHECKPOINT).push_to_hub(repo_id)
    DmgalVideoProcessor.from_pretrained(CHECKPOINT).push_to_hub(repo_id)


def raised(function, *args, **kwargs):
    """The class names and the message of what `function` raises."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return [], "nothing was raised"


# Models


def test_a_run_pushes_weights_json_source_and_card_and_nothing_else(pushed):
    files = pushed.files("org/run")
    assert set(files) == SOURCE | {
        "README.md", "config.json", "metrics.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    assert files["model.safetensors"] == (CHECKPOINT / "model.safetensors").read_bytes()
    assert all(files[name] == (ROOT / "src" / "dmgal_hf" / name).read_bytes() for name in SOURCE)
    assert not any(b"/home/me" in content for content in files.values())
    assert not pushed.repos["models", "org/run"].private


def load_parts(repo_id):
    parts = AutoModel.from_pretrained(repo_id), AutoProcessor.from_pretrained(repo_id)
    parts += (AutoModel.from_pretrained(repo_id, trust_remote_code=True),)
    return [f"{type(part).__module__}.{type(part).__name__}" for part in parts]


@pytest.mark.parametrize("repo_id", ["org/run", "org/model"])
def test_with_dmgal_hf_its_own_classes_load(pushed, client, repo_id):
    model = "dmgal_hf.modeling_dmgal.DmgalModel"
    processor = "dmgal_hf.video_processing_dmgal.DmgalVideoProcessor"
    assert client(load_parts, repo_id) == [model, processor, model]
    assert client(logits_of, repo_id) == logits_of(CHECKPOINT)


def test_without_dmgal_hf_the_shipped_source_gives_the_same(pushed, client, home):
    environment = os.environ | {"HF_ENDPOINT": pushed.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DMGAL_HF.replace("import json\n", f"import json\n{EPISODE}")],
        env=environment, capture_output=True, text=True, timeout=120, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    processor = DmgalVideoProcessor.from_pretrained(CHECKPOINT)
    pixel_values = processor(torch.arange(6 * 3 * 40 * 50).view(6, 3, 40, 50).remainder(256).byte()).pixel_values
    assert report.pop("pixel_values") == [list(pixel_values.shape), pixel_values.double().sum().item()]
    assert report.pop("classes") == ["DmgalModel", "DmgalConfig", "DmgalVideoProcessor", "DmgalVideoProcessor"]
    assert report.pop("org/adapter") == client(logits_of, "org/adapter") != logits_of(CHECKPOINT)
    assert len(report) == 3
    assert all(logits == logits_of(CHECKPOINT) for logits in report.values())


def test_offline_with_a_warm_cache(pushed, client, home):
    expected = client(logits_of, "org/run")
    with client_process(pushed, home, HF_HUB_OFFLINE="1") as offline:
        before = len(pushed.downloads)
        assert offline(logits_of, "org/run") == expected
        kinds, message = offline(raised, AutoModel.from_pretrained, "org/never-loaded")
    assert "OSError" in kinds and "couldn't find them in the cached files" in message
    assert len(pushed.downloads) == before


def test_private_and_branches(hub, client, run):
    client(push_to_hub, run, "org/private", private=True, revision="trial/1")
    assert hub.repos["models", "org/private"].private
    assert hub.files("org/private") == {} and "model.safetensors" in hub.files("org/private", branch="trial/1")
    assert client(logits_of, "org/private", revision="trial/1") == logits_of(CHECKPOINT)
    kinds, _ = client(raised, AutoModel.from_pretrained, "org/private", revision="trial/1", token=False)
    assert "OSError" in kinds


def test_private_is_not_taken_lightly(pushed, client, run):
    kinds, message = client(raised, push_to_hub, run, "org/run", private=True)
    assert "ValueError" in kinds and "org/run exists and is public" in message


def test_pushing_again_changes_nothing(pushed, client, run):
    repo = pushed.repos["models", "org/run"]
    before = repo.branches["main"]
    client(push_to_hub, run, "org/run")
    assert repo.branches["main"] == before


def test_refusals_name_their_reason(pushed, client, run):
    kinds, message = client(raised, push_to_hub, run, "org/other", token="hf_wrong")
    assert "HfHubHTTPError" in kinds and "401" in message and "Invalid credentials" in message
    kinds, message = client(raised, push_to_hub, run, "stranger/other")
    assert "HfHubHTTPError" in kinds and "403" in message
    assert not {("models", "org/other"), ("models", "stranger/other")} & pushed.repos.keys()
    kinds, message = client(raised, AutoModel.from_pretrained, "org/missing")
    assert "OSError" in kinds and "org/missing" in message
    kinds, message = client(raised, AutoModel.from_pretrained, "org/run", revision="v9")
    assert "OSError" in kinds and "v9" in message


# Support sets


def push_support(repo_id, path):
    with torch.no_grad():
        inputs = episode()
        del inputs["query_pixel_values"]
        support = DmgalModel.from_pretrained(CHECKPOINT).eval().encode_support(**inputs)
    # Clients write a download to disk 10 MiB at a time, and resume it from there.
    support.states["unread"] = torch.arange(3 * 2**20, dtype=torch.int32)
    support.save(path)
    HfApi().upload_file(path_or_fileobj=path, path_in_repo="support.safetensors", repo_id=repo_id)


@torch.no_grad()
def classify_with_support(repo_id):
    support = DmgalSupport.load(hf_hub_download(repo_id, "support.safetensors"))
    assert torch.equal(support.states["unread"], torch.arange(3 * 2**20, dtype=torch.int32))
    model = AutoModel.from_pretrained(repo_id).eval()
    return model(query_pixel_values=episode()["query_pixel_values"], support=support).logits.tolist()


def test_support_set_with_an_interrupted_download(pushed, client, tmp_path):
    client(push_support, "org/model", tmp_path / "support.safetensors")
    pushed.drop_after["support.safetensors"] = 11 * 2**20
    assert torch.allclose(torch.tensor(client(classify_with_support, "org/model")), torch.tensor(LOGITS), atol=1e-5)
    ranges = [wanted for name, wanted in pushed.downloads if name == "support.safetensors"]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


# Datasets


def push_and_load_episodes(repo_id, labels):
    episodes = sample_episodes(labels, way=3, shot=2, query=1, num_episodes=50, seed=4)
    push_episodes(episodes, repo_id, "Rows of the test split of a collection.")
    loaded = load_episodes(repo_id, labels, split="test")
    return episodes_id(episodes), episodes_id(loaded)


def test_episode_list(hub, client):
    labels = [row % 7 for row in range(60)]
    pushed, loaded = client(push_and_load_episodes, "org/episodes", labels)
    assert loaded == pushed
    card = DatasetCard(hub.files("org/episodes", "datasets")["README.md"].decode())
    assert pushed in card.text and '"seed": 4' in card.text and "test split of a collection" in card.text
    assert card.data.license == "apache-2.0" and card.data.configs and card.data.dataset_info
    kinds, message = client(raised, load_episodes, "org/no-episodes", labels)
    assert "FileNotFoundError" in kinds and "org/no-episodes" in message


def push_and_load_motion_shapes(repo_id, cache_dir):
    shapes = load_motion_shapes("plain", 1, cache_dir=cache_dir, num_proc=1)
    push_motion_shapes(shapes, repo_id, private=True)
    loaded = load_dataset(repo_id)
    same = []
    for split, videos in shapes.items():
        assert loaded[split].features == videos.features
        same += [
            (here["video_id"], here["label"], Path(here["video"]["path"]).read_bytes())
            == (there["video_id"], there["label"], there["video"]["bytes"])
            for here, there in zip(videos, loaded[split], strict=True)
        ]
    return same


def test_motion_shapes_with_their_videos(hub, client, tmp_path):
    same = client(push_and_load_motion_shapes, "org/motion-shapes", tmp_path)
    assert len(same) == 36 and all(same)
    assert hub.repos["datasets", "org/motion-shapes"].private
    card = DatasetCard(hub.files("org/motion-shapes", "datasets")["README.md"].decode())
    assert "synthetic" in card.data.tags and "# Motion shapes" in card.text


# Cards


def test_the_card_of_a_run_says_what_was_measured(run):
    card = ModelCard(str(render_model_card(run, "org/run")))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 54.32)
    assert result.metric_args == {"confidence_interval_95": 1.23}
    assert result.dataset_config == "5-way 1-shot" and result.dataset_type == "something-something-v2"
    assert result.dataset_args == {"way": 5, "shot": 1, "query": 3, "num_episodes": 200,
                                   "episodes_id": "0123456789abcdef"}  # fmt: skip
    assert card.data.model_name == "run" and card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "video-classification"
    assert card.data.base_model is None
    for fact in ("54.32 %", "± 1.23 %", "`0123456789abcdef`", "learning_rate: 0.001", "40 episodes", "after 30",
                 '"org/run"', "2411.11335", "others of their class: 1.", "Crowd workers",
                 "started from random weights"):  # fmt: skip
        assert fact in card.text
    assert "/home/me" not in str(card) and "Not yet trained" not in card.text


def test_a_number_that_was_not_measured_is_absent(tmp_path):
    metrics = {name: METRICS[name] for name in ("training", "validation")}
    untested = render_model_card(make_run(tmp_path / "untested", metrics))
    assert untested.data.eval_results is None and "No accuracy on novel classes has been measured" in untested.text
    converted = render_model_card(CHECKPOINT)
    assert converted.data.eval_results is None and converted.data.datasets is None
    assert "## Training" not in converted.text and "is not recorded" in converted.text
    started = make_run(tmp_path / "started", metrics=None)
    (started / "model.safetensors").unlink()
    card = render_model_card(started)
    assert "Not yet trained" in card.text and card.data.eval_results is None
    single = METRICS["test"] | {"num_episodes": 1, "confidence_interval": float("nan")}
    card = render_model_card(make_run(tmp_path / "single", METRICS | {"test": single}))
    assert card.data.eval_results[0].metric_args is None and "nan" not in str(card)


def test_base_models_are_repositories_and_adapters_are_peft(tmp_path):
    backbone = "openai/clip-vit-base-patch16"
    card = render_model_card(make_run(tmp_path / "hub", arguments=ARGUMENTS | {"backbone": backbone}))
    assert card.data.base_model == backbone and f"pretrained on ({backbone})" in card.text
    local = tmp_path / "someone" / "backbone"
    local.mkdir(parents=True)
    card = render_model_card(make_run(tmp_path / "local", arguments=ARGUMENTS | {"backbone": str(local)}))
    assert card.data.base_model is None and str(tmp_path / "someone") not in str(card)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": backbone, "peft_type": "MGA"}))
    card = render_model_card(adapter, "org/adapter")
    assert card.data.library_name == "peft" and card.data.base_model == backbone
    assert 'load_adapter("org/adapter")' in card.text and "Not yet trained" in card.text


def test_planned_cards_are_up_to_date_and_promise_nothing(tmp_path):
    write_planned_cards(tmp_path)
    cards = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in (ROOT / "model_cards").glob("dmgal-*.md")}
    assert kept == cards, "run dmgal_hf.hub.write_planned_cards('model_cards')"
    assert len(cards) == 10
    for text in cards.values():
        assert "Not yet trained" in text and "model-index" not in text and " %" not in text


def test_dry_run_shows_files_and_card(run, monkeypatch, capsys):
    script = ROOT / "scripts" / "push_to_hub.py"
    arguments = ["--output_dir", str(run), "--repo_id", "org/dry", "--dry_run"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr("socket.socket.connect", None)  # a dry run needs no network
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"  {name}\n" in printed for name in collect_files(run))
    assert str(render_model_card(run, "org/dry")) in printed


def test_folders_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        collect_files(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        collect_files(tmp_path)
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        collect_files(tmp_path)
    shutil.copy(CHECKPOINT / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="a model of type 'vit'"):
        collect_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        collect_files(tmp_path)


# Format versions


def test_a_checkpoint_of_version_1_loads_with_its_logits():
    assert torch.allclose(torch.tensor(logits_of(CHECKPOINT)), torch.tensor(LOGITS), atol=1e-5)
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    assert (processor.num_frames, processor.size, processor.crop_size) == (
        4, {"shortest_edge": 36}, {"height": 32, "width": 32}
    )  # fmt: skip


def test_a_newer_checkpoint_is_refused(tmp_path):
    newer = shutil.copytree(CHECKPOINT, tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format_version": 2}))
    for load in (AutoModel.from_pretrained, collect_files):
        with pytest.raises(ValueError, match="format version 2"):
            load(newer)
