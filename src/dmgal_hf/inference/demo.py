"""A web page to try a model on: clips a class, a query, its scores and the episode sheet. Needs the extra `demo`."""

import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, pipeline

from ..data.made_up_videos import encode_frames
from ..data.motion_shapes import render_clip
from ..data.splits import VIDEO_SUFFIXES
from ..model.video_decoding import VideoDecodeError, probe_video
from ..model.zip_archive import LOCAL_HEADER
from .pipeline import TASK, FewShotVideoClassificationPipeline

try:
    import gradio as gr

    from .visualization import plot_episode
except ImportError as error:
    raise ImportError("dmgal_hf.inference.demo needs Gradio and matplotlib: pip install dmgal-hf[demo]") from error

MAX_CLASSES = 6
MAX_CLIPS = 10  # of a class
MAX_WAITING = 20  # visitors in the queue
A_DAY, AN_HOUR = 86_400, 3_600  # seconds
SHOWN_CLASSES = 3
EXAMPLES = {"circle": "circle_ccw", "up and back": "up_and_back", "roll left": "roll_left"}  # novel motion shapes
ABOUT = """# Few-shot action recognition
Name two or more actions, give each a few short clips, and drop a new clip to be named. Nothing is trained: the new
clip is compared with yours by how things move in it."""


def build_demo(
    model: str | os.PathLike | PreTrainedModel, device: str = "cpu", max_seconds: float = 60.0
) -> gr.Blocks:
    """
    The page as a Gradio app; `launch(max_file_size="100mb")` serves it. Visitors wait in a queue, and one is answered
    at a time. What they upload is removed after a day.

    Args:
        model (`str`, `os.PathLike` or `PreTrainedModel`): id or folder of a checkpoint with its processor.
        device (`str`): where the model runs.
        max_seconds (`float`): longer clips are refused.

    Raises:
        ValueError: it is neither a DMGAL checkpoint nor an image backbone, or has no processor. `OSError` where there
            is nothing to load.
    """
    classifier = pipeline(TASK, model=os.fspath(model) if isinstance(model, os.PathLike) else model, device=device)
    folder = tempfile.TemporaryDirectory(prefix="dmgal_examples_")
    examples = write_examples(Path(folder.name))

    def answer(query: str | None, with_unknown: bool, fitted: Any, *rows: Any):
        for path in [query, *(path for of_class in rows[MAX_CLASSES:] for path in of_class or [])]:
            if path is not None:
                check_upload(path, max_seconds)
        return classify(classifier, query, with_unknown, fitted, rows[:MAX_CLASSES], rows[MAX_CLASSES:])

    def fill_in():
        names = [*examples, *[""] * (MAX_CLASSES - len(examples))]
        clips = [examples[name][:2] if name else None for name in names]
        return [*names, *clips, examples["circle"][2]]

    with gr.Blocks(title="Few-shot action recognition", delete_cache=(AN_HOUR, A_DAY)) as demo:
        demo.examples_folder = folder  # which is removed with the page
        fitted, shown = gr.State(None, time_to_live=A_DAY), gr.State(SHOWN_CLASSES)
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column():
                groups, names, clips = [], [], []
                for number in range(MAX_CLASSES):
                    with gr.Group(visible=number < SHOWN_CLASSES) as group:
                        names.append(gr.Textbox(label=f"Class {number + 1}", elem_id=f"name-{number}"))
                        clips.append(gr.File(label="Its clips", file_count="multiple", elem_id=f"clips-{number}",
                                             height=120))  # fmt: skip
                    groups.append(group)
                more = gr.Button("One class more", size="sm")
            with gr.Column():
                query = gr.Video(label="The new clip", sources=["upload", "webcam"], elem_id="query")
                with_unknown = gr.Checkbox(
                    label='Also answer "unknown"', info="Needs two clips of every class.", elem_id="unknown"
                )
                with gr.Row():
                    example = gr.Button("Fill in an example", elem_id="example")
                    go = gr.Button("Classify", variant="primary", elem_id="classify")
                scores = gr.Label(label="Scores", elem_id="scores")
        sheet = gr.Plot(label="Episode sheet", format="png", elem_id="sheet")

        def show_one_more(count: int):
            count = min(count + 1, MAX_CLASSES)
            return [count, *(gr.Group(visible=number < count) for number in range(MAX_CLASSES))]

        more.click(show_one_more, shown, [shown, *groups])
        example.click(fill_in, None, [*names, *clips, query])
        go.click(answer, [query, with_unknown, fitted, *names, *clips], [scores, sheet, fitted])
    return demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def check_upload(path: str, max_seconds: float):
    """
    Raises `gr.Error` for an uploaded file that is no video file (only such are opened here, whatever else
    `read_frames` can read), is not readable, or is longer than `max_seconds`.
    """
    name = Path(path).name
    with open(path, "rb") as file:
        is_zip = file.read(len(LOCAL_HEADER)) == LOCAL_HEADER
    if Path(path).suffix.lower() not in VIDEO_SUFFIXES or is_zip:
        raise visitor_error(f"{name} is no video file: take an MP4, WebM, AVI, MOV or such.")
    try:
        info = probe_video(path)
    except VideoDecodeError as error:
        raise unreadable(error) from error
    seconds = info.duration or info.num_frames / 25
    if seconds > max_seconds:
        raise visitor_error(f"{name} lasts {seconds:.0f} s: take a clip of at most {max_seconds:g} s.")


def classify(
    classifier: FewShotVideoClassificationPipeline,
    query: str | None,
    with_unknown: bool,
    fitted: tuple | None,
    names: list[str],
    clips: list[list[str] | None],
) -> tuple[dict[str, float], Any, tuple]:
    """
    What the button "Classify" does.

    Args:
        classifier: whose model and processor are used; its own classes are left alone, as many visitors share it.
        query: path of the new clip.
        with_unknown: whether "unknown" is an answer.
        fitted: what the last call returned, so that the same example clips are not encoded again.
        names: of the classes; empty ones are left out where there are no clips either.
        clips: for each of them the paths of its clips.

    Returns:
        Scores by label, the episode sheet, and the classes as they were fitted.

    Raises:
        gr.Error: with a message for the visitor.
    """
    support = read_classes(names, clips)
    if query is None:
        raise visitor_error("There is no new clip to classify: drop one.")
    paths = [query, *(path for of_class in support.values() for path in of_class)]
    try:
        key = (tuple((name, tuple(of_class)) for name, of_class in support.items()), with_unknown)
        if fitted is None or fitted[0] != key:
            fitted = (key, fit(classifier, support, with_unknown))
        own = fitted[1]
        scores = {entry["label"]: entry["score"] for entry in own(query)}
        episode = own.image_processor(support=support, query=query)
        sheet = plot_episode(own.model, own.image_processor, episode, temperature=own.temperature,
                             kept_support=own.support, text_embeds=own.text_embeds,
                             text_weight=own.text_weight)  # fmt: skip
    except VideoDecodeError as error:
        raise unreadable(error) from error
    except ValueError as error:
        raise visitor_error(shorten(str(error), paths)) from error
    return scores, sheet, fitted


def read_classes(names: list[str], clips: list[list[str] | None]) -> dict[str, list[str]]:
    """The filled rows of the page. Raises `gr.Error` for one that is filled by half, and for a name given twice."""
    support = {}
    for number, (name, of_class) in enumerate(zip(names, clips), 1):
        name = (name or "").strip()
        if not name and not of_class:
            continue
        if not name:
            raise visitor_error(f"Class {number} has clips and no name: name the action they show.")
        if not of_class:
            raise visitor_error(f"Class {number}, {name!r}, has no clips: drop at least one.")
        if name in support:
            raise visitor_error(f"Two classes are called {name!r}: put their clips into one, or rename one.")
        if len(of_class) > MAX_CLIPS:
            raise visitor_error(f"{name!r} has {len(of_class)} clips: give at most {MAX_CLIPS} a class.")
        support[name] = list(of_class)
    if len(support) < 2:
        raise visitor_error("Two classes are needed at least: name them and give each a clip.")
    return support


def fit(
    classifier: FewShotVideoClassificationPipeline, support: dict[str, list[str]], with_unknown: bool
) -> FewShotVideoClassificationPipeline:
    """A classifier of its own around the same model; its warnings become messages on the page."""
    own = FewShotVideoClassificationPipeline(
        classifier.model, classifier.image_processor, device=classifier.device, batch_size=4
    )
    with warnings.catch_warnings(record=True) as caught:  # Gradio runs one such event at a time
        warnings.simplefilter("always", UserWarning)
        own.fit(support, unknown="auto" if with_unknown else None)
    paths = [path for of_class in support.values() for path in of_class]
    for warning in caught:
        if "the same video" in str(warning.message):
            gr.Warning(shorten(str(warning.message), paths))
    return own


def visitor_error(message: str) -> gr.Error:
    """A message on the page, and nothing in the log of the server, which has done nothing wrong."""
    return gr.Error(message, print_exception=False)


def unreadable(error: VideoDecodeError) -> gr.Error:
    """The message for a clip that cannot be read, which tells nothing of the server."""
    problem = re.sub(r" at 0x[0-9a-f]+", "", shorten(error.problem, [error.source]))
    return visitor_error(f"{Path(error.source).name}: {problem}. Take another clip.")


def shorten(message: str, paths: list[str]) -> str:
    """Names of files in place of the paths that the server has given them."""
    for path in paths:
        message = message.replace(path, Path(path).name)
    return message


def write_examples(folder: Path) -> dict[str, list[str]]:
    """Three clips each of a few motion shapes no model was trained on, by the names of their classes."""
    examples = {}
    for label, motion in EXAMPLES.items():
        examples[label] = [str(folder / f"{motion}_{index}.mp4") for index in range(3)]
        for index, path in enumerate(examples[label]):
            Path(path).write_bytes(encode_frames(render_clip(motion, index=index)))
    return examples
