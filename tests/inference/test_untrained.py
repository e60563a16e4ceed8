"""Public backbones in the pipeline without any training, and names of classes as text."""

import gc
import json
import os
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, LocalHub
from test_pipeline import write_video
from towers import FAMILIES, MEAN, SMALL, VISION, make_towers, save_towers
from transformers import (
    BertConfig,
    BertModel,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

from dmgal_hf import DmgalModel, DmgalVideoProcessor, FewShotVideoClassificationPipeline
from dmgal_hf.inference.support_sets import support_card
from dmgal_hf.model import modeling_dmgal
from dmgal_hf.model.class_texts import combined_logits

TASK = "few-shot-video-classification"
ONE_TOWER = {
    "vit": lambda: ViTModel(ViTConfig(**VISION)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=32, patch_size=8)),
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SMALL, image_size=32, patch_size=8)),
    "resnet": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
    "convnext": lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
}
IMAGE_PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875,
                 "resample": 3},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing here has trained")


def save_backbone(folder, family):
    if family in FAMILIES:
        return save_towers(folder, family)
    torch.manual_seed(0)
    ONE_TOWER[family]().save_pretrained(folder)
    kind = "convnext" if family in ("convnext", "resnet") else "vit"
    fields = {**IMAGE_PROCESSORS[kind], "do_resize": True, "do_normalize": True, "image_mean": MEAN,
              "image_std": [0.2, 0.2, 0.2], "do_rescale": True, "rescale_factor": 1 / 255}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{seed}.mp4", seed) for seed in range(8)]


@pytest.fixture(scope="module")
def classes(videos):
    return {"push left": videos[:2], "pull_right": videos[2:5], "lift": videos[5:7]}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_towers(folder, "clip")
    return str(folder)


@pytest.fixture
def classifier(clip):
    return pipeline(TASK, model=clip, device="cpu")


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


def by_label(answer):
    return {entry["label"]: entry["score"] for entry in answer}


@torch.no_grad()
def both_logits(classifier, classes, query):
    """What clips say and what text says, by the model itself: (N,) each."""
    episode = classifier.image_processor(support=classes, query=[query])
    by_clips = classifier.model(**episode).logits[0, 0]
    text_embeds = classifier.model.embed_class_names(list(classes))[None]
    return by_clips, classifier.model(**episode, text_embeds=text_embeds).text_logits[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *ONE_TOWER])
def test_any_public_backbone_by_its_folder(tmp_path, family, classes, videos):
    save_backbone(tmp_path, family)
    with pytest.warns(UserWarning, match=f"{tmp_path.name} is a backbone .* nothing here has trained.*sees no motion"):
        classifier = pipeline(TASK, model=str(tmp_path), device="cpu")
    model, processor = classifier.model, classifier.image_processor
    expected = DmgalVideoProcessor.from_pretrained(tmp_path)
    assert processor.to_dict() == expected.to_dict() and processor.image_mean == MEAN
    assert processor(videos[0]).pixel_values.shape == (1, 8, 3, 32, 32)
    has_class_token = family in ("clip", "metaclip_2", "vit", "dinov2", "dinov3_vit")
    assert model.config.frame_pooling == ("cls" if has_class_token else "mean")
    assert model.config.text_guidance == (family in FAMILIES) and not model.training
    assert not any(one.requires_grad for one in model.parameters())

    answer = by_label(classifier.fit(classes)(videos[7]))
    if family in FAMILIES:
        by_clips, by_text = both_logits(classifier, classes, videos[7])
        scores = (by_clips.log_softmax(0) + by_text.log_softmax(0)).softmax(0)
    else:
        scores = model(**processor(support=classes, query=[videos[7]])).logits[0, 0].softmax(0)
    assert answer == pytest.approx(dict(zip(classes, scores.tolist())), abs=1e-5)

    # A kept support set finds its model again, and so does a saved model.
    classifier.save(tmp_path / "kept")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept", device="cpu")
    assert by_label(again(videos[7])) == pytest.approx(answer, abs=1e-6)
    classifier.save_pretrained(tmp_path / "saved")
    saved = pipeline(TASK, model=str(tmp_path / "saved"), device="cpu").fit(classes)
    assert by_label(saved(videos[7])) == pytest.approx(answer, abs=1e-6)


@pytest.mark.slow
def test_an_object_keeps_what_it_has(tmp_path, clip, classes, videos):
    save_backbone(tmp_path, "vit")
    vit = ViTModel.from_pretrained(tmp_path)
    pipeline(TASK, model=vit, device="cpu").fit(classes)
    assert vit.pooler is not None
    towers = CLIPModel.from_pretrained(clip)
    expected = pipeline(TASK, model=clip, device="cpu").fit(classes)(videos[7])
    assert pipeline(TASK, model=towers, device="cpu").fit(classes)(videos[7]) == expected
    # Nobody knows where the text tower of a nameless object could be read.
    processor = DmgalVideoProcessor.from_pretrained(clip)
    nameless = pipeline(TASK, model=make_towers("clip"), image_processor=processor, device="cpu")
    assert nameless.text_weight == 0 and len(nameless.fit(classes)(videos[7])) == 3


@pytest.mark.slow
def test_fields_of_the_model_are_kept_with_the_supports(tmp_path, clip, classes, videos):
    model = DmgalModel.from_backbone(clip, paradigm="adapter", alignment="otam", num_frames=4, text_guidance=True)
    processor = DmgalVideoProcessor.from_pretrained(clip, num_frames=4)
    classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu").fit(classes)
    classifier.save(tmp_path / "kept")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "kept", device="cpu")
    assert (again.model.config.alignment, again.model.config.num_frames) == ("otam", 4)
    assert again(videos[7]) == classifier(videos[7])
    shutil.copytree(clip, tmp_path / "moved")
    moved = FewShotVideoClassificationPipeline.from_pretrained(
        tmp_path / "kept", str(tmp_path / "moved"), device="cpu"
    )
    assert moved(videos[7]) == classifier(videos[7])
    with pytest.raises(ValueError, match="model_fields are for a bare backbone"):
        pipeline(TASK, model=model, image_processor=processor, model_fields={"alignment": "mean"})

    assert 'from_pretrained("org/x", model="FOLDER_OR_ID")' in support_card("org/x", None, {"a": 1})


@pytest.mark.slow
def test_a_model_of_no_checkpoint_is_kept_beside_its_support_set(tmp_path, clip, classes, videos, hub):
    """One with a head of random weights and text, and one with random adapters: on disk and over the Hub."""
    processor = DmgalVideoProcessor.from_pretrained(clip, num_frames=4)
    models = {
        "head": DmgalModel.from_backbone(clip, paradigm="ft", num_frames=4, text_guidance=True),
        "adapters": DmgalModel.from_backbone(clip, paradigm="adapter", num_frames=4, adapter_config={"reduction": 2}),
    }
    for name, model in models.items():
        classifier = pipeline(TASK, model=model, image_processor=processor, device="cpu").fit(classes)
        classifier.save(tmp_path / name)
        again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / name, device="cpu")
        assert by_label(again(videos[7])) == pytest.approx(by_label(classifier(videos[7])), abs=1e-5)
    with pytest.raises(ValueError, match="weights, config or preprocessing differ"):
        classifier.load(tmp_path / "head")

    # The set may move, and what was loaded from it can be fitted and kept anew, also in its place.
    shutil.move(tmp_path / "head", tmp_path / "moved")
    again = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "moved", device="cpu")
    expected = again.fit({"push left": videos[5:7], "tilt": videos[:2]}, text_weight=1.0)(videos[7])
    for folder in (tmp_path / "moved", tmp_path / "copy"):
        again.save(folder)
    shutil.rmtree(tmp_path / "moved")
    kept = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert by_label(kept(videos[7])) == pytest.approx(by_label(expected), abs=1e-5)

    script = (
        "import json, sys\n"
        "from dmgal_hf import FewShotVideoClassificationPipeline as Classifier\n"
        "folder, query, token = sys.argv[1:]\n"
        "Classifier.from_pretrained(folder, device='cpu').push_to_hub('org/actions', token=token)\n"
        "print(json.dumps(Classifier.from_pretrained('org/actions', device='cpu')(query)))\n"
    )
    env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script, tmp_path / "copy", videos[7], TOKEN]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert by_label(json.loads(result.stdout.splitlines()[-1])) == pytest.approx(by_label(expected), abs=1e-5)
    files = hub.files("org/actions")
    assert {"support.json", "support_model/model.safetensors", "support_model/preprocessor_config.json"} <= set(files)
    assert b'from_pretrained("org/actions")' in files["README.md"] and b"base_model" not in files["README.md"]


@pytest.mark.slow
def test_over_the_hub_and_then_without_it(hub, tmp_path, classes, videos):
    """By id, as the README's first example; then offline from the cache; a pushed support set names the backbone."""
    save_towers(tmp_path / "clip", "clip")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import dmgal_hf\n"
        "from transformers import pipeline\n"
        "classes, query, action = json.loads(sys.argv[1])\n"
        "if action == 'push':\n"
        "    from huggingface_hub import HfApi\n"
        f"    api = HfApi(token='{TOKEN}')\n"
        "    api.create_repo('org/clip')\n"
        f"    api.upload_folder(repo_id='org/clip', folder_path='{tmp_path / 'clip'}')\n"
        f"clf = pipeline('{TASK}', model='org/clip', device='cpu').fit(classes)\n"
        "answers = [clf(query)]\n"
        "if action == 'push':\n"
        f"    clf.push_to_hub('org/actions', token='{TOKEN}')\n"
        "    clf = dmgal_hf.FewShotVideoClassificationPipeline.from_pretrained('org/actions', device='cpu')\n"
        "    answers.append(clf(query))\n"
        "print(json.dumps(answers))\n"
    )

    def run(action, **env):
        env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
               **env}  # fmt: skip
        command = [sys.executable, str(script), json.dumps([classes, videos[7], action])]
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    expected, pushed = run("push")
    assert run("fit", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1") == [expected]
    assert pushed == expected
    card = hub.files("org/actions")["README.md"]
    assert b"base_model: org/clip" in card and b'from_pretrained("org/actions")' in card


def test_what_is_no_backbone_says_what_is(tmp_path, clip):
    bert = BertModel(BertConfig(**SMALL, vocab_size=9))
    with pytest.raises(ValueError, match=r'no model of pictures.*DmgalModel.from_backbone\(X, paradigm="adapter"\)'):
        pipeline(TASK, model=bert)
    with pytest.raises(ValueError, match=r"needs a DmgalModel, not a Linear.*from_backbone"):
        FewShotVideoClassificationPipeline(torch.nn.Linear(1, 1))


# Text


@pytest.mark.slow
def test_weights_of_text(classifier, classes, videos):
    by_clips, by_text = both_logits(classifier, classes, videos[7])
    assert classifier.text_weight == 1
    for weight in (0.0, 0.3, 4.0):
        scores = (by_clips.log_softmax(0) + weight * by_text.log_softmax(0)).softmax(0)
        answer = by_label(classifier.fit(classes, text_weight=weight)(videos[7]))
        assert answer == pytest.approx(dict(zip(classes, scores.tolist())), abs=1e-5)
    classifier.temperature, classifier.text_weight = 0.5, 2.0
    scores = ((by_clips / 0.5).log_softmax(0) + 2 * by_text.log_softmax(0)).softmax(0)
    assert by_label(classifier(videos[7])) == pytest.approx(dict(zip(classes, scores.tolist())), abs=1e-5)


@pytest.mark.slow
def test_text_costs_the_text_tower_once_and_a_product_a_query(classifier, classes, videos, monkeypatch):
    towers, passes = [], []
    load = modeling_dmgal.load_text_tower

    def watch(*args):
        tower, tokenizer = load(*args)
        tower.register_forward_hook(lambda *_: passes.append(1))
        towers.append(weakref.ref(tower))
        return tower, tokenizer

    monkeypatch.setattr(modeling_dmgal, "load_text_tower", watch)
    frames = []
    classifier.model.backbone.register_forward_hook(lambda module, args, output: frames.append(len(output[0])))
    classifier.fit(classes)
    gc.collect()
    assert len(passes) == len(towers) == 1 and towers[0]() is None
    assert sum(frames) == 7 * 8
    classifier([videos[7], videos[0]])
    assert len(passes) == 1 and sum(frames) == 9 * 8


@pytest.mark.slow
def test_descriptions(classifier, classes, videos):
    classifier.fit(classes)
    plain = classifier._current.text_embeds
    classifier.fit(classes, descriptions={"lift": "a hand lifts the cup off a table"})
    described = classifier._current.text_embeds
    assert torch.equal(plain[:2], described[:2]) and not torch.allclose(plain[2], described[2])
    with pytest.raises(ValueError, match=r"descriptions has 'lif', which is no class"):
        classifier.fit(classes, descriptions={"lif": "a hand"})
    with pytest.raises(ValueError, match="text is left out: text_weight is 0"):
        classifier.fit(classes, descriptions={"lift": "a hand"}, text_weight=0)


@pytest.mark.slow
def test_classes_of_text_alone(tmp_path, classifier, classes, videos):
    """Some without clips, and all without: then the scores are those of the two towers alone."""
    some = {**classes, "pull_right": []}
    answer = by_label(classifier.fit(some)(videos[7]))
    clips = {label: of_class for label, of_class in classes.items() if label != "pull_right"}
    by_clips, _ = both_logits(classifier, clips, videos[7])
    _, by_text = both_logits(classifier, classes, videos[7])
    p = by_clips.softmax(0)
    product = torch.stack([p[0], torch.tensor(0.5), p[1]]) * by_text.softmax(0)
    assert answer == pytest.approx(dict(zip(classes, (product / product.sum()).tolist())), abs=1e-5)
    classifier.save(tmp_path / "some")
    kept = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "some", device="cpu")
    assert by_label(kept(videos[7])) == pytest.approx(answer, abs=1e-6)
    with pytest.raises(ValueError, match=r"text_weight must be above 0 for \['pull_right'\]"):
        classifier.text_weight = 0
    with pytest.raises(ValueError, match=r"\['pull_right'\] has one or none"):
        classifier.calibrate()
    with pytest.raises(ValueError, match=r"`unknown` is a distance to clips, and \['pull_right'\] have none"):
        classifier.fit(some, unknown=3.0)
    # Clips that come later are added.
    later = kept.add({"pull_right": classes["pull_right"]})
    full = {label: classes[label] for label in classes}
    assert by_label(later(videos[7])) == pytest.approx(by_label(classifier.fit(full)(videos[7])), abs=1e-5)

    answer = by_label(classifier.fit(dict.fromkeys(classes))(videos[7]))
    assert answer == pytest.approx(dict(zip(classes, by_text.softmax(0).tolist())), abs=1e-5)
    classifier.save(tmp_path / "all")
    kept = FewShotVideoClassificationPipeline.from_pretrained(tmp_path / "all", device="cpu")
    assert kept(videos[7]) == classifier(videos[7]) and kept.remove("lift").labels == ["push left", "pull_right"]
    with pytest.raises(ValueError, match=r"`support\['lift'\]` is empty"):
        classifier.fit({**classes, "lift": []}, text_weight=0)


@pytest.mark.slow
def test_adding_and_removing_classes_with_text(classifier, classes, videos):
    expected = classifier.fit(classes)(videos[7])
    classifier.fit({label: classes[label] for label in ("push left", "pull_right")})
    classifier.add({"lift": classes["lift"]}, descriptions=None)
    assert by_label(classifier(videos[7])) == pytest.approx(by_label(expected), abs=1e-6)
    with pytest.raises(ValueError, match="'lift' and 'Lift' read the same"):
        classifier.add({"Lift": videos[7:]})
    two = by_label(classifier.remove("pull_right")(videos[7]))
    again = classifier.fit({label: classes[label] for label in ("push left", "lift")})
    assert two == pytest.approx(by_label(again(videos[7])), abs=1e-6)


def test_calibration_sets_temperature_and_weight_together(classifier, classes, videos):
    classifier.fit(classes)
    temperature = classifier.calibrate()
    by_clips = classifier._leave_one_out(classifier._current, "").double()
    embeds = classifier.support.states["text.videos"][0]
    by_text = classifier.model.text_logits(embeds, classifier._current.text_embeds).log_softmax(-1).double()
    own = [0, 0, 1, 1, 1, 2, 2]
    targets = torch.full((7, 3), 0.1).double()
    targets[range(7), own] = 0.8

    def fit(temperature, weight):
        return float((combined_logits(by_clips, by_text, temperature, weight) / temperature).log_softmax(-1)
                     .mul(targets).sum())  # fmt: skip

    best = fit(temperature, classifier.text_weight)
    others = [fit(10**t, w) for t in torch.linspace(-3, 2, 101).tolist() for w in (0, 0.01, 0.1, 1, 10)]
    assert best >= max(others)
    classifier.fit(classes, text_weight=0)
    classifier.calibrate()
    assert classifier.text_weight == 0


def test_unknown_beside_text(classifier, classes, videos):
    """Without text the rule is as ever; with text, unknown has chance for its text."""
    classifier.fit(classes, unknown=2.0)
    by_clips, by_text = both_logits(classifier, classes, videos[7])
    logits = torch.cat([by_clips, torch.tensor([-2.0])]).log_softmax(0)
    text = torch.cat([by_text.log_softmax(0), torch.tensor([1 / 3]).log()])
    expected = dict(zip([*classes, "unknown"], (logits + text).softmax(0).tolist()))
    assert by_label(classifier(videos[7])) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_streams_and_query_models_with_text(classifier, classes, tmp_path):
    long_video = write_video(tmp_path / "long.mp4", 50, frames=32, fps=8)
    classifier.fit(classes)
    (whole,) = classifier.stream(long_video, window=4.0, stride=4.0, batch_size=1)
    best = classifier(long_video)[0]
    assert (whole.label, whole.score) == (best["label"], pytest.approx(best["score"], abs=1e-5))
    some = list(classifier.stream(long_video, window=1.0, stride=0.5))
    assert some == [
        (start, end, label, pytest.approx(score, abs=1e-5))
        for start, end, label, score in classifier.stream(long_video, window=1.0, stride=0.5, batch_size=3)
    ]
    classifier.temperature, classifier.text_weight = 0.3, 0.7
    pixel_values = classifier.image_processor(long_video).pixel_values
    queries = classifier.query_model()
    scores = (queries(pixel_values)[0] / 0.3).softmax(-1)
    assert dict(zip(classes, scores.tolist())) == pytest.approx(by_label(classifier(long_video)), abs=1e-5)
    program = torch.export.export(queries, (pixel_values,)).module()
    torch.testing.assert_close(program(pixel_values), queries(pixel_values))


def test_text_where_there_is_none(tmp_path, classifier, classes, videos):
    save_backbone(tmp_path, "vit")
    vit = pipeline(TASK, model=str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="'vit' has none: leave text_guidance and text_weight out"):
        vit.fit(classes, text_weight=1.0)
    for weight in (-1, float("inf"), float("nan"), "1"):
        with pytest.raises(ValueError, match=r"text_weight must lie in \[0, inf\)"):
            classifier.fit(classes, text_weight=weight)
    classifier.fit(classes, text_weight=0)
    with pytest.raises(ValueError, match="fitted without text: fit again"):
        classifier.text_weight = 1.0
    fitted = classifier._current
    with pytest.raises(ValueError, match="'lift' and 'Lift' read the same"):
        classifier.fit({**classes, "Lift": videos[7:]}, text_weight=1)
    assert classifier._current is fitted and classifier.text_weight == 0  # nothing has changed


@pytest.mark.slow
def test_predict_from_the_command_line(clip, classes, videos, tmp_path):
    for label, clips in classes.items():
        for number, path in enumerate(clips):
            (tmp_path / "support" / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "support" / label / f"{number}.mp4")
    predict = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "predict.py"))
    for weight in (None, 0.0):
        arguments = predict["PredictArguments"](
            model=clip, support=str(tmp_path / "support"), query=videos[7], json=str(tmp_path / "answers.json"),
            text_weight=weight,
        )  # fmt: skip
        assert predict["main"](arguments) == 0
        (answer,) = json.loads((tmp_path / "answers.json").read_text())["answers"]
        expected = pipeline(TASK, model=clip, device="cpu").fit(classes, text_weight=weight)(videos[7])
        assert by_label(answer["predictions"]) == pytest.approx(by_label(expected), abs=1e-4)


@pytest.mark.slow
def test_pictures_and_the_page_of_an_untrained_backbone(clip, classes, videos, tmp_path):
    """The scores on the sheet are those of the answer, with text."""
    from dmgal_hf.inference.demo import classify

    classifier = pipeline(TASK, model=clip, device="cpu")
    scores, sheet, fitted = classify(classifier, videos[7], False, None, list(classes), list(classes.values()))
    assert scores == pytest.approx(by_label(fitted[1](videos[7])), abs=1e-6)
    (axes,) = [axes for axes in sheet.axes if axes.get_label() == "scores"]
    shown = dict(zip(classes, [bar.get_width() for bar in axes.patches]))
    assert shown == pytest.approx(scores, abs=1e-5)
    for label, clips in classes.items():
        (tmp_path / "support" / label).mkdir(parents=True)
        shutil.copy(clips[0], tmp_path / "support" / label)
    visualize = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "visualize.py"))
    visualize["main"](
        visualize["VisualizeArguments"](
            model=clip, support=str(tmp_path / "support"), query=videos[7], output=str(tmp_path / "out")
        )
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["episode.png"]
