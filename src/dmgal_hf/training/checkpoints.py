"""Resumable states of a training run: written aside, with checksums, and renamed; and the signals that ask for one."""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..data.kept_clips import file_digest
from ..data.preparation import differences
from ..data.written_aside import replace_folder
from .arguments import DataArguments, ModelArguments, TrainArguments

logger = get_logger(__name__)

PROGRESS_FILE = "progress.json"
CHECKSUMS_FILE = "checksums.json"  # of all other files of a folder, written last
GO_ON = "go on with --resume (without it where no state was saved yet)"

# What may differ between a run and its continuation: it changes neither the episodes nor the updates.
FREE_FIELDS = {
    "output_dir", "resume", "num_workers", "cache_dir", "videos", "splits", "prepared", "checkpoint_every",
    "keep_checkpoints", "cpu_threads", "frame_memory", "report_to", "test_episodes", "max_bad_steps", "max_broken",
    "cuda_graphs",
}  # fmt: skip


@dataclass
class Progress:
    """Where a run stands beside its weights."""

    episodes: int = 0  # training episodes that are done
    best_accuracy: float = -1.0  # in validation so far, in percent; below 0 before the first
    best_episodes: int = 0  # when it was reached
    bad_steps: int = 0  # left out because of a loss that was not finite
    bad_in_a_row: int = 0  # the last of them without a good one between
    validation_due: bool = False  # these weights are still to be validated
    broken: list[str] = field(default_factory=list)  # unreadable training videos, by path
    history: list[dict[str, Any]] = field(default_factory=list)  # losses and accuracies along the way
    arguments: dict[str, Any] = field(default_factory=dict)  # fields of the run, to be compared on resuming
    scheduler: dict[str, Any] = field(default_factory=dict)  # state of the learning-rate schedule


@contextmanager
def keep_others_out(output_dir: Path, accelerator: Accelerator) -> Iterator[None]:
    """
    Inside, no other run writes into `output_dir`; the lock goes with the process. (The processes of a launcher that
    was killed with -9 live on, to the end of their step.)

    Raises:
        ValueError: another run is at it.
    """
    lock, taken = FileLock(output_dir / "checkpoints" / ".lock"), False
    if accelerator.is_main_process:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            taken = True
    # All processes end by this error: one that went on would bury it under that of its lost connection.
    (taken,) = broadcast_object_list([taken])
    if taken:
        raise ValueError(
            f"another process is training into {output_dir}, perhaps one whose launcher was killed: wait for it, end "
            "it, or give another output_dir."
        )
    try:
        yield
    finally:
        lock.release()  # of the main process; nothing in the others


@contextmanager
def write_aside(folder: Path, accelerator: Accelerator, needed: int) -> Iterator[Path]:
    """
    Gives all processes a folder to write into, which takes the place of `folder` when all are done, with the checksums
    of its files. Its tensors take `needed` bytes.

    Raises:
        OSError: there is no room for it, or it could not be written; in all processes. What was in its place is still
            there, and nothing new is.
    """
    aside, cause = folder.with_name(f".{folder.name}.aside"), None
    faults = _faults_of(partial(_make_anew, aside, needed), accelerator)
    if not faults:
        try:
            yield aside
        except (OSError, RuntimeError, SafetensorError) as error:  # what Python, torch and safetensors raise
            cause = error
        faults = gather_object([] if cause is None else [str(cause)])
        faults = faults or _faults_of(partial(_put_in_place, aside, folder), accelerator)
    if faults:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        accelerator.wait_for_everyone()
        free = shutil.disk_usage(folder.parent).free
        raise OSError(
            f"{folder} cannot be written: {faults[0]}. It needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
            f"free on its disk. Nothing of it is left, and what was written before is whole: make room, then {GO_ON}."
        ) from cause


def _faults_of(action: Callable[[], None], accelerator: Accelerator) -> list[str]:
    """Has the main process do something, and tells all of them what went wrong with it."""
    faults = []
    if accelerator.is_main_process:
        try:
            action()
        except OSError as error:
            faults = [str(error)]
    return broadcast_object_list([faults])[0]


def _make_anew(aside: Path, needed: int):
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(aside.parent).free < needed:
        raise OSError("there is no room for it")
    aside.mkdir()


def _put_in_place(aside: Path, folder: Path):
    files = [path for path in sorted(aside.rglob("*")) if path.is_file()]
    checksums = {path.relative_to(aside).as_posix(): file_digest(path) for path in files}
    (aside / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=2))
    replace_folder(folder, aside)


def damage_of(folder: Path) -> str | None:
    """
    What is wrong with a folder of [`write_aside`], None if nothing is. Of one that was written before there were
    checksums it is only looked whether the weights are all there.
    """
    try:
        checksums = json.loads((folder / CHECKSUMS_FILE).read_text())
        for name, checksum in checksums.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if file_digest(folder / name) != checksum:
                return f"{name} is not as it was written, by its checksum"
    except FileNotFoundError:
        for path in folder.glob("*.safetensors"):
            try:
                safe_open(path, "pt")
            except SafetensorError as error:
                return f"{path.name} is not whole: {error}"
    except OSError as error:
        return str(error)
    except (ValueError, AttributeError):
        return f"{CHECKSUMS_FILE} cannot be read"
    return None


def save_checkpoint(accelerator: Accelerator, output_dir: Path, progress: Progress, keep: int, needed: int):
    """
    Writes `output_dir/checkpoints/episode-N`, of which the tensors take `needed` bytes, and removes all but the newest
    `keep` up to it. What is there beyond was damaged, and passed over when the run was resumed.
    """
    folder = output_dir / "checkpoints" / f"episode-{progress.episodes:09d}"
    with write_aside(folder, accelerator, needed) as aside:
        accelerator.save_state(str(aside))
        if accelerator.is_main_process:
            (aside / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
    if accelerator.is_main_process:
        states = list_checkpoints(output_dir)
        kept = [state for state in states if state <= folder][-keep:]
        left_behind = (output_dir / "checkpoints").glob(".episode-*")  # by a run that was killed while it saved
        for old in (*(state for state in states if state not in kept), *left_behind):
            shutil.rmtree(old)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete resumable states, oldest first."""
    return sorted((output_dir / "checkpoints").glob("episode-*"))


def load_checkpoint(accelerator: Accelerator, output_dir: Path, arguments: dict[str, Any]) -> Progress:
    """
    Puts the newest resumable state into what `accelerator` has prepared. One that is damaged is passed over and said
    so.

    Raises:
        FileNotFoundError: there is none, or a file of it or the best model so far is missing.
        ValueError: it belongs to a run with other arguments, and the differing fields are named; or all states or the
            best model so far are damaged.
    """
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise FileNotFoundError(f"there is nothing to resume under {output_dir / 'checkpoints'}: leave out --resume")
    folder = _newest_whole(checkpoints, accelerator)
    remedy = "remove that folder to resume from an older state"
    try:
        progress = Progress(**json.loads((folder / PROGRESS_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder / PROGRESS_FILE} cannot be read ({error}): {remedy}") from error
    _check_best(output_dir / "best", progress, accelerator)
    differing = differing_fields(progress.arguments, arguments, FREE_FIELDS)
    if differing:
        raise ValueError(f"{folder} belongs to another run: {'; '.join(differing)}. Restore these or train anew.")
    try:
        accelerator.load_state(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is not complete ({error}): {remedy}") from error
    except Exception as error:  # torch raises of many kinds; a state with checksums was found whole
        raise ValueError(f"{folder} cannot be loaded ({error}): {remedy}") from error
    # States are of whole steps, and a step may now have other numbers of forward passes, with as many processes.
    accelerator.step = 0
    return progress


def _newest_whole(checkpoints: list[Path], accelerator: Accelerator) -> Path:
    """The newest state that is not damaged, the same for all processes."""
    whole, damaged = None, []
    if accelerator.is_main_process:
        for folder in reversed(checkpoints):
            damage = damage_of(folder)
            if damage is None:
                whole = folder
                break
            damaged.append(f"{folder} is damaged ({damage})")
    whole, damaged = broadcast_object_list([whole, damaged])
    if whole is None:
        raise ValueError(f"there is no whole state to resume: {'; '.join(damaged)}. Put a copy back or train anew.")
    for damage in damaged:
        logger.warning(f"{damage}: the run goes on from {whole.name}, and removes it with the next state it saves.")
    return whole


def _check_best(best: Path, progress: Progress, accelerator: Accelerator):
    """Its weights are the result of the run, and are not read before its end."""
    with accelerator.main_process_first():
        old = best.with_name(".best.old")
        if old.exists() and not best.exists():  # killed while a better one took its place
            old.rename(best)
    if progress.best_accuracy < 0:
        return
    if not best.is_dir():
        raise FileNotFoundError(f"{best} is missing, the best model of this run: put it back, or train anew.")
    (damage,) = broadcast_object_list([damage_of(best) if accelerator.is_main_process else None])
    if damage:
        raise ValueError(f"{best} is damaged ({damage}), the best model of this run: put a copy back, or train anew.")


def differing_fields(before: dict[str, Any], now: dict[str, Any], free: set[str]) -> list[str]:
    """
    What an error says of the arguments, but for the `free` ones, in which two runs differ. A field that the run before
    does not know, as it is newer, was at its default.
    """
    now = json.loads(json.dumps(now))
    for group in (DataArguments, ModelArguments, TrainArguments):
        before = {name: value for name, value in vars(group()).items() if name in now} | before
    return differences(before, now, free)


# Set by the launchers of torch and accelerate. Other parents do not count: the shell behind nohup may go.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION")


class StopSignal:
    """
    Turns SIGTERM and Ctrl-C into a request that the training loop honours after its step, and at once where there is
    nothing to save. A second Ctrl-C is not held back. A launcher that is ended leaves its process running, or, by
    kill -9, several of them, so its end is a SIGTERM as well.

    Attributes:
        received (`int`): the first signal of this process, 0 if none.
        agreed (`int`): the signal that any process had received when the processes last compared, 0 if none.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received = self.agreed = 0
        self._at_once = False
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_launcher, args=(os.getppid(),), daemon=True)

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        if any(name in os.environ for name in _LAUNCHED):
            self._watch.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        if self._watch.is_alive():
            self._watch.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _watch_launcher(self, parent: int):
        gone = False
        # The first process took over from a launcher that went while this one started, or is the launcher itself.
        with suppress(psutil.Error):
            gone = parent == 1 and "python" not in " ".join(psutil.Process(parent).cmdline())
        while not gone and not self._over.wait(0.5):
            gone = os.getppid() != parent
        if gone:
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, number: int, _frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = not self.received, self.received or number
        if first and self._at_once:
            self.leave(number)

    def flags(self) -> list[float]:
        """What this process received, for the processes to compare."""
        return [float(self.received == number) for number in self.NUMBERS]

    def agree(self, flags: list[float]):
        """Takes the sum or mean of the [`flags`] of all processes."""
        self.agreed = next((number for number, flag in zip(self.NUMBERS, flags) if flag > 0), 0)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, but for what is [`held`], a signal ends the process where it stands."""
        before, self._at_once = self._at_once, True
        if self.received:
            self.leave(self.received)
        yield
        self._at_once = before

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, but for what is [`at_once`], a signal is noted; it ends the process afterwards."""
        before, self._at_once = self._at_once, False
        yield
        self._at_once = before
        if self.received:
            self.leave(self.received)

    def leave(self, number: int):
        """Ends the process, to be resumed."""
        print(f"Stopped. {GO_ON[0].upper()}{GO_ON[1:]}.", file=sys.stderr)
        raise SystemExit(128 + number)
