"""`pipeline("few-shot-video-classification")`: a few clips a class, then labels for videos and streams."""

import contextlib
import os
import tempfile
import types
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import Pipeline, PreTrainedModel, pipeline

from ..model.class_texts import class_texts
from ..model.configuration_dmgal import check_text_weight
from ..model.kept_supports import DmgalSupport
from ..model.video_processing_dmgal import DmgalVideoProcessor, _list_videos, undecoded_column
from .classifier_models import TASK, classifier_model, find_processor, goes_beside, kept_model_id
from .example_clips import clip_digests, read_classes
from .fitted_support import (
    FittedSupport,
    answer,
    best_scale,
    blank_support,
    check_clips_for_unknown,
    check_finite,
    check_same_size,
    check_temperature,
    check_unknown,
    check_whole_number,
    encode_examples,
    leave_one_out,
    numbered,
    of_classes,
)
from .query_model import DmgalQueryModel
from .query_scores import QueryScores, score_queries
from .streaming import Picture, StreamedLabel, Window, check_seconds, is_live, window_batches, window_scores
from .support_sets import (
    check_kept_support,
    check_made_with,
    find_support,
    made_with,
    read_support,
    support_card,
    write_support,
)

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class _Named:
    """A video, and how errors call it."""

    name: str
    video: Any


class FewShotVideoClassificationPipeline(Pipeline):
    """
    Classifies videos among classes that are given by a few example clips each.

    Args:
        model ([`DmgalModel`], `PeftModel` of one, or an image backbone of transformers):
            The model; it is put into eval mode. A bare backbone becomes one by [`DmgalModel.untrained`].
        image_processor ([`DmgalVideoProcessor`], *optional*):
            How videos are read; by default that of the checkpoint the model comes from. `processor` and
            `video_processor` are other names for it.
        model_fields (`dict`, *optional*): fields of [`DmgalConfig`] for a bare backbone.
        cuda_graphs (`bool`, *optional*, defaults to `True`):
            On one GPU, replay what queries run as a CUDA graph, one for each number of videos that comes again.
        kwargs: those of [`~transformers.Pipeline`] (`device`, `batch_size`, `num_workers`), and `top_k` for all calls.

    Attributes:
        temperature (`float`): scores are softmax(logits / temperature), above 0. At first `config.score_temperature`
            of the model; [`calibrate`] and [`load`] set it, [`fit`] leaves it.
        text_weight (`float`): of the log-probabilities by text beside those by clips, 0 or more. At first
            `config.text_weight` of a model with `text_guidance`, else 0; [`fit`], [`calibrate`] and [`load`] set it.

    Raises:
        ValueError: the model is neither, or there is no processor to be found.

    Example:

    ```python
    >>> from transformers import ResNetConfig, pipeline
    >>> from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    >>> DmgalModel(DmgalConfig(backbone_config=backbone)).save_pretrained("checkpoint")
    >>> _ = DmgalVideoProcessor(size=72, crop_size=64).save_pretrained("checkpoint")
    >>> clf = pipeline("few-shot-video-classification", model="checkpoint")
    >>> clf = clf.fit({"push left": ["a.mp4", "b.mp4"], "push right": ["c.mp4"]})
    >>> sorted(answer["label"] for answer in clf("d.mp4"))  # best first: [{"label": "push left", "score": 0.93}, ...]
    ['push left', 'push right']
    ```
    """

    _load_processor = False
    _load_image_processor = None  # optional for the loader: a model passed as an object has no name it could use
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: DmgalVideoProcessor | None = None,
        model_fields: Mapping[str, Any] | None = None,
        cuda_graphs: bool = True,
        **kwargs,
    ):
        model, image_processor = classifier_model(model, image_processor, model_fields or {})
        # `pipeline()` loads that of the checkpoint as image_processor: what is given by another name is meant.
        given = [kwargs.pop(name) for name in ("processor", "video_processor") if kwargs.get(name) is not None]
        processor = find_processor(model, given[0] if given else image_processor)
        super().__init__(model, image_processor=processor, task=kwargs.pop("task", TASK), **kwargs)
        self.model.eval()
        self.temperature = self.model.config.score_temperature
        self._fitted: FittedSupport | None = None
        self._score = QueryScores() if cuda_graphs and self.device.type == "cuda" else score_queries
        self.text_weight = self.model.config.text_weight if self.model.text_head is not None else 0.0

    # The support set

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float):
        self._temperature = check_temperature(value)

    @property
    def text_weight(self) -> float:
        return self._text_weight

    @text_weight.setter
    def text_weight(self, value: float):
        value, fitted = self._check_text_weight(value), self._fitted
        if fitted is not None:
            if value and fitted.text_embeds is None:
                raise ValueError("these classes were fitted without text: fit again with text_weight above 0")
            if not value and fitted.without_clips:
                raise ValueError(f"text_weight must be above 0 for {list(fitted.without_clips)}, which have no clips")
        self._text_weight = value

    def _check_text_weight(self, value: float) -> float:
        value = check_text_weight(value)
        if value:
            self.model.check_text_head(f"text_weight is {value}, but ")
        return value

    @property
    def _current(self) -> FittedSupport:
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
    def text_embeds(self) -> torch.Tensor | None:
        """The prototypes by text, (N, E), `None` where text is left out. Raises `ValueError` before [`fit`]."""
        return self._current.text_embeds

    @property
    def unknown(self) -> float | None:
        """The distance beyond which a video is of no class (see [`fit`]); may be set."""
        return self._current.unknown

    @unknown.setter
    def unknown(self, distance: float | None):
        self._fitted = replace(self._current, unknown=check_unknown(distance, self.labels), auto=False)

    def fit(
        self,
        support: "Mapping[str, Any] | datasets.Dataset | datasets.IterableDataset",
        unknown: str | float | None = None,
        video_column: str = "video",
        label_column: str = "label",
        batch_size: int | None = None,
        text_weight: float | None = None,
        descriptions: Mapping[str, str] | None = None,
    ) -> "FewShotVideoClassificationPipeline":
        """
        Learns the classes from their example clips. Every clip is read and encoded once. Where names take part as text
        (`text_weight` above 0), the text tower is loaded, runs once over them and is freed.

        Args:
            support (`Mapping`, `datasets.Dataset` or `datasets.IterableDataset`):
                For each label a video or a list of videos, of any kind [`DmgalVideoProcessor`] takes; classes may have
                different numbers. Or a dataset with a column of videos and one of labels, also a streamed one, which
                is read to its end: give `dataset.take(n)` of a long one. With text a class may have no video, `[]` or
                `None`: it is then known by its name alone.
            unknown (`"auto"` or `float`, *optional*):
                The distance (as the model measures it: minus the logit) beyond which a video is of no class. "unknown"
                then takes part in the answers as a class at just that distance, so it comes first exactly where all
                classes are farther away. `"auto"` (ours) takes the largest distance of a support clip to its own class
                when it is left out: no support would itself be unknown. That needs two clips of every class. With
                Cmga-Adapters it keeps the pixels of the clips in memory and encodes each once more as a query.
            video_column (`str`): column of the videos, for a dataset.
            label_column (`str`): column of the labels, for a dataset.
            batch_size (`int`, *optional*): clips encoded together; by default that of the pipeline, or 1.
            text_weight (`float`, *optional*): becomes the attribute; by default as it is. 0 leaves text out.
            descriptions (`Mapping[str, str]`, *optional*):
                For some labels a text in place of `config.text_templates` with the label:
                `{"lift": "a hand lifts a cup off a table"}`.

        Returns:
            the pipeline itself.

        Raises:
            ValueError: fewer than two classes, a class without videos, a label that is no string, a threshold that is
                not possible, or text that is not: see [`DmgalModel.embed_class_names`]. `VideoDecodeError` for a clip
                that cannot be read. Nothing has changed then.
        """
        text_weight = self._check_text_weight(self.text_weight if text_weight is None else text_weight)
        classes = read_classes(support, video_column, label_column, with_text=text_weight > 0)
        if len(classes) < 2:
            raise ValueError(
                f"`support` has {len(classes)} class(es), {list(classes)}: a classifier needs at least two. Add "
                "one of clips that show anything else."
            )
        auto = isinstance(unknown, str) and unknown == "auto"
        distance = check_unknown(None if auto else unknown, classes, reserve=unknown is not None)
        check_clips_for_unknown(unknown, classes)
        text_embeds = self._embed_names(list(classes), descriptions, text_weight)
        digests = clip_digests(classes, {})
        encoded, pixel_values = self._encode(classes, auto, batch_size)
        labels = tuple(classes)
        fitted = FittedSupport(
            labels=labels,
            support=numbered(encoded, [labels.index(label) for label in classes for _ in classes[label]], len(labels)),
            digests=digests,
            pixel_values=pixel_values,
            unknown=distance,
            auto=auto,
            text_embeds=text_embeds,
        )
        self._fitted = self._with_threshold(fitted)
        self.text_weight = text_weight
        return self

    def add(
        self,
        support: "Mapping[str, Any] | datasets.Dataset | datasets.IterableDataset",
        video_column: str = "video",
        label_column: str = "label",
        batch_size: int | None = None,
        descriptions: Mapping[str, str] | None = None,
    ) -> "FewShotVideoClassificationPipeline":
        """
        Adds classes, or clips to classes that are there. No clip of before is read or encoded again; a threshold that
        is `"auto"` is set anew.

        Args and errors as in [`fit`].
        """
        old = self._current
        with_text = old.text_embeds is not None
        classes = read_classes(support, video_column, label_column, with_text)
        check_unknown(None, classes, reserve=old.unknown is not None)
        check_clips_for_unknown(
            old.unknown, {label: clips for label, clips in classes.items() if label not in old.labels}
        )
        needs_clips = old.auto and self.model.has_cross_adapters
        if needs_clips and old.pixel_values is None:
            raise ValueError(
                "the threshold of this loaded support set cannot be set anew: with Cmga-Adapters that takes all "
                "clips, and they are not saved. Fit again with all clips, or set `unknown` to a distance."
            )
        text_embeds, new = old.text_embeds, [label for label in classes if label not in old.labels]
        if with_text and new:
            class_texts([*old.labels, *new], descriptions, self.model.config.text_templates)
            text_embeds = torch.cat([text_embeds, self._embed_names(new, descriptions, 1.0)])
        elif descriptions:
            self._embed_names(new, descriptions, float(with_text))
        numbers = old.support.labels[0].tolist()
        digests = clip_digests(classes, {d: old.labels[n] for d, n in zip(old.digests, numbers) if d is not None})
        encoded, pixel_values = self._encode(classes, old.auto, batch_size)
        check_same_size(old.support, encoded)
        labels = tuple(dict.fromkeys([*old.labels, *classes]))
        numbers += [labels.index(label) for label in classes for _ in classes[label]]
        fitted = replace(
            old,
            labels=labels,
            support=numbered(DmgalSupport.cat([old.support, encoded]), numbers, len(labels)),
            digests=old.digests + digests,
            pixel_values=torch.cat([old.pixel_values, pixel_values]) if needs_clips else None,
            text_embeds=text_embeds,
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
        fitted = of_classes(old, left)
        if fitted.auto and not (self.model.has_cross_adapters and fitted.pixel_values is None):
            fitted = self._with_threshold(fitted)
        self._fitted = fitted
        return self

    def calibrate(self) -> float:
        """
        Sets the temperature of the scores, and with text its weight, from the support clips, each scored in the
        episode without it (ours): those with the smallest cross entropy to a target of (S + 1) / (S + N) for the
        clip's own class among N and 1 / (S + N) for each other, with S clips in all. A target of 1 would ask for a
        temperature of zero wherever all clips are recognised; this one is Laplace's rule of succession. The
        temperature lies between 0.001 and 100, the weight is 0 or lies between 0.01 and 10.

        Returns:
            `float`: the temperature, which [`save`] keeps. Put it into `model.config.score_temperature` to give it to
            all users of a checkpoint (and `text_weight` into `model.config.text_weight`).

        Raises:
            ValueError: a class has a single clip; or, with Cmga-Adapters, `fit` was called without `unknown="auto"`.
        """
        fitted = self._current
        logits, by_text = self._leave_one_out(fitted, "calibrate()"), None
        if fitted.text_embeds is not None:
            embeds = fitted.support.states["text.videos"][0]
            by_text = self.model.text_logits(embeds, fitted.text_embeds).log_softmax(-1)
        self.temperature, weight = best_scale(logits, fitted.support.labels[0].cpu(), by_text)
        if fitted.text_embeds is not None:
            self.text_weight = weight
        return self.temperature

    def _embed_names(
        self, labels: list[str], descriptions: Mapping[str, str] | None, text_weight: float
    ) -> torch.Tensor | None:
        """(N, E), `None` where text is left out."""
        if text_weight:
            return self.model.embed_class_names(labels, descriptions)
        if descriptions:
            raise ValueError(f"descriptions of {list(descriptions)} are given, and text is left out: text_weight is 0")
        return None

    def _with_threshold(self, fitted: FittedSupport) -> FittedSupport:
        if not fitted.auto:
            return fitted
        distances = -self._leave_one_out(fitted, 'unknown="auto"')
        own = distances.gather(1, fitted.support.labels[0].cpu()[:, None])
        return replace(fitted, unknown=float(own.max()))

    def _leave_one_out(self, fitted: FittedSupport, purpose: str) -> torch.Tensor:
        """Logits of the support clips, each without itself: (S, N) float32 on the CPU."""
        with torch.no_grad(), self.device_placement():
            return leave_one_out(self.model, fitted, purpose)

    def _encode(self, classes: Mapping[str, Mapping[str, Any]], keep: bool, batch_size: int | None):
        """See [`encode_examples`]."""
        batch_size = self._batch_size or 1 if batch_size is None else batch_size
        check_whole_number("batch_size", batch_size)
        with torch.no_grad(), self.device_placement():
            return encode_examples(self.model, self.image_processor, classes, keep, batch_size)

    def query_model(self) -> DmgalQueryModel:
        """The model with the classes of now built in, to be compiled or exported: query videos in, logits out."""
        fitted = self._current
        return DmgalQueryModel(self.model, fitted.support, fitted.text_embeds, self.temperature, self.text_weight)

    # Kept support sets

    def save(self, folder: str | os.PathLike):
        """
        Writes the support set: `support.safetensors` and `support.json` with the labels, the threshold, the
        temperature, and id, revision and fingerprint of the model. The clips themselves are not in it. A model to
        which [`DmgalModel.from_backbone`] gave random weights goes into `support_model` beside them.
        """
        write_support(folder, self._current, self.model, self.image_processor, self.temperature, self.text_weight)

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
            ValueError: it was made with another model, other weights or another preprocessing; both are named. Or a
                file of it is damaged.
        """
        about, path = find_support(folder_or_id, revision, token)
        check_made_with(about, self.model, self.image_processor, os.fspath(folder_or_id))
        support, text_embeds = read_support(about, path)
        with torch.no_grad(), self.device_placement():
            blank = blank_support(self.model, self.image_processor)
        check_kept_support(support, blank, path, text_embeds)
        fitted = FittedSupport(
            labels=tuple(about["labels"]),
            support=support.to(self.device),
            digests=tuple(about["clip_digests"]),
            pixel_values=None,
            unknown=check_unknown(about["unknown"], about["labels"]),
            auto=about["unknown_is_auto"],
            text_embeds=None if text_embeds is None else text_embeds.to(self.device),
        )
        self.temperature = about["temperature"]
        self._fitted = fitted
        self.text_weight = 0.0 if text_embeds is None else about["text_weight"]
        return self

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload support set",
    ) -> CommitInfo:
        """Uploads what [`save`] writes to a repository of its own, which is made if need be."""
        fitted, api = self._current, HfApi(token=token)
        model, numbers = kept_model_id(self.model), fitted.support.labels[0].tolist()
        shots = {label: numbers.count(number) for number, label in enumerate(fitted.labels)}
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            on_hub = None if model is None or os.path.isabs(model) else model
            card = support_card(repo_id, on_hub, shots, goes_beside(self.model))
            Path(folder, "README.md").write_text(card, encoding="utf-8")
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
            kwargs: for [`~transformers.pipeline`]; `dtype` is that of the support set if it is not given.
        """
        about, _ = find_support(folder_or_id, revision, token)
        kwargs = made_with(about, os.fspath(folder_or_id), model, revision, token) | kwargs
        classifier = pipeline(TASK, token=token, pipeline_class=cls, **kwargs)
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
            on_error (`str`, *optional*):
                "raise" (the default), or "skip": a video that cannot be read or prepared is answered, in its place, by
                `{"error": message}`, and the others as ever.

        Returns:
            For a video `[{"label": str, "score": float}, ...]`, best first; for several a list of these.

        Raises:
            ValueError: there are no classes yet, or `inputs` holds something that is no video.
                `VideoDecodeError` for a video that cannot be read.
        """
        import datasets  # takes longer to import than all of dmgal_hf

        self._current  # noqa: B018 - raises before fit
        if isinstance(inputs, (datasets.Dataset, datasets.IterableDataset)):
            raise ValueError("give a column of the dataset, for example dataset['video']")
        if isinstance(inputs, (datasets.arrow_dataset.Column, datasets.iterable_dataset.IterableColumn)):
            return list(super().__call__((video for video in undecoded_column(inputs)), **kwargs))
        if isinstance(inputs, (types.GeneratorType, torch.utils.data.Dataset)):
            return super().__call__(inputs, **kwargs)
        videos = _list_videos(inputs, "videos")
        answers = super().__call__([_Named(name, video) for name, video in videos.items()], **kwargs)
        return answers[0] if list(videos) == ["videos"] else answers

    def _sanitize_parameters(self, **parameters):
        for name in parameters.keys() - {"top_k", "on_error"}:
            raise ValueError(f"unknown argument {name!r}; there are top_k, on_error, batch_size and num_workers")
        if parameters.get("top_k") is not None:
            check_whole_number("top_k", parameters["top_k"])
        if parameters.get("on_error", "raise") not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {parameters["on_error"]!r}')
        preparing = {"on_error": parameters.pop("on_error")} if "on_error" in parameters else {}
        return preparing, {}, parameters  # top_k=None in a call takes back that of the pipeline

    def preprocess(self, input_: Any, on_error: str = "raise") -> dict[str, Any]:
        named = input_ if isinstance(input_, _Named) else _Named("video", input_)
        try:
            return {"pixel_values": self.image_processor._pixel_values({named.name: named.video}), "error": None}
        except ValueError as error:
            if on_error == "raise":
                raise
            return {"pixel_values": torch.empty(0), "error": str(error)}  # adds nothing to a batch, see torch.cat

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        errors, fitted = model_inputs["error"], self._current
        errors = errors if isinstance(errors, list) else [errors]  # of a batch, or of one video
        read = [number for number, error in enumerate(errors) if error is None]
        kinds = 1 if fitted.text_embeds is None else 2  # logits by clips, and log-probabilities by text
        logits = torch.full((len(errors), kinds, len(fitted.labels)), torch.nan, device=self.device)
        if read:
            pixel_values = model_inputs["pixel_values"].to(self.device, self.model.dtype)  # (Q, T, 3, H, W)
            logits[read] = self._score(self.model, fitted.support, fitted.text_embeds, pixel_values)
        # Answers may be asked for after the classes have changed. In an array, which is split by video as the logits.
        return {"logits": logits, "fitted": np.full((len(logits), 1), fitted, dtype=object), "error": errors}

    def postprocess(self, model_outputs: dict[str, Any], top_k: int | None = None) -> list | dict[str, str]:
        error = model_outputs["error"]
        error = error[0] if isinstance(error, list) else error
        if error is not None:
            return {"error": error}
        return self._answer(model_outputs["logits"][0], model_outputs["fitted"].item(), top_k)

    def _answer(self, logits: torch.Tensor, fitted: FittedSupport, top_k: int | None) -> list[dict[str, Any]]:
        checked = logits.masked_fill(logits.isneginf(), 0) if fitted.without_clips else logits
        check_finite(checked, self.model.dtype, "a video")
        return answer(logits, fitted, self.temperature, self.text_weight, top_k)

    # Streams

    def stream(
        self,
        video: Any,
        window: float = 2.0,
        stride: float = 0.5,
        format: str | None = None,
        batch_size: int | None = None,
    ) -> Iterator[StreamedLabel]:
        """
        Classifies a long or endless video as it goes, window by window. Window k begins `k · stride` seconds after the
        first frame; of its T segments the frame shown at the centre is taken, and it is complete as soon as the last
        of these T is there. A video shorter than a window is answered once, its last frame standing in for the rest.

        Each frame is decoded once, and each that is taken is resized and goes through the backbone once, however many
        windows share it: give a stride that is a multiple of window / T. (With MGA adapters, which compare
        neighbouring frames, the backbone runs anew for every window.) Memory is that of `batch_size` windows, and
        of as many more that a thread reads ahead of the model, but not where frames may have to be waited for: of a
        camera, a device, a pipe or a URL. Raw H.264 without time stamps is taken to have 25 frames a second. The
        classes may change between two windows: those that are in the batch already are answered by the old ones.

        Args:
            video: path, URL, bytes, binary file object, `{"path", "bytes"}` dict, the number of a camera, or whatever
                FFmpeg opens with `format`.
            window (`float`): seconds, at least 0.001.
            stride (`float`): seconds from one window to the next, at least 0.001.
            format (`str`, *optional*): FFmpeg's name of the input format, for devices: "v4l2", "dshow", ...
            batch_size (`int`, *optional*):
                Windows that go through the model together, which is faster and answers that much later. By default 8
                for a file or bytes, whose frames wait for nobody, and 1 for a camera, a device, a pipe or a URL.

        Yields:
            [`StreamedLabel`] `(start, end, label, score)`.

        Raises:
            ValueError: there are no classes yet, or `window`, `stride` or `batch_size` is too small.
            VideoDecodeError: what does not open, holds no video or is damaged; what came before is answered first.
        """
        self._current  # noqa: B018 - raises before fit
        window, stride = check_seconds("window", window), check_seconds("stride", stride)
        if batch_size is None:
            batch_size = 1 if is_live(video, format) else 8
        check_whole_number("batch_size", batch_size)
        num_frames = self.image_processor.num_frames
        return self._stream(window_batches(video, format, window, stride, num_frames, batch_size, self._read_frame))

    def _stream(self, batches: Generator[list[Window]]) -> Iterator[StreamedLabel]:
        with contextlib.closing(batches):
            for batch in batches:
                yield from self._label_windows(batch)

    def _read_frame(self, picture: Picture) -> torch.Tensor:
        clip = self.image_processor.resize_and_crop(picture.clip(), f"the frame of {picture.source}")
        return self.image_processor.normalize(clip)[0]

    def _label_windows(self, windows: list[Window]) -> Iterator[StreamedLabel]:
        fitted = self._current
        with torch.no_grad(), self.device_placement():
            logits = window_scores(self._score, self.model, windows, fitted.support, fitted.text_embeds).cpu()
        for window, of_window in zip(windows, logits):
            best = self._answer(of_window, fitted, top_k=1)[0]
            yield StreamedLabel(float(window.start), float(window.end), best["label"], best["score"])


__all__ = ["FewShotVideoClassificationPipeline", "StreamedLabel"]
