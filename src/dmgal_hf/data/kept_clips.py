"""Clips encoded once for all episodes they are in: kept in memory, or in files that are mapped, and found again."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants
from huggingface_hub.utils.sha import sha_fileobj
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..model.configuration_dmgal import DmgalConfig
from ..model.video_decoding import read_frames
from ..model.video_processing_dmgal import DmgalVideoProcessor, DmgalVideoProcessorKwargs, undecoded_column
from ..model.zip_archive import split_zip_path
from .frame_memory import FrameMemory
from .reading_workers import obey_main_process
from .written_aside import written_aside

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

KEPT_FORMAT = 1  # of the record of a clip; another one is another key
CLIPS_TOGETHER = {"cpu": 8, "cuda": 32}  # in one pass through the model

# Fields of DmgalConfig that change no feature, or hold what each version of transformers writes differently.
_NOT_IN_FINGERPRINT = {"attention_dropout", "backbone_config", "format_version", "position_dropout",
                       "score_temperature", "text_guidance", "text_model", "text_templates",
                       "text_weight"}  # fmt: skip


class KeptClips:
    """
    What [`DmgalModel.encode_clips`] gives, of some rows of a dataset, to be indexed by row number: `kept[rows]`, with
    `rows` an integer, list, array or tensor of any shape, is a `dict` of tensors of that shape and the axes of a clip.

    Made by [`encode_clips`]; [`evaluate_episodes`](dmgal_hf.training.evaluate_episodes) takes it as `kept`.

    Attributes:
        rows (`torch.LongTensor` of shape `(V,)`): the rows that are kept, ascending.
        fingerprint (`str`, *optional*): of the weights, config, processor and precision they were made with.
        videos (`list[str]`, *optional*): what tells whether the video of a row has changed (see [`video_digest`]).

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig
    >>> from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor
    >>> from dmgal_hf.data import KeptClips, encode_clips

    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> model = DmgalModel(DmgalConfig(backbone_config=backbone, motion_reduction=4)).eval()
    >>> processor = DmgalVideoProcessor(size=40, crop_size=32)
    >>> kept = encode_clips(model, processor, ["a.mp4", "b.mp4", "c.mp4", "d.mp4"])
    >>> kept.save("clips.safetensors")
    >>> kept = KeptClips.load("clips.safetensors")
    >>> support, query = kept[[[0, 1]]], kept[[[2, 3, 0]]]  # one episode of two supports and three queries
    >>> model.score_clips(support, torch.tensor([[0, 1]]), query).shape
    torch.Size([1, 3, 2])
    ```
    """

    def __init__(
        self,
        rows: torch.Tensor,
        fingerprint: str | None,
        videos: list[str] | None,
        tensors: dict[str, torch.Tensor] | None = None,
        files: list[Path] | None = None,
        folder: tempfile.TemporaryDirectory | None = None,
    ):
        self.rows, self.fingerprint, self.videos = rows, fingerprint, videos
        self._tensors, self._files = tensors, files
        self._folder = folder  # goes with the last reference to it
        self._names = list(tensors) if files is None else list(_read_file(files[0]))
        self._places = torch.full((int(rows.max()) + 1,), -1)
        self._places[rows] = torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> dict[str, torch.Tensor]:
        return self.gather(rows, self._names)

    def support(self, rows: Any) -> dict[str, torch.Tensor]:
        """Of `self[rows]` what is read of supports."""
        return self.gather(rows, [name for name in self._names if not name.startswith("query.")])

    def query(self, rows: Any) -> dict[str, torch.Tensor]:
        """Of `self[rows]` what is read of queries."""
        return self.gather(rows, [name for name in self._names if not name.startswith("support.")])

    def gather(self, rows: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names. Raises `IndexError` for a row that is not kept."""
        rows = torch.as_tensor(rows)
        known = (rows >= 0) & (rows < len(self._places))
        places = torch.where(known, self._places[rows.where(known, 0)], -1)
        if (places < 0).any():
            raise IndexError(f"row {int(rows[places < 0][0])} is not among the {len(self)} clips that are kept")
        if self._files is None:
            device = self._tensors[names[0]].device
            return {name: self._tensors[name][places.to(device)] for name in names}
        distinct, index = places.unique(return_inverse=True)
        clips = [_read_file(self._files[place], names) for place in distinct.tolist()]
        return {name: torch.stack([clip[name] for clip in clips])[index] for name in names}

    def bytes_of(self, part: str) -> int:
        """Bytes of a clip as "support" or as "query"."""
        return sum(tensor.nbytes for tensor in getattr(self, part)(self.rows[0]).values())

    def save(self, path: str | os.PathLike):
        """
        Writes one safetensors file, which replaces that of before once it is whole. Raises `ValueError` where it was
        not noted what the clips are made of.
        """
        if self.fingerprint is None:
            raise ValueError("it is not known what these clips are made of: encode them with identify=True.")
        tensors = {"rows": self.rows} | {
            f"clips.{name}": one.cpu().contiguous() for name, one in self[self.rows].items()
        }
        about = {"format": "pt", "fingerprint": self.fingerprint, "videos": json.dumps(self.videos)}
        _save_file(tensors, Path(path), about)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "KeptClips":
        """Reads what [`save`] wrote, mapped: clips are read as they are asked for. Raises `ValueError` otherwise."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                about = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is damaged ({error}): encode the clips again.") from error
        if "fingerprint" not in about or "rows" not in tensors:
            raise ValueError(f"{os.fspath(path)} holds no clips: write it with KeptClips.save().")
        rows = tensors.pop("rows")
        tensors = {name.removeprefix("clips."): tensor for name, tensor in tensors.items()}
        return cls(rows, about["fingerprint"], json.loads(about["videos"]), tensors)

    def check(self, made_with: str, videos: "Dataset | Sequence[Any]", rows: torch.Tensor):
        """
        Raises `ValueError` unless these are the clips `rows` of `videos`, made with what has this [`fingerprint`].
        """
        if self.fingerprint != made_with:
            raise ValueError(
                "the kept clips were made with other weights, another config, processor or precision than these: "
                "encode them again with encode_clips()."
            )
        missing = sorted(set(rows.tolist()) - set(self.rows.tolist()))
        if missing:
            raise ValueError(
                f"the episodes name {len(missing)} rows that are not among the kept clips, as {missing[0]}."
            )
        videos, known = _column(videos), dict(zip(self.rows.tolist(), self.videos))
        digests = _digests([videos[row] for row in rows.tolist()])
        changed = [row for row, digest in zip(rows.tolist(), digests) if digest != known[row]]
        if changed:
            raise ValueError(
                f"{len(changed)} videos are not those that the kept clips were made of, as that of row {changed[0]}: "
                "encode them again with encode_clips()."
            )


def encode_clips(
    model: PreTrainedModel,
    processor: DmgalVideoProcessor,
    videos: "Dataset | Sequence[Any]",
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    accelerator: "Accelerator | None" = None,
    kept_clips_gb: float | None = None,
    kept_clips: str | os.PathLike | None = None,
    identify: bool = True,
    description: str = "Encoding",
    memory: FrameMemory | None = None,
) -> KeptClips:
    """
    Reads and encodes every clip once, for any number of episodes.

    They are kept on the model's device while they fit, then in (pinned) memory of the machine, then in files. With
    several processes each clip is encoded by one of them alone. In memory every process then gets all of them: a clip
    of a few MB is sent in milliseconds, where to read it anew takes tens of them, and to encode it 10^10 operations.
    Files are sent nowhere: all processes map those of one folder.

    Args:
        model ([`DmgalModel`]): it is put into eval mode.
        processor ([`DmgalVideoProcessor`]): of the model.
        videos (`datasets.Dataset` or sequence): with a column `video`; or videos of any kind that it may hold.
        rows (sequence of `int`, *optional*): which of them, by default all.
        num_workers (`int`): processes that read videos, for each process that computes.
        accelerator (`Accelerator`, *optional*): of a run of several processes, or of another precision.
        kept_clips_gb (`float`, *optional*):
            Memory for the clips, in 10^9 bytes for all processes of this machine together; by default half of what is
            free. Beyond it files take over.
        kept_clips (`str` or `os.PathLike`, *optional*):
            A folder for files of the clips, one each, which are there for the next call. They are named by weights,
            config, processor, precision and the content of the video (the address of one on the net), so that none is
            ever taken for another. Without it, files lie under `HF_HOME` and go with the result.
        identify (`bool`): whether to note what the clips are made of, without which they cannot be saved.
        description (`str`): of the progress bar.
        memory ([`FrameMemory`], *optional*): where frames of `videos` are kept.

    Returns:
        [`KeptClips`].

    Raises:
        VideoDecodeError: a clip cannot be read.
        ValueError: clips come out in different sizes, or a row is not there.
        OSError: a folder cannot be written, or has no room for the clips.
    """
    model.eval()
    device, dtype = next((one.device, one.dtype) for one in model.parameters() if one.is_floating_point())
    videos = _column(videos)
    rows = torch.arange(len(videos)) if rows is None else torch.as_tensor(rows).unique()
    if not len(rows) or rows[0] < 0 or rows[-1] >= len(videos):
        named = f"rows {int(rows[0])} to {int(rows[-1])} of" if len(rows) else "none of"
        raise ValueError(f"there is nothing to encode: {named} {len(videos)} videos were asked for.")
    made_with, digests = None, None
    if identify or kept_clips is not None:
        made_with = fingerprint_of_clips(model, processor, accelerator)
        digests = _digests([videos[row] for row in rows.tolist()])
    folder = None if kept_clips is None else _make_folder(Path(kept_clips), made_with)
    keeper = _Keeper(device, len(rows), accelerator, kept_clips_gb, folder, digests)
    shares = keeper.share_out(CLIPS_TOGETHER.get(device.type, 8))
    loader = DataLoader(
        _Frames(videos, processor, memory),
        batch_sampler=[rows[places].tolist() for places in shares[keeper.process]],
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=device.type == "cuda",
        worker_init_fn=obey_main_process,
    )
    bar = tqdm(total=len(rows), initial=len(rows) - len(keeper.missing), desc=f"{description}: clips", unit="clip",
               leave=False, disable=keeper.process > 0)  # fmt: skip
    with bar, torch.no_grad():
        for step, frames in enumerate(loader):
            with nullcontext() if accelerator is None else accelerator.autocast():
                frames = processor.normalize(frames.to(device, non_blocking=True)).to(dtype)
                clips = model.encode_clips(frames)
            places = [share[step] for share in shares]
            keeper.put(places, clips)
            bar.update(min(len(torch.cat(places)), bar.total - bar.n))
    return keeper.finish(rows, made_with)


class _Frames(torch.utils.data.Dataset):
    """Row -> (T, 3, H, W) uint8, as in evaluation."""

    def __init__(self, videos: Sequence[Any], processor: DmgalVideoProcessor, memory: FrameMemory | None):
        self.videos, self.processor, self.memory = videos, processor, memory

    def __getitem__(self, row: int) -> torch.Tensor:
        video, num_frames = self.videos[row], self.processor.num_frames
        frames = read_frames(video, num_frames) if self.memory is None else self.memory.read(row, video, num_frames)
        return self.processor.resize_and_crop(frames)


def _stack(clips: list[torch.Tensor]) -> torch.Tensor:
    sizes = sorted({tuple(clip.shape[-2:]) for clip in clips})
    if len(sizes) > 1:
        raise ValueError(
            f"the clips come out in different sizes ({sizes[0]} and {sizes[1]}): set do_center_crop=True of the "
            "processor."
        )
    return torch.stack(clips)


class _Keeper:
    """
    Puts encoded clips where they are kept. A clip goes by its place, the number of its row among the rows. Where the
    clips go is decided with the first of them, when their size is known, and by all processes alike.
    """

    def __init__(
        self,
        device: torch.device,
        number: int,
        accelerator: "Accelerator | None",
        gigabytes: float | None,
        folder: Path | None,
        digests: list[str] | None,
    ):
        self.device, self.number, self.accelerator = device, number, accelerator
        self.process, self.processes = (
            (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        )
        self.gigabytes, self.folder, self.digests = gigabytes, folder, digests
        self.temporary: tempfile.TemporaryDirectory | None = None
        self.tensors: dict[str, torch.Tensor] | None = None
        self.in_files: bool | None = None
        there = [] if folder is None else [path.is_file() for path in self._paths()]
        self.missing = self._agree([place for place in range(number) if not (there and there[place])])

    def _agree(self, value: Any) -> Any:
        """What the main process says, in all."""
        return value if self.processes == 1 else broadcast_object_list([value])[0]

    def _paths(self) -> list[Path]:
        names = self.digests or [str(place) for place in range(self.number)]
        return [self.folder / f"{name}.safetensors" for name in names]

    def share_out(self, together: int) -> list[list[torch.Tensor]]:
        """
        Batches of places for each process, as many and as large for all of them: a process with fewer clips repeats
        one, as the others wait for it.
        """
        longest = math.ceil(len(self.missing) / self.processes)
        steps = math.ceil(longest / together)
        shares = []
        for process in range(self.processes):
            share = self.missing[process :: self.processes]
            share += (share or self.missing)[:1] * (longest - len(share))
            shares.append(list(torch.tensor(share).tensor_split(steps)) if steps else [])
        return shares

    def put(self, places: list[torch.Tensor], clips: dict[str, torch.Tensor]):
        """Keeps what this process has encoded of `places`, those of each process."""
        if self.in_files is None:
            self._choose(clips)
        if self.folder is not None:
            clips_here = {name: tensor.cpu() for name, tensor in clips.items()}
            paths = self._paths()
            for number, place in enumerate(places[self.process].tolist()):
                record = {name: tensor[number].clone().contiguous() for name, tensor in clips_here.items()}
                _save_file(record, paths[place])
        if self.in_files:
            return
        if self.processes > 1:
            clips = self.accelerator.gather({name: tensor.contiguous() for name, tensor in clips.items()})
        places = torch.cat(places)
        for name, tensor in clips.items():
            if tensor.shape[1:] != self.tensors[name].shape[1:]:
                raise ValueError("the clips come out in different sizes: set do_center_crop=True of the processor.")
            self.tensors[name][places.to(self.tensors[name].device)] = tensor.to(self.tensors[name].device)

    def _choose(self, clips: dict[str, torch.Tensor]):
        a_clip = sum(tensor[0].nbytes for tensor in clips.values())
        on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        asked = math.inf if self.gigabytes is None else self.gigabytes * 1e9 / on_this_machine
        free = psutil.virtual_memory().available / on_this_machine
        limits = {"cpu": asked if self.gigabytes is not None else free / 2}
        if self.device.type == "cuda":
            limits = {"cuda": min(asked, torch.cuda.mem_get_info(self.device)[0] / 2), **limits}
        kind = next((kind for kind, limit in limits.items() if a_clip * self.number <= limit), None)
        # One that has no room is enough: files are for all.
        fits = torch.tensor([kind is not None], device=self.device)
        self.in_files = not bool(fits.all() if self.processes == 1 else self.accelerator.gather(fits).all())
        if self.in_files and self.folder is None:
            self._make_temporary_folder()
        if self.folder is not None:
            self._check_room(a_clip)
        if not self.in_files:
            self.tensors = {
                name: torch.empty(
                    (self.number, *tensor.shape[1:]),
                    dtype=tensor.dtype,
                    device=self.device if kind == self.device.type else "cpu",
                    pin_memory=kind != self.device.type,
                )
                for name, tensor in clips.items()
            }

    def _make_temporary_folder(self):
        if self.process == 0:
            beside = Path(constants.HF_HOME) / "dmgal_hf"
            beside.mkdir(parents=True, exist_ok=True)
            self.temporary = tempfile.TemporaryDirectory(prefix="kept_clips_", dir=beside)
        self.folder = Path(self._agree(self.temporary and self.temporary.name))
        if not self.folder.is_dir():
            raise OSError(
                f"{self.folder}, for clips that memory has no room for, is not there on this machine: give "
                "kept_clips, a folder that all machines share, or a larger kept_clips_gb."
            )

    def _check_room(self, a_clip: int):
        needed, free = a_clip * len(self.missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"{self.folder} has room for {free / 1e9:.1f} GB, and the clips to be kept there take "
                f"{needed / 1e9:.1f} GB: make room, give kept_clips another folder, or raise kept_clips_gb."
            )

    def finish(self, rows: torch.Tensor, made_with: str | None) -> KeptClips:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        if self.in_files is None:  # all were there
            self._choose({name: tensor[None] for name, tensor in _read_file(self._paths()[0]).items()})
        if self.in_files:
            return KeptClips(rows, made_with, self.digests, files=self._paths(), folder=self.temporary)
        paths, encoded = self._paths() if self.folder is not None else [], set(self.missing)
        for place, path in enumerate(paths):
            if place not in encoded:
                for name, tensor in _read_file(path).items():
                    self.tensors[name][place] = tensor
        return KeptClips(rows, made_with, self.digests, self.tensors)


def _make_folder(root: Path, made_with: str) -> Path:
    """The folder of the clips of one model and processor."""
    folder = root / made_with[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"kept_clips={os.fspath(root)!r} cannot be written ({error}): give another folder.") from error
    return folder


def _save_file(tensors: dict[str, torch.Tensor], path: Path, about: dict[str, str] | None = None):
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata=about)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written ({error}); what was written before is whole and is kept.") from error


def _read_file(path: Path, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a clip; they are mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names or file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the clip is encoded again.") from error


# What a clip is made of


def fingerprint(model: PreTrainedModel, processor: DmgalVideoProcessor) -> str:
    """SHA-256 of all that the features of a clip depend on: weights, fields of the config and of the processor."""
    fields = {name: getattr(model.config, name) for name in DmgalConfig.__annotations__.keys() - _NOT_IN_FINGERPRINT}
    settings = {name: getattr(processor, name) for name in DmgalVideoProcessorKwargs.__annotations__}
    if getattr(model, "text_head", None) is not None:
        fields["text_templates"] = model.config.text_templates  # classes that are added have theirs from the same
    digest = hashlib.sha256(json.dumps([fields, settings], sort_keys=True, default=str).encode())
    weights = {name.removeprefix("base_model.model."): weight for name, weight in model.state_dict().items()}
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_of_clips(
    model: PreTrainedModel, processor: DmgalVideoProcessor, accelerator: "Accelerator | None" = None
) -> str:
    """[`fingerprint`] with the precision of the run, which adapters are at work, and the form of what is kept."""
    precision = "no" if accelerator is None else accelerator.mixed_precision
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    adapters = [[layer.active_adapters, layer.disable_adapters] for layer in layers]
    backbone = model.config.backbone_config.to_diff_dict()
    parts = [fingerprint(model, processor), precision, adapters, backbone, KEPT_FORMAT]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _digests(videos: list[Any]) -> list[str]:
    with ThreadPoolExecutor() as threads:
        return list(threads.map(video_digest, videos))


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def video_digest(video: Any) -> str:
    """
    What changes where a video does: a hash of a file's content; of path, size and time of what lies in an archive, a
    frame cache or a folder of frames; or of the address.
    """
    if isinstance(video, Mapping):
        video = video.get("path") if video.get("bytes") is None else video["bytes"]
    if isinstance(video, (bytes, bytearray, memoryview)):
        return hashlib.sha256(video).hexdigest()
    if hasattr(video, "read"):
        video.seek(0)
        return hashlib.sha256(video.read()).hexdigest()
    path = os.fspath(video)
    if os.path.isfile(path):
        return file_digest(path)
    parts = [os.path.realpath(path) if os.path.isdir(path) else path]
    container = (split_zip_path(path) or path.rpartition("#"))[0]
    for part in sorted(os.scandir(path), key=lambda entry: entry.name) if os.path.isdir(path) else [Path(container)]:
        if part.is_file():
            state = part.stat()
            parts.append([part.name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _column(videos: "Dataset | Sequence[Any]") -> Sequence[Any]:
    return undecoded_column(videos["video"]) if hasattr(videos, "column_names") else videos
