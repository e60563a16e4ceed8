"""The demo page: what its button does, and the page itself in a real browser."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from browser import CHROMEDRIVER, CHROMIUM, free_port, open_browser, wait_for
from transformers import ResNetConfig, pipeline

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install dmgal-hf[demo]")
pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install dmgal-hf[demo]")

from dmgal_hf.inference import demo  # noqa: E402

APP = Path(__file__).parents[2] / "scripts" / "demo" / "app.py"
NAMES = list(demo.EXAMPLES)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return demo.write_examples(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    DmgalModel(DmgalConfig(backbone_config=backbone, num_frames=4)).save_pretrained(folder)
    DmgalVideoProcessor(num_frames=4, size=64, crop_size=64).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(checkpoint):
    return pipeline("few-shot-video-classification", model=checkpoint, device="cpu")


@pytest.mark.slow
def test_classify(classifier, clips):
    query = clips["circle"][2]
    rows = [*NAMES, "", "", ""], [*(clips[name][:2] for name in NAMES), None, None, []]
    scores, sheet, fitted = demo.classify(classifier, query, False, None, *rows)
    own = pipeline("few-shot-video-classification", model=classifier.model, device="cpu")
    expected = own.fit({name: clips[name][:2] for name in NAMES})(query)
    assert scores == pytest.approx({entry["label"]: entry["score"] for entry in expected}, abs=1e-6)
    (bars,) = [axes for figure in sheet.subfigs[1].subfigs for axes in figure.axes if axes.get_label() == "scores"]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([scores[name] for name in NAMES], abs=1e-5)
    with pytest.raises(ValueError, match="no classes yet"):
        classifier.labels  # noqa: B018 - visitors do not share their classes

    counts = []
    hook = classifier.model.backbone.register_forward_hook(
        lambda module, args, kwargs, output: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    assert demo.classify(classifier, query, False, fitted, *rows)[0] == scores
    assert sum(counts) == 2 * 4  # the query for the scores and for the sheet, no example again
    assert "unknown" in demo.classify(classifier, query, True, fitted, *rows)[0]
    hook.remove()


def test_messages(classifier, clips, tmp_path, monkeypatch):
    one, two, query = clips["circle"][:1], clips["roll left"][:1], clips["circle"][2]
    notes = tmp_path / "notes.mp4"
    notes.write_text("no video")
    for names, files, new, unknown, message in (
        (["a", "b"], [one, two], None, False, "no new clip"),
        (["a", ""], [one, None], query, False, "Two classes are needed"),
        (["a", "b"], [one, None], query, False, "Class 2, 'b', has no clips"),
        (["a", " "], [one, two], query, False, "Class 2 has clips and no name"),
        (["a", "a "], [one, two], query, False, "Two classes are called 'a'"),
        (["a", "b"], [one, [str(notes)]], query, False, "^'?notes.mp4: .*Take another"),
        (["a", "b"], [one, two], str(notes), False, "^'?notes.mp4: .*Take another"),
        (["a", "b"], [one, two], query, True, "every class needs two or more"),
    ):
        with pytest.raises(gr.Error, match=message):
            demo.classify(classifier, new, unknown, None, names, files)
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    demo.classify(classifier, query, False, None, ["a", "b"], [one, [*one, *two]])
    assert said == [f"{Path(one[0]).name} is an example of 'b', and the same video is one of 'a': the two cannot be "
                    "told apart by it"]  # fmt: skip


def test_uploads_that_are_not_taken(clips, tmp_path):
    good = clips["circle"][0]
    demo.check_upload(good, 60)
    with pytest.raises(gr.Error, match=r"circle_ccw_0\.mp4 lasts \d+ s: take a clip of at most 0\.5 s"):
        demo.check_upload(good, 0.5)
    frames = tmp_path / "frames.mp4"
    with zipfile.ZipFile(frames, "w") as archive:
        archive.writestr("1.jpg", b"")
    cache = tmp_path / "cache.arrow#0"
    cache.write_bytes(Path(good).read_bytes())
    for path in (frames, cache):
        with pytest.raises(gr.Error, match=rf"^'?{path.name} is no video file"):
            demo.check_upload(str(path), 60)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(gr.Error, match=r"^'?broken\.mp4: .*Take another") as caught:
        demo.check_upload(str(broken), 60)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(gr.Error, match="'a' has 11 clips: give at most 10"):
        demo.read_classes(["a", "b"], [[good] * 11, [good]])


@pytest.fixture(scope="module")
def page(checkpoint, tmp_path_factory):
    """Address of the page, served by a process of its own, which leaves no file behind."""
    port, temporary = free_port(), tmp_path_factory.mktemp("temporary")
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "DMGAL_MODEL": checkpoint,
                   "TMPDIR": str(temporary)}  # fmt: skip
    server = subprocess.Popen([sys.executable, str(APP), "--port", str(port), "--max_file_mb", "1"], env=environment)

    def answers():
        assert server.poll() is None, "the demo ended"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/").status == 200
        except OSError:
            return False

    try:
        wait_for(answers, "the demo", 120)
        yield f"http://127.0.0.1:{port}/"
    finally:
        assert any(temporary.glob("dmgal_demo_*"))
        server.terminate()
        server.wait()
    assert not [path.name for path in temporary.iterdir() if "dmgal" in path.name or "gradio" in path.name]


@pytest.mark.slow
def test_page_refuses_large_files_and_ends_without_leavings(page):
    for size, status in ((1_000, 200), (2_000_000, 413)):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
        request = urllib.request.Request(f"{page}gradio_api/upload", head + bytes(size) + b"\r\n--x--\r\n")
        request.add_header("Content-Type", "multipart/form-data; boundary=x")
        try:
            assert urllib.request.urlopen(request).status == status
        except urllib.error.HTTPError as error:
            assert error.code == status


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs Debian's packages chromium and chromium-driver")
def test_page_in_a_browser(page, classifier, clips, tmp_path):
    names = NAMES[:2]
    with open_browser(tmp_path / "profile") as browser:
        browser.open(page)
        for number, name in enumerate(names):
            browser.type(f"#name-{number} textarea, #name-{number} input", name)
            browser.type(f"#clips-{number} input[type=file]", "\n".join(clips[name][:2]))
            wait_for(lambda n=number: "_1" in browser.text(f"#clips-{n}"), "the uploaded clips")
        browser.click("#classify")
        wait_for(lambda: "no new clip" in browser.text("body"), "the message")

        browser.type("#query input[type=file]", clips[names[1]][2])
        browser.find("#query video")
        browser.click("#classify")
        answer = wait_for(lambda: browser.text("#scores h2"), "the label")
        own = pipeline("few-shot-video-classification", model=classifier.model, device="cpu")
        expected = own.fit({name: clips[name][:2] for name in names})(clips[names[1]][2])
        assert answer.strip() == expected[0]["label"]
        assert f"{expected[0]['score']:.0%}" in browser.text("#scores")
        browser.find("#sheet img")

        browser.click("#example")
        wait_for(lambda: "up_and_back_1" in browser.text("#clips-1"), "the example")
