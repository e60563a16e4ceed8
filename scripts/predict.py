"""Labels videos by example: `python scripts/predict.py --model ID --support DIR_of_class_folders --query FILE_or_DIR`.

--support is a folder with one folder of clips a class, or a support set that an earlier run kept with --save.
The exit status is 1 if a query could not be read; the others are answered all the same.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import pipeline
from transformers.hf_argparser import HfArg

from dmgal_hf.data.benchmarks import list_class_clips, scan_videos
from dmgal_hf.inference.pipeline import TASK, FewShotVideoClassificationPipeline
from dmgal_hf.inference.streaming import URL
from dmgal_hf.inference.support_sets import ABOUT_FILE
from dmgal_hf.model.extracted_frames import is_frame
from dmgal_hf.training.arguments import parse_arguments


@dataclass
class PredictArguments:
    """What is classified, by what."""

    model: str = HfArg(help="Model id or folder.")
    support: str = HfArg(help="Folder of class folders, or of a kept support set.")
    query: str = HfArg(help="A video (file, URL or folder of frames), or a folder of videos.")
    top_k: int = HfArg(default=3, help="Classes shown of each video.")
    unknown: str | None = HfArg(default=None, help="auto, or the distance beyond which a video is of no class.")
    text_weight: float | None = HfArg(default=None, help="Weight of the class names as text; 0 leaves them out.")
    save: str | None = HfArg(default=None, help="Keep the support set in this folder.")
    json: str | None = HfArg(default=None, help="Write the answers into this JSON file.")
    device: str = HfArg(default="cpu", help="cpu, cuda, cuda:1, mps, ...")


def list_queries(query: str) -> list[str]:
    """A file, a URL or a folder of frames is one query, any other folder holds several."""
    if re.match(URL, query) or not Path(query).is_dir():
        return [query]
    scan = scan_videos(query)
    pictures = list(filter(is_frame, scan.unknown))
    queries = sorted([*scan.clips, *scan.unknown])  # what is no video is answered with its error
    if pictures and len(pictures) < len(queries):
        raise ValueError(f"{query} holds pictures ({pictures[0]}) beside other files: move them out of it")
    if not queries:
        raise FileNotFoundError(f"{query} is empty: put at least one video into it")
    return [query] if pictures else queries


def read_threshold(text: str | None) -> str | float | None:
    try:
        return text if text in (None, "auto") else float(text)
    except ValueError:
        raise ValueError(f"--unknown {text}: give auto or a distance, a number") from None


def fit(
    classifier: FewShotVideoClassificationPipeline,
    support: Path,
    unknown: str | float | None,
    text_weight: float | None,
):
    if (support / ABOUT_FILE).is_file():
        classifier.load(support)
        if text_weight is not None:
            classifier.text_weight = text_weight
        if unknown == "auto":
            raise ValueError("--unknown auto needs the clips: the kept support set has the threshold of its fit")
        if unknown is not None:
            classifier.unknown = unknown
    else:
        classifier.fit(list_class_clips(support), unknown=unknown, text_weight=text_weight)


def predict(classifier: FewShotVideoClassificationPipeline, queries: list[str]) -> Iterator[dict[str, Any]]:
    for query, answer in zip(queries, classifier((query for query in queries), on_error="skip")):
        yield {"video": query, **({"predictions": answer} if isinstance(answer, list) else answer)}


def format_row(answer: dict[str, Any], width: int) -> str:
    shown = [f"{prediction['label']} {prediction['score']:.3f}" for prediction in answer.get("predictions", [])]
    return f"{answer['video']:<{width}}  " + (answer.get("error") or "  ".join(shown))


def main(arguments: PredictArguments) -> int:
    queries, unknown = list_queries(arguments.query), read_threshold(arguments.unknown)
    if arguments.json is not None:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    classifier = pipeline(TASK, model=arguments.model, device=arguments.device, top_k=arguments.top_k)
    fit(classifier, Path(arguments.support), unknown, arguments.text_weight)
    if arguments.save is not None:
        classifier.save(arguments.save)
    answers, width = [], max(map(len, queries))
    for answer in predict(classifier, queries):
        answers.append(answer)
        print(format_row(answer, width), flush=True)
    if arguments.json is not None:
        content = {"model": arguments.model, "labels": classifier.labels, "answers": answers}
        Path(arguments.json).write_text(json.dumps(content, indent=2, ensure_ascii=False) + os.linesep, "utf-8")
    return int(any("error" in answer for answer in answers))


if __name__ == "__main__":
    sys.exit(main(*parse_arguments((PredictArguments,))))
