"""Pushing and pulling over real HTTP, by unmodified clients in processes of their own."""

import copy
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, load_dataset
from hub_runs import CHECKPOINT, ROOT, make_adapter_run, make_run
from hub_server import TOKEN, LocalHub
from huggingface_hub import DatasetCard, HfApi, ModelCard, hf_hub_download
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    ResNetConfig,
    ViTConfig,
    ViTModel,
)

from dmgal_hf import DmgalConfig, DmgalModel, DmgalSupport, DmgalVideoProcessor, MgaConfig
from dmgal_hf.data import episodes_id, load_episodes, load_motion_shapes, load_puppets, sample_episodes
from dmgal_hf.hub import (
    collect_files,
    push_episodes,
    push_made_up_videos,
    push_motion_shapes,
    push_to_hub,
    render_model_card,
)
from dmgal_hf.hub.conversion import official_state_dict
from dmgal_hf.model.modeling_mga import MgaLayer
from dmgal_hf.training.arguments import DataArguments, ModelArguments, TrainArguments
from dmgal_hf.training.starting import build_model, settle_arguments

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

LOGITS = json.loads((CHECKPOINT.parent / "checkpoint_v1_logits.json").read_text())
SOURCE = {path.name for path in (ROOT / "src" / "dmgal_hf" / "model").glob("*.py")} - {"__init__.py"}
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
import importlib.util, sys

if importlib.util.find_spec("dmgal_hf"):  # installed as a wheel: as if it were not
    sys.modules["dmgal_hf"] = None
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


def is_expected(kind, path, content):
    """Models: safetensors, JSON, Markdown and the source of this package. Datasets: Parquet and Markdown."""
    suffix = Path(path).suffix
    if suffix == ".py":
        return (
            kind == "models"
            and path in SOURCE
            and content == (ROOT / "src" / "dmgal_hf" / "model" / path).read_bytes()
        )
    if suffix == ".json":
        return kind == "models" and isinstance(json.loads(content), dict)
    if suffix == ".safetensors":
        return kind == "models" and len(load(content)) > 0
    return path == "README.md" or (kind == "datasets" and suffix == ".parquet")


@pytest.fixture(scope="module")
def hub():
    with LocalHub(may_upload=is_expected) as hub:
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
    assert all(files[name] == (ROOT / "src" / "dmgal_hf" / "model" / name).read_bytes() for name in SOURCE)
    assert not any(b"/home/me" in content for content in files.values())
    assert not pushed.repos["models", "org/run"].private


def push_file(repo_id, name):
    HfApi().upload_file(path_or_fileobj=b"pickle", path_in_repo=name, repo_id=repo_id)


def test_every_push_of_these_tests_is_watched(pushed, client):
    for name in ("optimizer.bin", "notes.py", "modeling_dmgal.py"):
        kinds, message = client(raised, push_file, "org/run", name)
        assert "HfHubHTTPError" in kinds and f"{name} must not be uploaded" in message


def load_parts(repo_id):
    parts = AutoModel.from_pretrained(repo_id), AutoProcessor.from_pretrained(repo_id)
    parts += (AutoModel.from_pretrained(repo_id, trust_remote_code=True),)
    return [f"{type(part).__module__}.{type(part).__name__}" for part in parts]


@pytest.mark.parametrize("repo_id", ["org/run", "org/model"])
def test_with_dmgal_hf_its_own_classes_load(pushed, client, repo_id):
    model = "dmgal_hf.model.modeling_dmgal.DmgalModel"
    processor = "dmgal_hf.model.video_processing_dmgal.DmgalVideoProcessor"
    assert client(load_parts, repo_id) == [model, processor, model]
    assert client(logits_of, repo_id) == logits_of(CHECKPOINT)


def test_without_dmgal_hf_the_shipped_source_gives_the_same(pushed, client, home):
    environment = os.environ | {"HF_ENDPOINT": pushed.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    # Without the site module no .pth file is read, so that an editable install lies on no path.
    environment["PYTHONPATH"] = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    done = subprocess.run(
        [sys.executable, "-S", "-c", WITHOUT_DMGAL_HF.replace("import json\n", f"import json\n{EPISODE}")],
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
    episodes = sample_episodes([0, 0, 1, 1], way=2, shot=1, query=1, num_episodes=2, seed=0)
    client(push_episodes, episodes, "org/public-episodes", "Four videos.")
    kinds, message = client(raised, push_episodes, episodes, "org/public-episodes", "Four videos.", private=True)
    assert "ValueError" in kinds and "org/public-episodes exists and is public" in message


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
    kinds, _ = client(raised, AutoModel.from_pretrained, "org/run", token="hf_wrong", force_download=True)
    assert "OSError" in kinds
    kinds, message = client(raised, AutoModel.from_pretrained, "org/missing")
    assert "OSError" in kinds and "org/missing" in message
    kinds, message = client(raised, AutoModel.from_pretrained, "org/run", revision="v9")
    assert "OSError" in kinds and "v9" in message


# Adapters alone

ADAPTERS = {"reduction": 2, "init_weights": False, "num_frames": 4}


@torch.no_grad()
def adapted(model):
    """What the model makes of the frames of two supports and a query, or, a DmgalModel, of an episode."""
    config = model.eval().config
    if isinstance(config, DmgalConfig):
        return model(**episode()).logits.tolist()
    frames = episode()["support_pixel_values"].flatten(0, 2)
    return model(pixel_values=frames, num_frames=4, num_support=[2]).last_hidden_state.tolist()


def vit_backbone():
    return ViTModel.from_pretrained("org/vit", add_pooling_layer=False)


def few_shot_model():
    return DmgalModel.from_backbone("org/vit", paradigm="adapter", num_frames=4)


def push_adapters(folder):
    """By peft's push_to_hub from a plain backbone, from a DmgalModel, from one that is a repository; by ours."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                       image_size=32, patch_size=8)  # fmt: skip
    ViTModel(config, add_pooling_layer=False).push_to_hub("org/vit")
    few_shot_model().push_to_hub("org/baseline")
    expected = {}
    for base in (vit_backbone(), few_shot_model(), DmgalModel.from_pretrained("org/baseline")):
        name = f"org/adapter-{len(expected)}"
        model = get_peft_model(base, MgaConfig(**ADAPTERS))
        model.push_to_hub(name)
        expected[name] = adapted(model)
    model = DmgalModel.from_backbone("org/vit", paradigm="adapter", num_frames=4, adapter_config=ADAPTERS)
    model.save_pretrained(folder)
    shutil.copy(CHECKPOINT / "preprocessor_config.json", folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"backbone": "org/vit"}))
    push_to_hub(folder, "org/adapter-run", adapter_only=True)
    return expected | {"org/adapter-run": adapted(model), "its backbone": adapted(model.backbone)}


def started_from(name):
    """The model as training builds it."""
    arguments = settle_arguments(DataArguments(), ModelArguments(init_from=name), TrainArguments())
    return build_model(arguments[1], arguments[0])[0]


def load_adapters():
    few_shot, through_baseline = few_shot_model(), few_shot_model()
    few_shot.load_adapter("org/adapter-1")
    through_baseline.backbone.load_adapter("org/adapter-run")
    plain = vit_backbone()
    plain.load_adapter("org/adapter-0")
    loaded = {
        "org/adapter-0": [
            PeftModel.from_pretrained(vit_backbone(), "org/adapter-0"),
            plain,
            AutoModel.from_pretrained("org/adapter-0"),
            AutoPeftModel.from_pretrained("org/adapter-0"),
        ],
        "org/adapter-1": [PeftModel.from_pretrained(few_shot_model(), "org/adapter-1"), few_shot],
        "org/adapter-2": [
            AutoModel.from_pretrained("org/adapter-2"),
            AutoPeftModel.from_pretrained("org/adapter-2", import_allowlist=["dmgal_hf.model.modeling_dmgal"]),
        ],
        "org/adapter-run": [through_baseline, started_from("org/adapter-run")],
        "its backbone": [PeftModel.from_pretrained(vit_backbone(), "org/adapter-run")],
    }
    assert AutoProcessor.from_pretrained("org/adapter-run").num_frames == 4
    return {name: [adapted(model) for model in models] for name, models in loaded.items()}


def test_adapters_alone(hub, client, tmp_path):
    expected, loaded = client(push_adapters, tmp_path), client(load_adapters)
    for name, outputs in loaded.items():
        assert all(output == expected[name] for output in outputs), name
    bases = ("org/vit", "org/vit", "org/baseline", "org/vit")
    for name, base in zip([name for name in expected if "/" in name], bases, strict=True):
        files = hub.files(name)
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == base
        assert all(".mga_adapter." in key for key in load(files["adapter_model.safetensors"]))
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"}
    assert "auto_map" not in json.loads(files["preprocessor_config.json"])
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "org/vit")
    assert 'from_backbone("org/vit", paradigm="adapter", num_frames=4)\nmodel.backbone.load_adapter(' in card.text


def push_vit_b_adapter(repo_id):
    config = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                              image_size=224, patch_size=16)  # fmt: skip
    with torch.device("meta"):
        model = get_peft_model(CLIPVisionModel(config), MgaConfig())
    for layer in model.modules():
        if isinstance(layer, MgaLayer):  # the adapters alone take memory
            layer.mga_adapter.to_empty(device="cpu").apply(lambda part: [p.data.normal_() for p in part.parameters()])
    model.push_to_hub(repo_id)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_an_adapter_of_vit_b_uploads_less_than_25_mb(hub, client):
    before = hub.received
    num_parameters = client(push_vit_b_adapter, "org/vit-b")
    assert 4 * num_parameters < hub.received - before < 25e6
    weights = load(hub.files("org/vit-b")["adapter_model.safetensors"])
    assert sum(weight.numel() for weight in weights.values()) == num_parameters > 4e6


def test_adapters_that_nobody_could_load_are_not_pushed(run, tmp_path):
    with pytest.raises(ValueError, match=r"has no adapters inside \(paradigm 'ft'"):
        collect_files(run, adapter_only=True)
    with pytest.raises(ValueError, match="is not named after a repository"):
        collect_files(make_adapter_run(tmp_path / "run"), adapter_only=True)
    model = DmgalModel.from_backbone(ViTModel(ViTConfig(num_hidden_layers=1), add_pooling_layer=False))
    get_peft_model(copy.deepcopy(model.backbone), MgaConfig()).save_pretrained(tmp_path / "adapter")
    model.backbone.load_adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapters of its own.*with model\.backbone\.save_pretrained"):
        model.save_pretrained(tmp_path / "model")
    described = DmgalModel.from_pretrained(tmp_path / "run")  # of whose adapters config.json tells, but not of these
    another = get_peft_model(ViTModel(described.config.backbone_config), MgaConfig(reduction=2))
    another.save_pretrained(tmp_path / "second")
    described.backbone.load_adapter(tmp_path / "second", adapter_name="second")
    with pytest.raises(ValueError, match="adapters of its own"):
        described.save_pretrained(tmp_path / "model")


# Loading


def loading_peak(folder):
    """Bytes that loading a checkpoint and reading all of its weights adds at its peak."""

    def resident(line):
        return next(int(text.split()[1]) << 10 for text in Path("/proc/self/status").open() if text.startswith(line))

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS:")
    model = AutoModel.from_pretrained(folder)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    return resident("VmHWM:") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be set back on Linux alone")
def test_loading_makes_no_second_copy(client, tmp_path):
    backbone = ViTConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048)
    DmgalModel(DmgalConfig(backbone_config=backbone)).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 90e6 and client(loading_peak, tmp_path) < 1.5 * size


def test_weights_that_a_checkpoint_lacks_are_initialised(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    names = ("mixer.temporal_out.weight", "self_attention.gamma", "cross_attention.value.weight",
             "mixer.temporal_in.weight")  # fmt: skip
    for name in names:
        weights.pop(name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = DmgalModel.from_pretrained(folder, output_loading_info=True)
    assert report["missing_keys"] == set(names)
    state = model.state_dict()
    assert state["self_attention.gamma"] == 0
    assert torch.equal(state[names[3]], torch.eye(model.config.num_frames))  # a hidden unit for every frame
    bound = model.mixer.temporal_out.in_features**-0.5
    assert (
        0 < state[names[0]].abs().max() <= bound
        and 0.5 < state[names[2]].std() * (9 * len(state[names[2]]) / 2) ** 0.5 < 2
    )


def test_adapters_without_weights_are_refused(tmp_path):
    folder = make_adapter_run(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    lacking = next(name for name in weights if name.endswith(".mga_adapter.default.gamma"))
    del weights[lacking]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its adapters \(1\): .*\.mga_adapter\.default\.gamma"):
        AutoModel.from_pretrained(folder)


# The authors' checkpoints


def run_script(name, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


def test_a_converted_checkpoint_pushes_and_comes_back(hub, client, tmp_path):
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic")
    state = official_state_dict(DmgalModel(DmgalConfig(backbone_config=backbone)))
    torch.save({"model_state_dict": state, "iteration": 7}, tmp_path / "authors.pt")
    run_script("convert_checkpoint.py", "--checkpoint", tmp_path / "authors.pt", "--output", tmp_path / "converted")
    client(push_to_hub, tmp_path / "converted", "org/converted")
    assert set(hub.files("org/converted")) == SOURCE | {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    back = tmp_path / "back.pt"
    client(run_script, "convert_checkpoint.py", "--checkpoint", "org/converted", "--output", back, "--to_official")
    content = torch.load(back, weights_only=True)["model_state_dict"]
    assert content.keys() == state.keys() and all(torch.equal(content[name], state[name]) for name in state)


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
    assert "preset plain, seed 0, generator version 1" in card.text and "- `train`: 24 classes, 24 clips" in card.text


def push_and_list_puppets(repo_id, cache_dir):
    push_made_up_videos(load_puppets("plain", 1, cache_dir=cache_dir, num_proc=1), repo_id)
    return {split: len(videos) for split, videos in load_dataset(repo_id).items()}


def test_puppets_come_with_a_card_of_their_own(hub, client, tmp_path):
    sizes = client(push_and_list_puppets, "org/puppets", tmp_path)
    card = DatasetCard(hub.files("org/puppets", "datasets")["README.md"].decode())
    assert sizes == {"train": 32, "validation": 8, "test": 14}
    assert "# Puppets" in card.text and "jointed figures" in card.text and "- `test`: 14 classes" in card.text
    assert "preset plain, seed 0, generator version 1" in card.text
    others = DatasetDict(
        train=Dataset.from_dict({"label": [0]}, features=Features({"label": ClassLabel(names=["a"])}))
    )
    with pytest.raises(ValueError, match=r"have the classes a, \.\.\.: neither those of motion shapes nor of puppets"):
        push_made_up_videos(others, "org/others")


# Cards


def validate_cards(contents):
    """What is wrong with model cards, as the Hub says."""
    errors = [raised(ModelCard(content).validate) for content in contents]
    return [message for kinds, message in errors if kinds]


def test_every_card_is_valid(hub, client, run):
    cards = [path.read_text() for path in sorted((ROOT / "model_cards").glob("dmgal-*.md"))]
    cards += [str(render_model_card(folder, "org/name")) for folder in (run, CHECKPOINT)]
    assert len(cards) == 12 and client(validate_cards, cards) == []
    (error,) = client(validate_cards, [cards[0].replace("license: apache-2.0", "license: free")])
    assert "license" in error and "must be one of" in error


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
    for read in (AutoModel.from_pretrained, collect_files):
        with pytest.raises(ValueError, match="format version 2"):
            read(newer)
