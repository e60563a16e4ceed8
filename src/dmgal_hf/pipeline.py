"""`pipeline("few-shot-video-classification")`: a few clips a class, then labels for videos and streams."""

import hashlib
import io
import json
import math
import os
import re
import sys
import tempfile
import types
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import datasets
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from huggingface_hub import CommitInfo, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import Pipeline, PreTrainedModel, pipeline
from transformers.utils.hub import extract_commit_hash

from .configuration_dmgal import DmgalConfig
from .modeling_dmgal import DmgalSupport
from .video_decoding import VideoDecodeError, _orientation, _oriented, _to_rgb
from .video_processing_dmgal import DmgalVideoProcessor, DmgalVideoProcessorKwargs, _list_videos

TASK = "few-shot-video-classification"
UNKNOWN = "unknown"
SUPPORT_FILE, ABOUT_FILE = "support.safetensors", "support.json"
SUPPORT_FORMAT = 1

# Fields of DmgalConfig that change no feature, or hold what each version of transformers writes differently.
_NOT_IN_FINGERPRINT = {"attention_dropout", "backbone_config", "format_version", "position_dropout",
                       "score_temperature"}  # fmt: skip


class StreamedLabel(NamedTuple):
    """The answer for one window: `start` and `end` in seconds from the first frame, the best label and its score."""

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class _Fitted:
    """
    A support set of one episode: `labels` names its classes; the S clips of `support` have the `digests` (None for
    arrays); `pixel_values` (S, T, 3, H, W) are kept only where leaving one out needs them. `unknown` is the threshold
    on distances, and `auto` says that it comes from leaving one out.
    """

    labels: tuple[str, ...]
    support: DmgalSupport
    digests: tuple[str | None, ...]
    pixel_values: torch.Tensor | None
    unknown: float | None
    auto: bool


@dataclass(frozen=True)
class _Named:
    """A video, and how errors call it."""

    name: str
    video: Any


class FewShotVideoClassificationPipeline(Pipeline):
    """
    Classifies videos among classes that are given by a few example clips each.

    Args:
        model ([`DmgalModel`] or `PeftModel` of one): the model; it is put into eval mode.
        image_processor ([`DmgalVideoProcessor`], *optional*):
            How videos are read; by default that of the checkpoint the model comes from.
        kwargs: those of [`~transformers.Pipeline`] (`device`, `batch_size`, `num_workers`), and `top_k` for all calls.

    Attributes:
        temperature (`float`): scores are softmax(logits / temperature). At first `config.score_temperature` of the
            model; [`calibrate`] sets it.

    Raises:
        ValueError: the model is no [`DmgalModel`], or there is no processor to be found.

    Example:

    ```python
    from transformers import pipeline
    import dmgal_hf

    clf = pipeline("few-shot-video-classification", model="org/checkpoint")
    clf.fit({"push left": ["a.mp4", "b.mp4"], "push right": ["c.mp4", "d.mp4"]})
    print(clf("query.mp4"))  # [{"label": "push left", "score": 0.93}, {"label": "push right", "score": 0.07}]
    ```
    """

    _load_processor = False
    _load_image_processor = None  # optional for the loader: a model passed as an object has no name it could use
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model: PreTrainedModel, image_processor: DmgalVideoProcessor | None = None, **kwargs):
        if not hasattr(model, "encode_support"):
            raise ValueError(f"{TASK!r} needs a DmgalModel, not a {type(model).__name__}: choose a DMGAL checkpoint.")
        processor = kwargs.pop("processor", None) if image_processor is None else image_processor
        processor = _load_processor(model) if processor is None else processor
        if not isinstance(processor, DmgalVideoProcessor):
            raise ValueError(f"image_processor must be a DmgalVideoProcessor, got a {type(processor).__name__}.")
        super().__init__(model, image_processor=processor, task=kwargs.pop("task", TASK), **kwargs)
        self.model.eval()
        self.temperature = self.model.config.score_temperature
        self._fitted: _Fitted | None = None

    # The support set

    @property
    def _current(self) -> _Fitted:
        if self._fitted is None:
            raise ValueError("this classifier has no classes yet: call fit({label: [videos]}) or load(folder) first")
        return self._fitted

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the model's logits. Raises `ValueError` before [`fit`]."""
        return list(self._current.labels)

    @property
    def support(self) -> DmgalSupport:
        """What is kept of the example clips. Raises `ValueError` before [`fit`]."""
        return self._current.support

    @property
    def unknown(self) -> float | None:
        """The distance beyond which a video is of no class (see [`fit`]); may be set."""
        return self._current.unknown

    @unknown.setter
    def unknown(self, distance: float | None):
        _check_unknown(distance, self.labels)
        self._fitted = replace(self._current, unknown=distance, auto=False)

    def fit(
        self,
        support: Mapping[str, Any] | datasets.Dataset,
        unknown: str | float | None = None,
        video_column: str = "video",
        label_column: str = "label",
        batch_size: int | None = None,
    ) -> "FewShotVideoClassificationPipeline":
        """
        Learns the classes from their example clips. Every clip is read and encoded once.

        Args:
            support (`Mapping` or `datasets.Dataset`):
                For each label a video or a list of videos, of any kind [`DmgalVideoProcessor`] takes; classes may have
                different numbers. Or a dataset with a column of videos and one of labels.
            unknown (`"auto"` or `float`, *optional*):
                The distance (as the model measures it: minus the logit) beyond which a video is of no class. "unknown"
                then takes part in the answers as a class at just that distance, so it comes first exactly where all
                classes are farther away. `"auto"` (ours) takes the largest distance of a support clip to its own class
                when it is left out: no support would itself be unknown. That needs two clips of every class. With
                Cmga-Adapters it keeps the pixels of the clips in memory and encodes each once more as a query.
            video_column (`str`): column of the videos, for a dataset.
            label_column (`str`): column of the labels, for a dataset.
            batch_size (`int`, *optional*): clips encoded together; by default that of the pipeline, or 1.

        Returns:
            the pipeline itself.

        Raises:
            ValueError: fewer than two classes, a class without videos, a label that is no string, or a threshold that
                is not possible. `VideoDecodeError` for a clip that cannot be read. Nothing has changed then.
        """
        classes = _read_classes(support, video_column, label_column)
        if len(classes) < 2:
            raise ValueError(
                f"`support` has {len(classes)} class(es), {list(classes)}: a classifier needs at least two. Add "
                "one of clips that show anything else."
            )
        _check_unknown(None if unknown == "auto" else unknown, classes, reserve=unknown is not None)
        digests = _digests(classes)
        _warn_of_repeats(classes, digests, {})
        encoded, pixel_values = self._encode(classes, unknown == "auto", batch_size)
        labels = tuple(classes)
        fitted = _Fitted(
            labels=labels,
            support=_numbered(encoded, [labels.index(label) for label in classes for _ in classes[label]]),
            digests=tuple(digests.values()),
            pixel_values=pixel_values,
            unknown=None if unknown == "auto" else unknown,
            auto=unknown == "auto",
        )
        self._fitted = self._with_threshold(fitted)
        return self

    def add(
        self, support: Mapping[str, Any] | datasets.Dataset, batch_size: int | None = None
    ) -> "FewShotVideoClassificationPipeline":
        """
        Adds classes, or clips to classes that are there. No clip of before is read or encoded again; a threshold that
        is `"auto"` is set anew.

        Args and errors as in [`fit`].
        """
        old = self._current
        classes = _read_classes(support, "video", "label")
        _check_unknown(None, classes, reserve=old.unknown is not None)
        needs_clips = old.auto and self.model.has_cross_adapters
        if needs_clips and old.pixel_values is None:
            raise ValueError(
                "the threshold of this loaded support set cannot be set anew: with Cmga-Adapters that takes all "
                "clips, and they are not saved. Fit again with all clips, or set `unknown` to a distance."
            )
        digests = _digests(classes)
        numbers = old.support.labels[0].tolist()
        _warn_of_repeats(classes, digests, {d: old.labels[n] for d, n in zip(old.digests, numbers) if d is not None})
        encoded, pixel_values = self._encode(classes, old.auto, batch_size)
        _check_same_size(old.support, encoded)
        labels = tuple(dict.fromkeys([*old.labels, *classes]))
        numbers += [labels.index(label) for label in classes for _ in classes[label]]
        fitted = replace(
            old,
            labels=labels,
            support=_numbered(DmgalSupport.cat([old.support, encoded]), numbers),
            digests=old.digests + tuple(digests.values()),
            pixel_values=torch.cat([old.pixel_values, pixel_values]) if needs_clips else None,
        )
        self._fitted = self._with_threshold(fitted)
        return self

    def remove(self, *labels: str) -> "FewShotVideoClassificationPipeline":
        """
        Removes classes. Nothing of the others is computed again, but a threshold that is `"auto"` (which stays as it
        is for a loaded support set of a model with Cmga-Adapters).

        Raises:
            ValueError: there is no such class, or fewer than two would be left.
        """
        old = self._current
        for label in labels:
            if label not in old.labels:
                raise ValueError(f"there is no class {label!r} to remove; the classes are {list(old.labels)}")
        left = tuple(label for label in old.labels if label not in labels)
        if len(left) < 2:
            raise ValueError(
                f"removing {list(labels)} would leave {list(left)}: a classifier needs two classes or more"
            )
        names = [old.labels[number] for number in old.support.labels[0].tolist()]
        clips = [clip for clip, name in enumerate(names) if name in left]
        fitted = replace(
            old,
            labels=left,
            support=_numbered(old.support.select(clips), [left.index(names[clip]) for clip in clips]),
            digests=tuple(old.digests[clip] for clip in clips),
            pixel_values=None if old.pixel_values is None else old.pixel_values[clips],
        )
        if fitted.auto and not (self.model.has_cross_adapters and fitted.pixel_values is None):
            fitted = self._with_threshold(fitted)
        self._fitted = fitted
        return self

    def calibrate(self) -> float:
        """
        Sets the temperature of the scores from the support clips, each scored in the episode without it (ours): the
        one with the smallest cross entropy to a target of (S + 1) / (S + N) for the clip's own class among N and
        1 / (S + N) for each other, with S clips in all. A target of 1 would ask for a temperature of zero wherever all
        clips are recognised; this one is Laplace's rule of succession. It lies between 0.001 and 100.

        Returns:
            `float`: the temperature, which [`save`] keeps. Put it into `model.config.score_temperature` to give it to
            all users of a checkpoint.

        Raises:
            ValueError: a class has a single clip; or, with Cmga-Adapters, `fit` was called without `unknown="auto"`.
        """
        logits = self._leave_one_out(self._current, "calibrate()")
        (clips, way), own = logits.shape, self.support.labels[0].cpu()
        targets = torch.full((clips, way), 1 / (clips + way), dtype=torch.float64)
        targets[range(clips), own] = (clips + 1) / (clips + way)
        temperatures = torch.logspace(-3, 2, 501, dtype=torch.float64)
        scores = (logits.double() / temperatures[:, None, None]).log_softmax(-1)
        self.temperature = float(temperatures[(scores * targets).sum((1, 2)).argmax()])
        return self.temperature

    def _with_threshold(self, fitted: _Fitted) -> _Fitted:
        if not fitted.auto:
            return fitted
        distances = -self._leave_one_out(fitted, 'unknown="auto"')
        own = distances.gather(1, fitted.support.labels[0].cpu()[:, None])
        return replace(fitted, unknown=float(own.max()))

    def _leave_one_out(self, fitted: _Fitted, purpose: str) -> torch.Tensor:
        """Logits of the support clips, each without itself: (S, N) float32 on the CPU."""
        counts = Counter(fitted.support.labels[0].tolist())
        single = [label for number, label in enumerate(fitted.labels) if counts[number] < 2]
        if single:
            raise ValueError(
                f"{purpose} leaves out one clip at a time, so every class needs two or more, but {single} has one: "
                "add a clip, or do without."
            )
        clips = fitted.pixel_values
        if self.model.has_cross_adapters and clips is None:
            raise ValueError(
                f'{purpose} needs the clips again for a model with Cmga-Adapters: fit with unknown="auto", which '
                "keeps them."
            )
        with torch.no_grad(), self.device_placement():
            clips = None if clips is None else self._to_model(clips[None])
            return self.model.leave_one_out(fitted.support, clips)[0].float().cpu()

    def _encode(
        self, classes: Mapping[str, Mapping[str, Any]], keep: bool, batch_size: int | None
    ) -> tuple[DmgalSupport, torch.Tensor | None]:
        """All clips as supports of class 0, and their pixel values (S, T, 3, H, W) if the model needs them again."""
        videos = {name: video for of_class in classes.values() for name, video in of_class.items()}
        names, batch_size = list(videos), batch_size or self._batch_size or 1
        parts, kept = [], []
        with torch.no_grad(), self.device_placement():
            for start in range(0, len(names), batch_size):
                batch = {name: videos[name] for name in names[start : start + batch_size]}
                pixel_values = self.image_processor._pixel_values(batch)
                labels = torch.zeros(1, len(batch), dtype=torch.int64, device=self.device)
                parts.append(self.model.encode_support(self._to_model(pixel_values[None]), labels))
                _check_same_size(parts[0], parts[-1])
                if keep and self.model.has_cross_adapters:
                    kept.append(pixel_values)
        return DmgalSupport.cat(parts), torch.cat(kept) if kept else None

    def _to_model(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.to(self.device, self.model.dtype)

    # Kept support sets

    def save(self, folder: str | os.PathLike):
        """
        Writes the support set: `support.safetensors` and `support.json` with the labels, the threshold, the
        temperature, and id, revision and fingerprint of the model. The clips themselves are not in it.
        """
        fitted, folder = self._current, Path(folder)
        about = {
            "format_version": SUPPORT_FORMAT,
            "labels": list(fitted.labels),
            "unknown": fitted.unknown,
            "unknown_is_auto": fitted.auto,
            "temperature": self.temperature,
            "clip_digests": list(fitted.digests),
            "model": _model_id(self.model),
            "revision": _revision(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "fingerprint": fingerprint(self.model, self.image_processor),
        }
        folder.mkdir(parents=True, exist_ok=True)
        fitted.support.save(folder / SUPPORT_FILE)
        (folder / ABOUT_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(
        self, folder_or_id: str | os.PathLike, revision: str | None = None, token: str | bool | None = None
    ) -> "FewShotVideoClassificationPipeline":
        """
        Takes over a support set that [`save`] or [`push_to_hub`] wrote.

        Args:
            folder_or_id (`str` or `os.PathLike`): its folder, or the id of its repository on the Hub.
            revision (`str`, *optional*): branch, tag or commit on the Hub.
            token (`str` or `bool`, *optional*): for the Hub.

        Raises:
            FileNotFoundError: there is no such support set.
            ValueError: it was made with another model, other weights or another preprocessing; both are named.
        """
        about, path = _find_support(folder_or_id, revision, token)
        found = fingerprint(self.model, self.image_processor)
        if found != about["fingerprint"]:
            made_with = (
                f"{about['model'] or 'a model without a name'} (revision {about['revision']}, {about['dtype']})"
            )
            raise ValueError(
                f"the support set {os.fspath(folder_or_id)!r} was made with {made_with}, and this classifier has "
                f"{_model_id(self.model) or 'a model without a name'} (revision {_revision(self.model)}, "
                f"{str(self.model.dtype).removeprefix('torch.')}): weights, config or preprocessing differ, so the "
                "kept features mean nothing here. Load that model, or fit again from the clips."
            )
        self._fitted = _Fitted(
            labels=tuple(about["labels"]),
            support=DmgalSupport.load(path).to(self.device),
            digests=tuple(about["clip_digests"]),
            pixel_values=None,
            unknown=about["unknown"],
            auto=about["unknown_is_auto"],
        )
        self.temperature = about["temperature"]
        return self

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload support set",
    ) -> CommitInfo:
        """Uploads the support set (not the model) to a repository of its own, which is made if need be."""
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            Path(folder, "README.md").write_text(_support_card(self), encoding="utf-8")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | os.PathLike,
        model: str | PreTrainedModel | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **kwargs,
    ) -> "FewShotVideoClassificationPipeline":
        """
        A classifier from a kept support set, with the model that it was made with.

        Args:
            folder_or_id (`str` or `os.PathLike`): as in [`load`], with `revision` and `token`.
            model (`str` or `PreTrainedModel`, *optional*): where the same model lies now, if it moved.
            kwargs: for [`~transformers.pipeline`].
        """
        about, _ = _find_support(folder_or_id, revision, token)
        if model is None:
            model = about["model"]
            if not model or (os.path.isabs(model) and not os.path.isdir(model)):
                raise FileNotFoundError(
                    f"the model of {os.fspath(folder_or_id)!r} was {model or 'never saved'}, which is not here: pass "
                    "model= with its folder or id"
                )
            kwargs["revision"] = about["revision"]
        classifier = pipeline(TASK, model=model, token=token, pipeline_class=cls, **kwargs)
        return classifier.load(folder_or_id, revision, token)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Writes model and processor. ([`save`] writes the support set.)"""
        # Not as the parent does, which would mark the checkpoint as one that needs remote code for its pipeline.
        self.model.save_pretrained(save_directory, **kwargs)
        self.image_processor.save_pretrained(save_directory, **kwargs)

    # Queries

    def __call__(self, inputs: Any, **kwargs) -> list | Iterator:
        """
        Classifies videos.

        Args:
            inputs:
                A video of any kind [`DmgalVideoProcessor`] takes, a list of them, a column of a `datasets.Dataset`; or
                a generator or torch dataset, whose answers come one by one. A list of pictures is *one* video.
            top_k (`int`, *optional*): the number of classes in an answer; by default all.
            batch_size (`int`, *optional*): videos that go through the model together.
            num_workers (`int`, *optional*): processes that read videos.

        Returns:
            For a video `[{"label": str, "score": float}, ...]`, best first; for several a list of these.

        Raises:
            ValueError: there are no classes yet, or `inputs` holds something that is no video.
                `VideoDecodeError` for a video that cannot be read.
        """
        self._current  # noqa: B018 - raises before fit
        if isinstance(inputs, datasets.Dataset):
            raise ValueError("give a column of the dataset, for example dataset['video']")
        if isinstance(inputs, datasets.arrow_dataset.Column):
            return list(super().__call__((video for video in _plain(inputs)), **kwargs))
        if isinstance(inputs, (types.GeneratorType, torch.utils.data.Dataset)):
            return super().__call__(inputs, **kwargs)
        videos = _list_videos(inputs, "videos")
        answers = super().__call__([_Named(name, video) for name, video in videos.items()], **kwargs)
        return answers[0] if list(videos) == ["videos"] else answers

    def _sanitize_parameters(self, top_k: int | None = None, **unknown):
        if unknown:
            raise ValueError(f"unknown argument {next(iter(unknown))!r}; there are top_k, batch_size and num_workers")
        if top_k is None:
            return {}, {}, {}
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be an integer of at least 1, got {top_k!r}")
        return {}, {}, {"top_k": top_k}

    def preprocess(self, input_: Any) -> dict[str, torch.Tensor]:
        named = input_ if isinstance(input_, _Named) else _Named("video", input_)
        return {"pixel_values": self.image_processor._pixel_values({named.name: named.video})}

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pixel_values = self._to_model(model_inputs["pixel_values"])[None]  # (1, Q, T, 3, H, W)
        return {"logits": self.model(query_pixel_values=pixel_values, support=self.support).logits[0]}

    def postprocess(self, model_outputs: dict[str, torch.Tensor], top_k: int | None = None) -> list[dict[str, Any]]:
        logits, labels = model_outputs["logits"][0].double(), self.labels
        if self.unknown is not None:
            logits, labels = torch.cat([logits, logits.new_tensor([-self.unknown])]), [*labels, UNKNOWN]
        scores = (logits / self.temperature).softmax(0)
        order = logits.argsort(descending=True, stable=True)[:top_k]
        return [{"label": labels[number], "score": float(scores[number])} for number in order.tolist()]

    # Streams

    def stream(
        self, video: Any, window: float = 2.0, stride: float = 0.5, format: str | None = None
    ) -> Iterator[StreamedLabel]:
        """
        Classifies a long or endless video as it goes, window by window. Window k begins `k · stride` seconds after the
        first frame; of its T segments the frame shown at the centre is taken, and it is answered as soon as the last
        of these T is there. A video shorter than a window is answered once, its last frame standing in for the rest.

        Each frame is decoded once, and each that is taken is resized and goes through the backbone once, however many
        windows share it: give a stride that is a multiple of window / T. (With MGA adapters, which compare
        neighbouring frames, the backbone runs anew for every window.) Memory is that of a window.

        Args:
            video: path, URL, bytes, binary file object, `{"path", "bytes"}` dict, the number of a camera, or whatever
                FFmpeg opens with `format`.
            window (`float`): seconds.
            stride (`float`): seconds from one window to the next.
            format (`str`, *optional*): FFmpeg's name of the input format, for devices: "v4l2", "dshow", ...

        Yields:
            [`StreamedLabel`] `(start, end, label, score)`.

        Raises:
            ValueError: there are no classes yet, or `window` or `stride` is not above 0.
            VideoDecodeError: what does not open, holds no video or is damaged.
        """
        self._current  # noqa: B018 - raises before fit
        for name, seconds in (("window", window), ("stride", stride)):
            if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
                raise ValueError(f"{name} must be a number of seconds above 0, got {seconds!r}")
        window, stride = (Fraction(seconds).limit_denominator(10**6) for seconds in (window, stride))
        return self._stream(_decode_in_order(video, format), window, stride)

    def _stream(self, decoded: Iterator, window: Fraction, stride: Fraction) -> Iterator[StreamedLabel]:
        num_frames = self.image_processor.num_frames
        spacing = window / num_frames
        begun, waiting, answered = 0, deque(), False
        for end, picture in decoded:
            while begun * stride + spacing / 2 < end:
                waiting.append((begun * stride, []))
                begun += 1
            frame = None
            for start, frames in waiting:
                while len(frames) < num_frames and start + (2 * len(frames) + 1) * spacing / 2 < end:
                    frame = self._read_frame(picture) if frame is None else frame
                    frames.append(frame)
            while waiting and len(waiting[0][1]) == num_frames:
                start, frames = waiting.popleft()
                answered = True
                yield self._label_window(start, start + window, frames)
        if not answered:
            frames = waiting[0][1] if waiting else [self._read_frame(picture)]
            yield self._label_window(Fraction(0), end, frames + frames[-1:] * (num_frames - len(frames)))

    def _read_frame(self, picture: "_Picture") -> "_Frame":
        clip = self.image_processor.resize_and_crop(picture.clip(), f"the frame of {picture.source}")
        return _Frame(self.image_processor.normalize(clip)[0])

    def _label_window(self, start: Fraction, end: Fraction, frames: list["_Frame"]) -> StreamedLabel:
        with torch.no_grad(), self.device_placement():
            if self.model.frames_are_independent:
                new = list({id(frame): frame for frame in frames if not frame.encoded}.values())
                if new:
                    maps = self.model.encode_frames(self._to_model(torch.stack([frame.tensor for frame in new])))
                    for frame, frame_maps in zip(new, maps):
                        frame.tensor, frame.encoded = frame_maps.clone(), True  # not a view: it would keep the others
                query = {"query_maps": torch.stack([frame.tensor for frame in frames])[None, None]}
            else:
                pixel_values = torch.stack([frame.tensor for frame in frames])
                query = {"query_pixel_values": self._to_model(pixel_values)[None, None]}
            logits = self.model(**query, support=self.support).logits[0].cpu()
        best = self.postprocess({"logits": logits}, top_k=1)[0]
        return StreamedLabel(float(start), float(end), best["label"], best["score"])


@dataclass
class _Frame:
    """A frame that windows share: pixel values (3, H, W), replaced by the backbone's maps (C, h, w) once encoded."""

    tensor: torch.Tensor
    encoded: bool = False


@dataclass
class _Picture:
    """A decoded frame, converted only if a window takes it."""

    source: str
    frame: av.VideoFrame
    reformatter: VideoReformatter

    def clip(self) -> torch.Tensor:
        """(1, 3, H, W) uint8, as `read_frames` gives it."""
        rgb = _oriented(_to_rgb(self.frame, self.reformatter), _orientation(self.frame))
        return torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]


def _decode_in_order(video: Any, format: str | None) -> Iterator[tuple[Fraction, _Picture]]:
    """All frames, each with the time it is shown until, in seconds after the first appeared."""
    source, media, format = _stream_source(video, format)
    try:
        with av.open(media, format=format, metadata_errors="replace") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams or container.format.name == "tty":  # FFmpeg draws text files
                raise VideoDecodeError(source, f"no video stream ({container.format.name})")
            usual = 1 / (streams[0].average_rate or Fraction(25))
            reformatter = VideoReformatter()
            first = time = picture = None
            for frame in container.decode(streams[0]):
                stamp = None if frame.pts is None else frame.pts * frame.time_base
                if picture is not None:
                    # Some old files have time stamps that run back, or none.
                    time = max(stamp - first, time) if stamp is not None and stamp - first > time else time + usual
                    yield time, picture
                else:
                    first, time = stamp or Fraction(0), Fraction(0)
                picture = _Picture(source, frame, reformatter)
            if picture is None:
                raise VideoDecodeError(source, "none of its packets decodes to a frame")
            yield time + usual, picture
    except (av.FFmpegError, OSError) as error:
        raise VideoDecodeError(source, f"not a readable video ({error.strerror})") from error


def _stream_source(video: Any, format: str | None) -> tuple[str, Any, str | None]:
    """Name for messages, what av opens, and FFmpeg's format."""
    if isinstance(video, int) and not isinstance(video, bool):
        cameras = {"linux": (f"/dev/video{video}", "v4l2"), "darwin": (str(video), "avfoundation")}
        if sys.platform not in cameras:
            raise ValueError(f"cameras have no numbers on {sys.platform}: pass 'video=NAME' and format='dshow'")
        device, camera_format = cameras[sys.platform]
        return f"camera {video} ({device})", device, format or camera_format
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (bytes, bytearray, memoryview)):
        return "<bytes>", io.BytesIO(video), format
    if hasattr(video, "read"):
        return str(getattr(video, "name", "<file object>")), video, format
    if not isinstance(video, (str, os.PathLike)):
        raise VideoDecodeError(
            "<stream>", f"a stream cannot be a {type(video).__name__}", "Give a path, a URL or the number of a camera."
        )
    path = os.fspath(video)
    # An absolute path cannot be taken for one of FFmpeg's protocols ("concat:...").
    is_name = format is not None or re.match(r"(https?|rtsps?|rtmps?|rtp|udp|tcp|srt)://", path)
    return path, path if is_name else os.path.abspath(path), format


# Example clips


def _read_classes(support: Any, video_column: str, label_column: str) -> dict[str, dict[str, Any]]:
    """For each label its videos, by the names that errors call them."""
    if isinstance(support, datasets.Dataset):
        support = _group_rows(support, video_column, label_column)
    if not isinstance(support, Mapping):
        raise ValueError(
            f"`support` is a mapping of labels to videos or a datasets.Dataset, not a {type(support).__name__}"
        )
    if not support:
        raise ValueError("`support` is empty: give at least one class")
    for label in support:
        if not isinstance(label, str):
            raise ValueError(f"the label {label!r} is a {type(label).__name__}: labels are strings")
    return {label: _list_videos(examples, f"support[{label!r}]") for label, examples in support.items()}


def _group_rows(dataset: datasets.Dataset, video_column: str, label_column: str) -> dict[str, list[Any]]:
    for name in (video_column, label_column):
        if name not in dataset.column_names:
            raise ValueError(f"the dataset has no column {name!r}; its columns are {dataset.column_names}")
    feature, classes = dataset.features[label_column], {}
    for row, (label, video) in enumerate(zip(dataset[label_column], _plain(dataset[video_column]))):
        if label is None:
            raise ValueError(f"row {row} of the dataset has no {label_column}")
        name = feature.int2str(label) if isinstance(feature, datasets.ClassLabel) else str(label)
        classes.setdefault(name, []).append(video)
    return classes


def _plain(column: "datasets.arrow_dataset.Column") -> "datasets.arrow_dataset.Column":
    """A column of videos as {"path", "bytes"}, which the processor reads itself."""
    if not isinstance(column.features, datasets.Video) or not column.features.decode:
        return column
    return column.source.cast_column(column.column_name, datasets.Video(decode=False))[column.column_name]


def _digests(classes: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
    return {name: _digest(video) for videos in classes.values() for name, video in videos.items()}


def _digest(video: Any) -> str | None:
    """What tells whether two clips are the same video: a hash of the file's content, or of the address of others."""
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        if not os.path.isfile(path):
            return hashlib.sha256(path.encode()).hexdigest()
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return hashlib.sha256(video).hexdigest() if isinstance(video, (bytes, bytearray, memoryview)) else None


def _warn_of_repeats(
    classes: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str | None], seen: dict[str, str]
):
    """`seen`: labels by the digests of clips that are there already."""
    for label, videos in classes.items():
        for name, video in videos.items():
            digest = digests[name]
            if digest is not None and seen.setdefault(digest, label) != label:
                shown = os.fspath(video) if isinstance(video, (str, os.PathLike)) else name
                warnings.warn(
                    f"{shown} is an example of {label!r}, and the same video is one of {seen[digest]!r}: the two "
                    "cannot be told apart by it",
                    stacklevel=3,
                )


def _numbered(support: DmgalSupport, numbers: list[int]) -> DmgalSupport:
    labels = torch.tensor([numbers], device=support.labels.device)
    return replace(support, labels=labels, way=max(numbers) + 1)


def _check_same_size(first: DmgalSupport, other: DmgalSupport):
    sizes = [
        {name: state.shape[-2] // part.features.shape[1] for name, state in part.states.items() if state.ndim > 1}
        for part in (first, other)
    ]
    if sizes[0] != sizes[1] or first.features.shape[2:] != other.features.shape[2:]:
        raise ValueError(
            "the clips come out in different sizes: set do_center_crop=True of the processor, or give clips of one "
            "size"
        )


def _check_unknown(distance: Any, labels: Any, reserve: bool | None = None):
    """`reserve`: whether the answer "unknown" is wanted, by default whether there is a distance."""
    is_number = isinstance(distance, (int, float)) and not isinstance(distance, bool) and math.isfinite(distance)
    if distance is not None and not is_number:
        raise ValueError(f"`unknown` is {distance!r}; allowed are 'auto' (in fit), a distance, or None")
    if UNKNOWN in labels and (distance is not None if reserve is None else reserve):
        raise ValueError(f"a class is called {UNKNOWN!r}, which the threshold on distances answers: rename the class")


# Models and kept support sets


def _load_processor(model: PreTrainedModel) -> DmgalVideoProcessor:
    name = _model_id(model)
    if not name:
        raise ValueError(
            "the model does not come from a checkpoint, so there is no processor to go with it: pass "
            "image_processor=DmgalVideoProcessor(...)."
        )
    try:
        return DmgalVideoProcessor.from_pretrained(name, revision=_revision(model))
    except OSError as error:
        raise ValueError(
            f"{name} has no preprocessor_config.json: save its DmgalVideoProcessor there, or pass image_processor=."
        ) from error


def _model_id(model: PreTrainedModel) -> str | None:
    """Id or absolute folder of the checkpoint, None for a model that has none."""
    name = getattr(model, "name_or_path", None)
    return os.path.abspath(name) if name and os.path.isdir(name) else name or None


def _revision(model: PreTrainedModel) -> str | None:
    """Commit of the checkpoint on the Hub; transformers no longer keeps it, and then it is that of the cached main."""
    name = _model_id(model)
    if name is None or os.path.isabs(name):
        return None
    cached = try_to_load_from_cache(name, "config.json")
    known = getattr(model.config, "_commit_hash", None)
    return extract_commit_hash(cached if isinstance(cached, str) else None, known)


def fingerprint(model: PreTrainedModel, processor: DmgalVideoProcessor) -> str:
    """SHA-256 of all that the features of a clip depend on: weights, fields of the config and of the processor."""
    fields = {name: getattr(model.config, name) for name in DmgalConfig.__annotations__.keys() - _NOT_IN_FINGERPRINT}
    settings = {name: getattr(processor, name) for name in DmgalVideoProcessorKwargs.__annotations__}
    digest = hashlib.sha256(json.dumps([fields, settings], sort_keys=True, default=str).encode())
    weights = {name.removeprefix("base_model.model."): weight for name, weight in model.state_dict().items()}
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _find_support(
    folder_or_id: str | os.PathLike, revision: str | None, token: str | bool | None
) -> tuple[dict[str, Any], Path]:
    """What `support.json` says, and the path of the tensors."""
    name = os.fspath(folder_or_id)
    if os.path.isdir(name):
        about, tensors = Path(name, ABOUT_FILE), Path(name, SUPPORT_FILE)
        missing = [path.name for path in (about, tensors) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"{name} holds no support set: {', '.join(missing)} is missing. save() writes it.")
    else:
        try:
            about, tensors = (
                Path(hf_hub_download(name, file, revision=revision, token=token))
                for file in (ABOUT_FILE, SUPPORT_FILE)
            )
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise FileNotFoundError(f"{name} is no folder and no support set on the Hub ({error})") from error
    fields = json.loads(about.read_text(encoding="utf-8"))
    if fields.get("format_version") != SUPPORT_FORMAT:
        raise ValueError(
            f"{about} has format version {fields.get('format_version')!r}; this release of dmgal_hf reads "
            f"{SUPPORT_FORMAT}. Update it with `pip install -U dmgal-hf`, or fit again."
        )
    return fields, tensors


def _support_card(classifier: FewShotVideoClassificationPipeline) -> str:
    model = _model_id(classifier.model)
    on_hub = model is not None and not os.path.isabs(model)
    counts = Counter(classifier.support.labels[0].tolist())
    lines = ["---", "library_name: dmgal-hf", "pipeline_tag: video-classification", "tags:", "- few-shot-learning"]
    lines += [f"base_model: {model}"] if on_hub else []
    lines += ["---", "", "# A few-shot video classifier", "", "| class | example clips |", "|---|---|"]
    lines += [f"| {label} | {counts[number]} |" for number, label in enumerate(classifier.labels)]
    lines += [
        "",
        "```python",
        "from dmgal_hf import FewShotVideoClassificationPipeline",
        "",
        'clf = FewShotVideoClassificationPipeline.from_pretrained("this repository")',
        'clf("query.mp4")',
        "```",
        "",
    ]
    return "\n".join(lines)


__all__ = ["FewShotVideoClassificationPipeline", "StreamedLabel"]
