import contextlib
import hashlib
import html
import json
import os
import runpy
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, Video
from hub_server import TOKEN, LocalHub
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ViTConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor, VideoDecodeError
from dmgal_hf.inference.pipeline import FewShotVideoClassificationPipeline, StreamedLabel
from dmgal_hf.inference.streaming import read_ahead
from dmgal_hf.inference.support_sets import support_card
from dmgal_hf.model.video_decoding import read_frames_at

TASK = "few-shot-video-classification"
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
VIT = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                patch_size=8)  # fmt: skip
KINDS = {
    "ft": {"backbone_config": RESNET},
    "frozen": {"backbone_config": VIT, "paradigm": "adapter"},
    "adapter": {"backbone_config": VIT, "paradigm": "adapter", "adapter_config": {}},
}
FPS = 8


def make_model(kind="ft", seed=0, **fields):
    """A model in which every attention, adapter and statistic is away from its start."""
    torch.manual_seed(seed)
    model = DmgalModel(DmgalConfig(num_frames=4, **KINDS[kind], **fields))
    for name, tensor in model.state_dict().items():
        if "gamma" in name or "mga_adapter" in name or ("norm" in name and tensor.is_floating_point()):
            tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def write_video(path, seed, frames=16, fps=FPS, options=None, codec="libx264"):
    """A bright square that moves over noise; `seed` decides how."""
    generator = np.random.default_rng(seed)
    start, step = generator.integers(0, 32, 2), generator.integers(-3, 4, 2)
    noise = generator.integers(0, 120, (32, 40, 3), dtype=np.uint8)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 40, 32, "yuv420p"
        for number in range(frames):
            picture = noise.copy()
            top, left = (start + step * number) % (24, 32)
            picture[top : top + 8, left : left + 8] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{seed}.mp4", seed) for seed in range(8)]


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", 50, frames=45, fps=10)


@pytest.fixture(scope="module")
def classes(videos):
    return {"push": videos[:2], "pull": videos[2:5], "lift": videos[5:7]}


@pytest.fixture
def processor():
    return DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)


@pytest.fixture
def checkpoint(tmp_path, processor):
    make_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def make_classifier(kind="ft", processor=None, **fields):
    processor = processor or DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)
    return pipeline(TASK, model=make_model(kind, **fields), image_processor=processor, device="cpu")


@torch.no_grad()
def plain_logits(classifier, classes, query):
    """A whole episode through the model, nothing kept: (N,)."""
    return classifier.model(**classifier.image_processor(support=classes, query=[query])).logits[0, 0]


def by_label(answer):
    return {entry["label"]: entry["score"] for entry in answer}


def count_frames(model):
    """A list that gets the number of frames of every pass through the backbone."""
    counts = []
    model.backbone.register_forward_hook(
        lambda module, args, kwargs, output: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_checkpoint_to_scores(checkpoint, videos, classes, temperature):
    config = json.loads(Path(checkpoint, "config.json").read_text())
    Path(checkpoint, "config.json").write_text(json.dumps({**config, "score_temperature": temperature}))
    classifier = pipeline(TASK, model=checkpoint, device="cpu")
    assert isinstance(classifier.image_processor, DmgalVideoProcessor) and not classifier.model.training
    answer = classifier.fit(classes)(videos[7])
    expected = (plain_logits(classifier, classes, videos[7]) / temperature).softmax(0)
    assert [entry["score"] for entry in answer] == sorted((entry["score"] for entry in answer), reverse=True)
    assert by_label(answer) == pytest.approx(dict(zip(classes, expected.tolist())), abs=1e-5)
    assert classifier(videos[7], top_k=2) == answer[:2]
    best_alone = pipeline(TASK, model=checkpoint, device="cpu", top_k=1).fit(classes)
    assert best_alone(videos[7]) == answer[:1] and best_alone(videos[7], top_k=None) == answer


def test_a_loaded_model_brings_its_processor(checkpoint, videos, classes):
    model = DmgalModel.from_pretrained(checkpoint)
    classifier = pipeline(TASK, model=model, device="cpu")
    assert classifier.image_processor.crop_size == {"height": 32, "width": 32}
    with pytest.raises(ValueError, match="pass image_processor="):
        pipeline(TASK, model=make_model(), device="cpu")
    Path(checkpoint, "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        pipeline(TASK, model=checkpoint, device="cpu")


def test_a_processor_by_another_name_is_the_one_that_is_meant(tmp_path, checkpoint):
    other = DmgalVideoProcessor(num_frames=4, size=40, crop_size=32)
    other.save_pretrained(tmp_path / "other")
    for given in ({"processor": other}, {"video_processor": other}, {"processor": str(tmp_path / "other")}):
        classifier = pipeline(TASK, model=checkpoint, device="cpu", **given)
        assert classifier.image_processor.size == {"shortest_edge": 40}
    with pytest.raises(OSError, match="nowhere"):
        pipeline(TASK, model=checkpoint, device="cpu", processor=str(tmp_path / "nowhere"))


def test_numbers_that_are_none(videos, classes):
    classifier = make_classifier().fit(classes)
    support = classifier.support
    for bad in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            classifier.temperature = bad
    with torch.no_grad():
        classifier.model.mixer.channel_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the model gives NaN or infinity in float32 for support\['push'\]\[0\]"):
        classifier.fit(classes)
    assert classifier.support is support
    for answers in (lambda: classifier(videos[0]), lambda: list(classifier.stream(videos[0]))):
        with pytest.raises(ValueError, match="the model gives NaN or infinity"):
            answers()


def test_saved_pipeline_loads_without_remote_code(tmp_path, videos, classes):
    classifier = make_classifier().fit(classes)
    classifier.save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"), device="cpu").fit(classes)
    assert again(videos[7]) == classifier(videos[7])


@pytest.mark.slow
def test_kinds_of_input(videos, classes):
    classifier = make_classifier().fit(classes)
    expected = [classifier(video) for video in videos[:5]]
    frames = read_frames_at(videos[0], list(range(16))).permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(frame) for frame in frames]
    data = Path(videos[0]).read_bytes()
    for one in (Path(videos[0]), data, {"path": None, "bytes": data}, frames, torch.from_numpy(frames), pictures):
        assert classifier(one) == expected[0]
    assert classifier([pictures, frames]) == [expected[0], expected[0]] and classifier([videos[1]]) == expected[1:2]
    rows = Dataset.from_dict({"video": videos[:5]})
    column = rows.cast_column("video", Video(decode=False))["video"]
    assert classifier(videos[:5]) == expected and classifier(rows["video"]) == expected
    assert classifier(column) == expected
    assert list(classifier(video for video in videos[:5])) == expected
    assert list(classifier(KeyDataset(rows, "video"))) == expected
    for together in (classifier(videos[:5], batch_size=2), list(classifier(KeyDataset(rows, "video"), batch_size=3))):
        for answer, alone in zip(together, expected):
            assert by_label(answer) == pytest.approx(by_label(alone), abs=1e-5)


@pytest.mark.slow
def test_support_of_a_dataset(videos, classes):
    names = list(classes)
    rows = [(video, names.index(label)) for label, of_class in classes.items() for video in of_class]
    features = Features({"clip": Value("string"), "action": ClassLabel(names=names)})
    dataset = Dataset.from_dict({"clip": [v for v, _ in rows], "action": [n for _, n in rows]}, features=features)
    classifier = make_classifier().fit(dataset, video_column="clip", label_column="action")
    assert classifier.labels == names and classifier(videos[7]) == make_classifier().fit(classes)(videos[7])
    with pytest.raises(ValueError, match="no column 'video'"):
        classifier.fit(dataset)
    stream = dataset.rename_columns({"clip": "video", "action": "label"}).to_iterable_dataset()
    for rows in (stream, stream.cast_column("video", Video()), stream.map(lambda row: row)):
        expected = names if rows.features else ["0", "1", "2"]
        streamed = make_classifier().fit(rows)
        assert streamed.labels == expected and len(streamed.support.features[0]) == 7
    assert streamed(rows.take(2)["video"]) == streamed(videos[:2])
    with pytest.raises(ValueError, match="no column 'clip'; its columns are"):
        streamed.fit(rows, video_column="clip")
    added = Dataset.from_dict({"clip": [videos[7], None], "action": ["new", "new"]})
    with pytest.raises(ValueError, match="row 1 of the dataset has no clip"):
        classifier.add(added, video_column="clip", label_column="action")
    classifier.add(added.select([0]), video_column="clip", label_column="action")
    assert classifier.labels == [*names, "new"]
    column = Dataset.from_dict({"video": videos[:2]}).cast_column("video", Video())["video"]
    of_columns = make_classifier().fit({"push": column, "lift": videos[5:7]})
    assert of_columns(videos[7]) == make_classifier().fit({"push": videos[:2], "lift": videos[5:7]})(videos[7])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_add_and_remove_are_as_fitted_at_once_and_no_clip_is_encoded_twice(videos, classes, kind):
    classifier = make_classifier(kind)
    counts = count_frames(classifier.model)
    classifier.fit({"push": classes["push"], "other": [videos[7]], "pull": classes["pull"][:2]}, batch_size=2)
    assert sum(counts) == 5 * 4
    classifier.add({"lift": classes["lift"], "pull": classes["pull"][2]})
    assert sum(counts) == 8 * 4
    assert classifier.remove("other").labels == ["push", "pull", "lift"] and sum(counts) == 8 * 4
    answer = classifier(videos[7])
    assert sum(counts) == 9 * 4
    expected = plain_logits(classifier, classes, videos[7]).softmax(0)
    assert by_label(answer) == pytest.approx(dict(zip(classes, expected.tolist())), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_is_beyond_the_farthest_support(videos, classes, kind):
    classifier = make_classifier(kind)
    counts = count_frames(classifier.model)
    classifier.fit({label: classes[label] for label in ("push", "pull")}, unknown="auto").add(
        {"lift": classes["lift"]}
    )
    if kind != "adapter":
        assert sum(counts) == 7 * 4
    own = []
    for number, label in enumerate(classes):
        for video in classes[label]:
            others = {name: [other for other in of_class if other != video] for name, of_class in classes.items()}
            own.append(-plain_logits(classifier, others, video)[number].item())
    assert classifier.unknown == pytest.approx(max(own), abs=1e-4)

    logits = plain_logits(classifier, classes, videos[7])
    classifier.unknown = -logits.max().item() + 0.01
    assert "unknown" in by_label(classifier(videos[7])) and classifier(videos[7])[0]["label"] != "unknown"
    classifier.unknown = -logits.max().item() - 0.01
    answer = classifier(videos[7])
    scores = torch.cat([logits, logits.max()[None] + 0.01]).softmax(0).tolist()
    assert answer[0]["label"] == "unknown"
    assert by_label(answer) == pytest.approx(dict(zip([*classes, "unknown"], scores)), abs=1e-5)


def test_calibration_has_the_smallest_cross_entropy_of_clips_left_out():
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (3, 32, 32, 3))
    clips = {
        label: [(picture + generator.normal(0, 60, (4, 32, 32, 3))).clip(0, 255).astype("uint8") for _ in range(3)]
        for label, picture in zip("abc", pictures)
    }
    classifier = make_classifier().fit(clips)
    best = classifier.calibrate()
    logits = []
    for label in clips:
        for video in clips[label]:
            others = {name: [other for other in of_class if other is not video] for name, of_class in clips.items()}
            logits.append(plain_logits(classifier, others, video))
    targets = (F.one_hot(torch.arange(3).repeat_interleave(3), 3) * 9 + 1) / 12
    losses = [F.cross_entropy(torch.stack(logits) / value, targets).item() for value in (best / 1.1, best, best * 1.1)]
    assert losses[1] == min(losses) < F.cross_entropy(torch.stack(logits), targets)
    expected = (plain_logits(classifier, clips, pictures[None, 1]) / best).softmax(0)
    assert by_label(classifier(pictures[None, 1])) == pytest.approx(dict(zip("abc", expected.tolist())), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kept_support_set(tmp_path, videos, classes, kind):
    classifier = make_classifier(kind).fit(classes, unknown="auto")
    classifier.temperature = 2.5
    classifier.save(tmp_path / "kept")
    assert sorted(os.listdir(tmp_path / "kept")) == ["support.json", "support.safetensors"]
    again = make_classifier(kind).load(tmp_path / "kept")
    assert again(videos[7]) == classifier(videos[7]) and again.labels == list(classes)
    if kind == "adapter":
        with pytest.raises(ValueError, match="Fit again with all clips"):
            again.add({"new": videos[7:]})
        again.unknown = classifier.unknown
    else:
        with pytest.raises(ValueError, match=r"\['new'\] has one"):
            again.add({"new": videos[7:]})
    assert again.remove("push").labels == ["pull", "lift"]

    other_weights = make_classifier(kind, seed=1)
    other_metric = make_classifier(kind, alignment="otam")
    other_crop = make_classifier(kind, processor=DmgalVideoProcessor(num_frames=4, size=40, crop_size=32))
    for other in (other_weights, other_metric, other_crop):
        with pytest.raises(ValueError, match="weights, config or preprocessing differ"):
            other.load(tmp_path / "kept")
    classifier.fit(dict(reversed(classes.items()))).save(tmp_path / "reversed")
    mixed = tmp_path / "mixed"
    for folder, name in (("kept", "support.json"), ("reversed", "support.safetensors")):
        mixed.mkdir(exist_ok=True)
        (mixed / name).write_bytes((tmp_path / folder / name).read_bytes())
    with pytest.raises(ValueError, match=r"support.safetensors and the support.json beside it are not of one"):
        again.load(mixed)
    about = json.loads((mixed / "support.json").read_text())
    (mixed / "support.json").write_text(json.dumps({name: about[name] for name in about if name != "labels"}))
    with pytest.raises(ValueError, match=r"support.json is damaged .no 'labels'."):
        again.load(mixed)
    for name in ("support.safetensors", "support.json"):
        (tmp_path / "kept" / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=rf"{name} is damaged .*fit again"):
            again.load(tmp_path / "kept")
    (tmp_path / "kept" / "support.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"support\.json is missing"):
        again.load(tmp_path / "kept")


def test_kept_support_set_with_odd_labels_replaces_one_that_is_there(tmp_path, videos, classes):
    classifier = make_classifier().fit(classes)
    classifier.save(tmp_path / "kept")
    odd = ["half \udcff", "a | b <img src=x> `c`\n# d", "übung"]
    classifier.fit(dict(zip(odd, classes.values()))).save(tmp_path / "kept")
    again = make_classifier().load(tmp_path / "kept")
    assert again.labels == odd and again(videos[7]) == classifier(videos[7])
    assert sorted(os.listdir(tmp_path / "kept")) == ["support.json", "support.safetensors"]
    (row,) = [line for line in support_card("org/x", None, {odd[1]: 2}).splitlines() if line.endswith("| 2 |")]
    assert (
        row.count("|") == 3
        and not set(row) & set("<>`")
        and html.unescape(row) == f"| {odd[1]} | 2 |".replace("\n", " ")
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ft", "adapter"])
def test_kept_support_set_that_the_model_did_not_make(tmp_path, classes, kind):
    classifier = make_classifier(kind).fit(classes)
    classifier.save(tmp_path / "kept")
    path = tmp_path / "kept" / "support.safetensors"
    good, way = load_file(path), {"way": "3"}
    about = json.loads((tmp_path / "kept" / "support.json").read_text())
    state = next(name for name in good if name not in ("features", "labels", "num_support"))
    nan = good["features"].clone()
    nan[0, 0, 0, 0] = torch.nan

    def load(**changed):
        save_file(
            {name: value for name, value in {**good, **changed}.items() if value is not None}, path, metadata=way
        )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "kept" / "support.json").write_text(json.dumps({**about, "tensors": digest}))
        return classifier.load(tmp_path / "kept")

    assert load().labels == list(classes)
    for name, tensor in (
        ("features", good["features"].double()),
        ("features", good["features"][..., :-1].contiguous()),
        ("features", good["features"][0]),
        ("features", nan),
        ("labels", good["labels"].int()),
        ("labels", good["labels"] + 1),
        ("labels", torch.zeros_like(good["labels"])),
        (state, good[state][..., :-1, :].contiguous()),
        (state, good[state].half()),
        ("states", None),
    ):
        with pytest.raises(ValueError, match=rf"support\.safetensors is damaged \({name}: .*fit again"):
            load(**{state if name == "states" else name: tensor})
    for name, value in (
        ("labels", "abc"),
        ("labels", ["a", "a", "b"]),
        ("temperature", "hot"),
        ("clip_digests", [1] * 6),
    ):
        (tmp_path / "kept" / "support.json").write_text(json.dumps({**about, name: value}))
        with pytest.raises(ValueError, match=rf"support\.json is damaged \('{name}'"):
            classifier.load(tmp_path / "kept")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_everything_works_and_answers_as_in_float32(tmp_path, videos, long_video, kind):
    classes = {"push": videos[:2], "pull": videos[2:4]}
    answers, temperatures = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(kind).to(dtype)
        processor = DmgalVideoProcessor(num_frames=4, size=32, crop_size=32)
        classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu", dtype=dtype)
        classifier.fit(classes, unknown="auto")
        assert classifier.model.dtype == dtype == classifier.support.features.dtype
        classifier.unknown = None
        temperatures[dtype] = classifier.calibrate()
        classifier.temperature = 0.1
        answers[dtype] = [by_label(answer) for answer in classifier(videos)]
        streamed = list(classifier.stream(long_video, window=1.0, stride=0.5))
        answers[dtype] += [{window.label: window.score} for window in streamed]
        classifier.save(tmp_path / "kept")
        again = pipeline(TASK, model=model, image_processor=processor, device="cpu").load(tmp_path / "kept")
        assert again(videos[7]) == classifier(videos[7]) and len(streamed) > 5
    # A distance rounds to 8 bits, and temperatures lie 2 % apart.
    assert temperatures[torch.bfloat16] == pytest.approx(temperatures[torch.float32], rel=0.25)
    for found, expected in zip(answers[torch.bfloat16], answers[torch.float32], strict=True):
        assert found == pytest.approx(expected, abs=0.1)


def test_kept_support_set_brings_the_dtype_of_its_model(tmp_path, checkpoint, videos, classes):
    classifier = pipeline(TASK, model=checkpoint, dtype="bfloat16", device="cpu").fit(classes)
    classifier.save(tmp_path / "kept")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept", device="cpu")
    assert again.model.dtype == torch.bfloat16 and again(videos[7]) == classifier(videos[7])


@pytest.mark.slow
def test_kept_support_set_brings_its_model(tmp_path, checkpoint, videos, classes):
    classifier = pipeline(TASK, model=checkpoint, device="cpu").fit(classes)
    classifier.save(tmp_path / "kept")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept", device="cpu")
    assert again(videos[7]) == classifier(videos[7])
    os.rename(checkpoint, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="pass model="):
        FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept", model=str(tmp_path / "moved"))
    assert again.labels == list(classes)


HUB = """
import json, sys
from transformers import pipeline
import dmgal_hf
from dmgal_hf import DmgalModel, DmgalVideoProcessor, FewShotVideoClassificationPipeline

checkpoint, classes, query = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
DmgalModel.from_pretrained(checkpoint).push_to_hub("org/model")
DmgalVideoProcessor.from_pretrained(checkpoint).push_to_hub("org/model")
classifier = pipeline("few-shot-video-classification", model="org/model", device="cpu").fit(classes)
classifier.push_to_hub("org/actions")
again = FewShotVideoClassificationPipeline.from_pretrained("org/actions", device="cpu")
assert again(query) == classifier(query)
"""


@pytest.mark.slow
def test_support_set_on_the_hub(tmp_path, checkpoint, videos, classes):
    with LocalHub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
        arguments = [checkpoint, json.dumps(classes), videos[7]]
        done = subprocess.run(
            [sys.executable, "-c", HUB, *arguments], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        files = hub.files("org/actions")
        commit = hub.repos["models", "org/model"].branches["main"]
    assert sorted(files) == ["README.md", "support.json", "support.safetensors"]
    about = json.loads(files["support.json"])
    assert about["model"] == "org/model" and about["revision"] == commit and about["labels"] == list(classes)
    assert b"base_model: org/model" in files["README.md"]
    assert b'from_pretrained("org/actions")' in files["README.md"]


def test_peft_model(tmp_path, videos, classes, processor):
    model = get_peft_model(make_model("frozen"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu").fit(classes, unknown="auto")
    expected = plain_logits(classifier, classes, videos[7])
    scores = torch.cat([expected, torch.tensor([-classifier.unknown])]).softmax(0).tolist()
    assert by_label(classifier(videos[7])) == pytest.approx(dict(zip([*classes, "unknown"], scores)), abs=1e-5)
    classifier.save(tmp_path)
    with pytest.raises(ValueError, match="made with a model that was never saved or got adapters"):
        make_classifier("frozen").load(tmp_path)
    with pytest.raises(FileNotFoundError, match="got adapters afterwards, which is not here: pass model="):
        FewShotVideoClassificationPipeline.from_pretrained(tmp_path)
    again = FewShotVideoClassificationPipeline.from_pretrained(
        tmp_path, model=model, image_processor=processor, device="cpu"
    )
    assert again(videos[7]) == classifier(videos[7])


def test_same_video_in_two_classes_is_named(tmp_path, videos):
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(videos[0]).read_bytes())
    with pytest.warns(UserWarning, match=r"copy\.mp4 is an example of 'pull', and the same video is one of 'push'"):
        classifier = make_classifier().fit({"push": videos[:2], "pull": [videos[2], copy]})
    with pytest.warns(UserWarning, match=r"1\.mp4 is an example of 'lift', and the same video is one of 'push'"):
        classifier.add({"lift": videos[1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.add({"drop": videos[3]})


def test_bad_supports(tmp_path, videos, classes):
    classifier = make_classifier()
    for use in (lambda: classifier(videos[0]), lambda: classifier.stream(videos[0]), lambda: classifier.save(tmp_path),
                lambda: classifier.add(classes), lambda: classifier.labels):  # fmt: skip
        with pytest.raises(ValueError, match="no classes yet: call fit"):
            use()
    with pytest.raises(ValueError, match=r"has 1 class\(es\), \['push'\]"):
        classifier.fit({"push": videos})
    with pytest.raises(ValueError, match=r"support\['pull'\]` is empty"):
        classifier.fit({"push": videos[:2], "pull": []})
    with pytest.raises(ValueError, match="label 3 is a int"):
        classifier.fit({"push": videos[:2], 3: videos[2]})
    with pytest.raises(ValueError, match="not a list"):
        classifier.fit(videos)
    with pytest.raises(ValueError, match=r"splits \['train'\]: give one"):
        classifier.fit(DatasetDict(train=Dataset.from_dict({"video": videos[:2], "label": ["a", "b"]})))
    with pytest.raises(ValueError, match=r"every class needs two or more, but \['pull'\] has one"):
        classifier.fit({"push": videos[:2], "pull": videos[2]}, unknown="auto")
    with pytest.raises(ValueError, match="called 'unknown'"):
        classifier.fit({"push": videos[:2], "unknown": videos[2]}, unknown=3.0)
    with pytest.raises(ValueError, match="'automatic'; allowed are"):
        classifier.fit(classes, unknown="automatic")

    classifier.fit(classes)
    before = classifier(videos[7])
    (tmp_path / "notes.mp4").write_text("no video")
    for change in (classifier.fit, classifier.add):
        with pytest.raises(VideoDecodeError, match=r"notes\.mp4"):
            change({"push": videos[0], "pull": tmp_path / "notes.mp4"})
    with pytest.raises(ValueError, match="no class 'wave'"):
        classifier.remove("wave")
    with pytest.raises(ValueError, match="would leave"):
        classifier.remove("push", "pull")
    assert classifier(videos[7]) == before


def test_bad_queries(tmp_path, videos, classes):
    classifier = make_classifier().fit(classes)
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(VideoDecodeError, match=r"notes\.txt"):
        classifier([videos[0], tmp_path / "notes.txt"])
    with pytest.raises(VideoDecodeError, match=r"videos\[1\]"):
        classifier([videos[0], b"no video"])
    with pytest.raises(VideoDecodeError, match="cannot be a int"):
        classifier(7)
    with pytest.raises(VideoDecodeError, match=r"notes\.txt"):
        classifier([videos[0], tmp_path / "notes.txt"], num_workers=1)
    with pytest.raises(VideoDecodeError, match="'': no file has such a name"):
        classifier("")
    with pytest.raises(ValueError, match="top_k must be"):
        classifier(videos[0], top_k=0)
    for batch_size in (0, -1, 2.5, "3"):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            classifier.fit(classes, batch_size=batch_size)
    with pytest.raises(ValueError, match="unknown argument 'topk'"):
        classifier(videos[0], topk=1)
    with pytest.raises(ValueError, match="needs a DmgalModel, not a Linear"):
        FewShotVideoClassificationPipeline(torch.nn.Linear(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 8, "num_workers": 1}])
def test_a_list_with_broken_videos_is_answered(tmp_path, videos, classes, options):
    classifier = make_classifier().fit(classes)
    (tmp_path / "notes.txt").write_text("no video")
    queries = [tmp_path / "notes.txt", videos[7], b"no video", videos[0], tmp_path / "gone.mp4"]
    answers = classifier(queries, on_error="skip", **options)
    for number, name in ((0, "notes.txt"), (2, "videos[2]"), (4, "gone.mp4")):
        assert list(answers[number]) == ["error"] and name in answers[number]["error"]
    for number in (1, 3):
        assert [entry["label"] for entry in answers[number]] == [e["label"] for e in classifier(queries[number])]
        scores = [entry["score"] for entry in classifier(queries[number])]
        assert [entry["score"] for entry in answers[number]] == pytest.approx(scores, abs=1e-6)
    assert list(classifier((query for query in queries), on_error="skip"))[2]["error"].startswith("video <bytes>: ")
    assert list(classifier(tmp_path / "notes.txt", on_error="skip")) == ["error"]
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip", got None'):
        classifier(queries, on_error=None)


def plain_stream(classifier, video, fps, length, window, stride):
    """Every window by itself: its frames read from the file, as a video of its own."""
    num_frames, answers, number = classifier.image_processor.num_frames, [], 0
    while True:
        times = [number * stride + (i + 0.5) * window / num_frames for i in range(num_frames)]
        if times[-1] >= length / fps:
            return answers
        indices = [int(time * fps + 1e-6) for time in times]
        best = classifier(read_frames_at(video, indices), top_k=1)[0]
        answers.append((number * stride, number * stride + window, best["label"], best["score"]))
        number += 1


def alike(answers, expected):
    """Equal up to the rounding of windows that went through the model together or alone."""
    scores = [answer.score for answer in answers] == pytest.approx([answer.score for answer in expected], abs=1e-5)
    return scores and [answer[:3] for answer in answers] == [answer[:3] for answer in expected]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window, stride, batch_size", [(2.0, 0.5, None), (1.5, 0.4, 1), (0.8, 1.7, 2)])
def test_stream_is_as_every_window_alone(long_video, classes, kind, window, stride, batch_size):
    classifier = make_classifier(kind).fit(classes)
    expected = plain_stream(classifier, long_video, 10, 45, window, stride)
    counts = count_frames(classifier.model)
    answers = list(classifier.stream(long_video, window, stride, batch_size=batch_size))
    assert len(answers) == len(expected) and all(isinstance(answer, StreamedLabel) for answer in answers)
    for answer, plain in zip(answers, expected):
        assert answer[:2] == pytest.approx(plain[:2]) and answer.label == plain[2]
        assert answer.score == pytest.approx(plain[3], abs=1e-4)
    if kind == "ft" and stride == 0.5:  # half a second between the frames, which all windows share
        assert sum(counts) == 4 + len(answers) - 1


def test_stream_answers_as_it_goes(long_video, classes):
    classifier = make_classifier().fit(classes)
    counts = count_frames(classifier.model)
    answers = classifier.stream(long_video, batch_size=1)
    assert next(answers)[:2] == (0.0, 2.0) and sum(counts) == 4
    answers.close()


def test_stream_answers_what_comes_before_the_damage(tmp_path, classes):
    classifier = make_classifier().fit(classes)
    whole = Path(write_video(tmp_path / "whole.mp4", 51, frames=80, options={"movflags": "faststart"})).read_bytes()
    expected = list(classifier.stream(whole))
    answers = []
    with pytest.raises(VideoDecodeError):
        for answer in classifier.stream(whole[: len(whole) * 3 // 4]):
            answers.append(answer)
    assert answers and alike(answers, expected[: len(answers)])


def test_windows_are_read_ahead_and_no_further():
    made, closed = [], threading.Event()

    def windows():
        try:
            for number in range(20):
                made.append(number)
                yield number
            raise VideoDecodeError("a video", "damaged")
        finally:
            closed.set()

    def reader_threads():
        return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]

    ahead = read_ahead(windows(), 3)
    assert not made and not reader_threads(), "nothing begins before it is asked for"
    assert next(ahead) == 0
    deadline = time.monotonic() + 30
    while len(made) < 4 and time.monotonic() < deadline:  # the one that was asked for, and three that were not
        time.sleep(0.01)
    assert reader_threads()
    ahead.close()
    assert made == [0, 1, 2, 3] and closed.is_set() and not reader_threads()

    made.clear()
    closed.clear()
    came = []
    with pytest.raises(VideoDecodeError, match="damaged"):
        for number in read_ahead(windows(), 3):
            came.append(number)
    assert came == made == list(range(20)) and closed.is_set() and not reader_threads()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files can be listed on Linux alone")
@pytest.mark.parametrize("format", [None, "mp4"])  # with a format the video counts as live: no thread
def test_a_stream_that_is_left_lets_go_of_file_and_thread(long_video, classes, format):
    def held():
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("read_ahead")]
        files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return len(names), files.count(os.path.realpath(long_video))

    answers = make_classifier().fit(classes).stream(long_video, format=format, batch_size=1)
    assert held() == (0, 0)
    next(answers)
    assert held() == (0 if format else 1, 1)
    answers.close()
    assert held() == (0, 0)


@pytest.mark.slow
def test_stream_sources(tmp_path, videos, long_video, classes):
    classifier = make_classifier().fit(classes, unknown=0.0)
    expected = list(classifier.stream(long_video))
    assert {answer.label for answer in expected} == {"unknown"}
    with open(long_video, "rb") as file:
        assert list(classifier.stream(file)) == expected
    with open(long_video, "rb") as file:  # an object that can do no more than read
        assert alike(list(classifier.stream(SimpleNamespace(read=file.read))), expected)
    data = Path(long_video).read_bytes()
    assert list(classifier.stream(data)) == expected
    assert list(classifier.stream({"path": None, "bytes": data})) == expected
    handler = partial(SimpleHTTPRequestHandler, directory=str(Path(long_video).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = list(classifier.stream(f"http://127.0.0.1:{server.server_port}/long.mp4"))
        assert alike(answers, expected)
        server.shutdown()
    device = classifier.stream("testsrc=size=64x48:rate=10", format="lavfi")  # as endless as a camera
    assert [next(device)[:2] for _ in range(3)] == [(0.0, 2.0), (0.5, 2.5), (1.0, 3.0)]
    device.close()
    short = list(classifier.stream(videos[0], window=9))
    assert [answer[:2] for answer in short] == [(0.0, 2.0)]
    one_frame = write_video(tmp_path / "one.mp4", 3, frames=1)
    assert [answer[:2] for answer in classifier.stream(one_frame)] == [(0.0, 0.125)]


@pytest.mark.slow
def test_answers_are_of_one_support_set_where_the_classes_change(videos, long_video, classes):
    classifier = make_classifier().fit(classes)
    before = list(classifier.stream(long_video, stride=0.25))
    exchanged = {"lift": classes["push"], "push": classes["pull"], "pull": classes["lift"]}
    after = list(classifier.fit(exchanged).stream(long_video, stride=0.25))
    assert all(one.label != other.label for one, other in zip(before, after)) and len(before) == 11
    classifier.fit(classes)
    stream = classifier.stream(long_video, stride=0.25, batch_size=4)
    answers = [next(stream)]
    classifier.fit(exchanged)
    assert alike(answers + list(stream), before[:4] + after[4:])

    classifier.fit(classes)
    expected = classifier(videos[:4])
    answers = iter(classifier((video for video in videos[:4]), batch_size=4))
    first = next(answers)
    classifier.remove("lift")
    for answer, of_three in zip([first, *answers], expected):
        assert [entry["label"] for entry in answer] == [entry["label"] for entry in of_three]
    assert len(classifier(videos[0])) == 2


def test_truncated_stream(tmp_path, videos, long_video, classes):
    classifier = make_classifier().fit(classes)
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    with av.open(long_video) as source, av.open(str(whole), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    expected = list(classifier.stream(whole))
    content = whole.read_bytes()
    cut.write_bytes(content[: len(content) * 9 // 10])
    for source in (cut, cut.read_bytes(), cut.open("rb")):
        answers = []
        with pytest.raises(VideoDecodeError, match=r"truncated: the file has .* more are missing"):
            for answer in classifier.stream(source, batch_size=1):
                answers.append(answer)
        assert 0 < len(answers) < len(expected) and alike(answers, expected[: len(answers)])


def test_stream_of_a_pipe_does_not_wait_for_frames_that_nobody_asked_for(tmp_path, classes):
    classifier = make_classifier().fit(classes)
    content = Path(write_video(tmp_path / "long.ts", 50, frames=300, fps=10)).read_bytes()
    reading, writing = os.pipe()

    def feed():
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, content)

    threading.Thread(target=feed, daemon=True).start()
    with open(reading, "rb", buffering=0) as pipe:  # whose end never comes
        stream = classifier.stream(pipe)
        assert next(stream)[:2] == (0.0, 2.0)
        closing = threading.Thread(target=stream.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive()
    os.close(writing)


def test_the_first_window_of_a_pipe_comes_with_its_frames(tmp_path, classes):
    """However much more FFmpeg would like to see of a format as it opens it, as of VP9 five seconds."""
    classifier, answers = make_classifier().fit(classes), []
    content = Path(write_video(tmp_path / "short.webm", 50, frames=40, fps=10, codec="libvpx-vp9")).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with open(os.open(tmp_path / "pipe", os.O_RDWR), "wb", buffering=0) as pipe:  # whose end never comes
        waiting = threading.Thread(
            target=lambda: answers.append(next(classifier.stream(tmp_path / "pipe", window=1.0))), daemon=True
        )
        waiting.start()
        pipe.write(content)
        waiting.join(60)
    assert [answer[:2] for answer in answers] == [(0.0, 1.0)]


def test_bad_streams(tmp_path, videos, classes):
    classifier = make_classifier().fit(classes)
    (tmp_path / "notes.txt").write_text("no video")
    for bad, message in ((tmp_path / "notes.txt", "notes.txt"), (tmp_path / "none.mp4", "none.mp4"),
                         (99, "camera 99"), (None, "cannot be a NoneType")):  # fmt: skip
        with pytest.raises(VideoDecodeError, match=message):
            list(classifier.stream(bad))
    for name in ("window", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be a number of seconds, at least 0.001, got 0"):
            classifier.stream(videos[0], **{name: 0})
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        classifier.stream(videos[0], batch_size=0)


@pytest.mark.slow
def test_predict_script(tmp_path, checkpoint, videos, classes, monkeypatch, capsys):
    for label, of_class in classes.items():
        (tmp_path / "support" / label).mkdir(parents=True)
        for video in of_class:
            (tmp_path / "support" / label / Path(video).name).symlink_to(video)
    (tmp_path / "query").mkdir()
    (tmp_path / "query" / "good.mp4").symlink_to(videos[7])
    (tmp_path / "query" / "bad.mp4").write_text("no video")

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["predict.py", "--model", checkpoint, *map(str, options)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "predict.py"), run_name="__main__")
        return stop.value.code, capsys.readouterr().out.splitlines()

    answers = tmp_path / "answers.json"
    code, rows = run("--support", tmp_path / "support", "--query", tmp_path / "query", "--top_k", 2, "--json", answers,
                     "--save", tmp_path / "kept")  # fmt: skip
    assert code == 1
    bad, good = json.loads(answers.read_text())["answers"]
    expected = pipeline(TASK, model=checkpoint, device="cpu").fit(dict(sorted(classes.items())))(videos[7], top_k=2)
    assert good["predictions"] == expected and "bad.mp4" in bad["error"]
    assert len(rows) == 2 and f"{expected[0]['label']} {expected[0]['score']:.3f}" in rows[1]

    code, again = run("--support", tmp_path / "kept", "--query", videos[7])
    assert code == 0 and rows[1].split()[1:3] == again[0].split()[1:3]
    with pytest.raises(ValueError, match="needs the clips"):
        run("--support", tmp_path / "kept", "--query", videos[7], "--unknown", "auto")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run("--support", tmp_path / "query", "--query", videos[7])

    pictures = tmp_path / "frames"
    pictures.mkdir()
    for number in range(4):
        Image.new("RGB", (40, 32), (60 * number, 0, 0)).save(pictures / f"{number}.png")
    assert len(run("--support", tmp_path / "kept", "--query", pictures)[1]) == 1
    (tmp_path / "query" / "thumbnail.png").symlink_to(pictures / "0.png")
    (tmp_path / "query" / "._hidden.jpg").write_text("as macOS leaves it")
    with pytest.raises(ValueError, match=r"query holds pictures \(.*thumbnail.png\) beside other files"):
        run("--support", tmp_path / "kept", "--query", tmp_path / "query")
    (tmp_path / "query" / "thumbnail.png").unlink()
    assert len(run("--support", tmp_path / "kept", "--query", tmp_path / "query")[1]) == 2
    (tmp_path / "support" / "lift" / "0.png").symlink_to(pictures / "0.png")
    with pytest.raises(ValueError, match=r"0.png is a picture, not a clip"):
        run("--support", tmp_path / "support", "--query", videos[7])
    with pytest.raises(ValueError, match="--unknown far: give auto or a distance"):
        run("--support", tmp_path / "kept", "--query", videos[7], "--unknown", "far")
    monkeypatch.chdir(tmp_path)
    Path("-M8qt69nljE_000030.mp4").symlink_to(videos[7])
    code, dashed = run("--support", tmp_path / "kept", "--query", "-M8qt69nljE_000030.mp4")
    assert code == 0 and dashed[0].split()[1:] == again[0].split()[1:]
    handler = partial(SimpleHTTPRequestHandler, directory=str(Path(videos[7]).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, of_url = run("--support", tmp_path / "kept", "--query", f"http://127.0.0.1:{server.server_port}/7.mp4")
        server.shutdown()
    assert code == 0 and of_url[0].split()[1:] == again[0].split()[1:]


@pytest.mark.slow
def test_importing_dmgal_hf_does_not_import_datasets():
    """It takes longer than all the rest, and who classifies files does not need it before the first fit."""
    code = "import sys, dmgal_hf; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
