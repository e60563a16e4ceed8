"""Labels videos by example: `python scripts/predict.py --model ID --support DIR_of_class_folders --query FILE_or_DIR`.

--support is a folder with one folder of clips a class, or a support set that an earlier run kept with --save.
The exit status is 1 if a query could not be read; the others are answered all the same.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import pipeline

from dmgal_hf.arguments import parse_arguments
from dmgal_hf.pipeline import TASK, FewShotVideoClassificationPipeline
from dmgal_hf.support_sets import ABOUT_FILE
from dmgal_hf.video_decoding import VideoDecodeError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class PredictArguments:
    """What is classified, by what."""

    model: str = field(metadata={"help": "Model id or folder."})
    support: str = field(metadata={"help": "Folder of class folders, or of a kept support set."})
    query: str = field(metadata={"help": "A video, or a folder of videos."})
    top_k: int = field(default=3, metadata={"help": "Classes shown of each video."})
    unknown: str | None = field(
        default=None, metadata={"help": "auto, or the distance beyond which a video is of no class."}
    )
    save: str | None = field(default=None, metadata={"help": "Keep the support set in this folder."})
    json: str | None = field(default=None, metadata={"help": "Write the answers into this JSON file."})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1, mps, ..."})


def list_clips(folder: Path) -> list[str]:
    """Videos of a folder, and folders of frames, by name. Raises `FileNotFoundError` where there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    clips = sorted(str(path) for path in folder.iterdir() if not path.name.startswith("."))
    if not clips:
        raise FileNotFoundError(f"{folder} is empty: put at least one video into it")
    return clips


def list_queries(path: Path) -> list[str]:
    """A file or a folder of frames is one query, any other folder holds several."""
    if not path.is_dir() or any(child.suffix.lower() in FRAME_SUFFIXES for child in path.iterdir()):
        return [str(path)]
    return list_clips(path)


def fit(classifier: FewShotVideoClassificationPipeline, support: Path, unknown: str | None):
    if (support / ABOUT_FILE).is_file():
        classifier.load(support)
        if unknown is not None:
            if unknown == "auto":
                raise ValueError("--unknown auto needs the clips: the kept support set has the threshold of its fit")
            classifier.unknown = float(unknown)
        return
    classes = [Path(folder) for folder in list_clips(support)]
    stray = [str(folder) for folder in classes if not folder.is_dir()]
    if stray:
        raise NotADirectoryError(f"{support} holds one folder a class, but {stray[0]} is a file")
    examples = {folder.name: list_clips(folder) for folder in classes}
    classifier.fit(examples, unknown=unknown if unknown in (None, "auto") else float(unknown))


def predict(classifier: FewShotVideoClassificationPipeline, query: str, top_k: int) -> dict[str, Any]:
    try:
        return {"video": query, "predictions": classifier(query, top_k=top_k)}
    except VideoDecodeError as error:
        return {"video": query, "error": str(error)}


def format_row(answer: dict[str, Any], width: int) -> str:
    shown = [f"{prediction['label']} {prediction['score']:.3f}" for prediction in answer.get("predictions", [])]
    return f"{answer['video']:<{width}}  " + (answer.get("error") or "  ".join(shown))


def main(arguments: PredictArguments) -> int:
    queries = list_queries(Path(arguments.query))
    classifier = pipeline(TASK, model=arguments.model, device=arguments.device)
    fit(classifier, Path(arguments.support), arguments.unknown)
    if arguments.save is not None:
        classifier.save(arguments.save)
    answers, width = [], max(map(len, queries))
    for query in queries:
        answers.append(predict(classifier, query, arguments.top_k))
        print(format_row(answers[-1], width), flush=True)
    if arguments.json is not None:
        content = {"model": arguments.model, "labels": classifier.labels, "answers": answers}
        Path(arguments.json).write_text(json.dumps(content, indent=2, ensure_ascii=False) + os.linesep, "utf-8")
    return int(any("error" in answer for answer in answers))


if __name__ == "__main__":
    sys.exit(main(*parse_arguments((PredictArguments,))))
