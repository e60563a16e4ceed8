"""Every kind of file we read, damaged by chance: it is read, or refused with VideoDecodeError, and nothing else.

A few hundred cases run with the tests; `python tests/model/test_fuzz.py --number 2000 --seed 1` runs more and prints
the table. A case is told by its kind, seed and number alone; `--keep FOLDER` writes the files that showed a fault.
"""

import argparse
import io
import multiprocessing
import random
import resource
import tempfile
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dmgal_hf.model.video_decoding import VideoDecodeError, probe_video, read_frames

FRAMES, SIZE = 10, (96, 128)
SECONDS, MEGABYTES = 30, 500  # what one case may take, above what the process had
VIDEOS = {  # name of the file -> encoder, pixel format and more
    "h264.mp4": ("libx264", "yuv420p", {"options": {"x264-params": "keyint=5:bframes=2"}}),
    "h264_fragmented.mp4": ("libx264", "yuv420p", {"muxing": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264.mkv": ("libx264", "yuv420p", {}),
    "h264.avi": ("libx264", "yuv420p", {}),
    "h264.ts": ("libx264", "yuv420p", {}),
    "h264.flv": ("libx264", "yuv420p", {}),
    "h264.h264": ("libx264", "yuv420p", {}),
    "hevc.mp4": ("libx265", "yuv420p", {"options": {"x265-params": "log-level=none:keyint=5"}}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp9.ivf": ("libvpx-vp9", "yuv420p", {"options": {"deadline": "realtime", "cpu-used": "8"}}),
    "vp8.webm": ("libvpx", "yuv420p", {"options": {"deadline": "realtime"}}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"options": {"preset": "12"}}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"max_b_frames": 2}),
    "mpeg4.mp4": ("mpeg4", "yuv420p", {}),
    "msmpeg4.avi": ("msmpeg4", "yuv420p", {}),
    "mpeg1.mpg": ("mpeg1video", "yuv420p", {"max_b_frames": 2}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {}),
    "mpeg2.mxf": ("mpeg2video", "yuv420p", {}),
    "wmv2.wmv": ("wmv2", "yuv420p", {}),
    "flv.flv": ("flv", "yuv420p", {}),
    "h263.3gp": ("h263", "yuv420p", {}),
    "rv20.rm": ("rv20", "yuv420p", {}),
    "svq1.mov": ("svq1", "yuv410p", {}),
    "cinepak.avi": ("cinepak", "rgb24", {}),
    "mjpeg.avi": ("mjpeg", "yuvj420p", {}),
    "jpeg2000.mov": ("jpeg2000", "rgb24", {}),
    "png.avi": ("png", "rgba", {}),
    "qtrle.mov": ("qtrle", "argb", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "dnxhd.mov": ("dnxhd", "yuv422p", {"options": {"profile": "dnxhr_lb"}, "size": (144, 256)}),
    "ffv1.mkv": ("ffv1", "yuv420p", {"options": {"level": "3", "slicecrc": "1"}}),
    "huffyuv.avi": ("huffyuv", "yuv422p", {}),
    "utvideo.avi": ("utvideo", "gbrp", {}),
    "zmbv.avi": ("zmbv", "bgr0", {}),
    "flashsv.flv": ("flashsv", "bgr24", {}),
    "raw.avi": ("rawvideo", "yuv420p", {}),
    "raw.nut": ("rawvideo", "yuv420p", {}),
    "raw.y4m": ("wrapped_avframe", "yuv420p", {}),
    "apng.apng": ("apng", "rgb24", {}),
    "gif.gif": ("gif", "rgb8", {}),
}
PICTURES = ("frames.zip", "bzip2_frames.zip", "lzma_frames.zip", "folder.jpg", "folder.png", "archive.zip",
            "stored_archive.zip", "video.zip", "cache.arrow")  # fmt: skip
METHODS = {"bzip2_frames.zip": zipfile.ZIP_BZIP2, "lzma_frames.zip": zipfile.ZIP_LZMA,
           "stored_archive.zip": zipfile.ZIP_STORED}  # fmt: skip


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A texture under a moving camera, with a square that moves the other way."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    image = np.stack([(x + 3 * number) * 5 % 256, (y + number) * 3 % 256, (x // 8 + y // 8 + number) * 40 % 256], -1)
    image[20 : height // 2, 8 * number % width : 8 * number % width + 24] = 255 - 20 * number
    return image.astype(np.uint8)


def write_video(path: Path) -> None:
    codec, pix_fmt, more = VIDEOS[path.name]
    height, width = more.get("size", SIZE)
    with av.open(str(path), "w", options=more.get("muxing", {})) as container:
        stream = container.add_stream(codec, rate=25, options=more.get("options", {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = 5
        stream.codec_context.max_b_frames = more.get("max_b_frames", 0)
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(number, (height, width)), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def encoded(number: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, kind)
    return file.getvalue()


def write_seed(folder: Path, name: str) -> Path:
    """A sound file of this kind, whose bytes are to be changed."""
    path = folder / name
    if name in VIDEOS:
        write_video(path)
    elif name == "cache.arrow":
        path = folder / "prepared" / "shards" / name
        path.parent.mkdir(parents=True)
        (folder / "prepared" / "settings.json").write_text("{}")
        frames = [{"bytes": encoded(number, "PPM"), "path": None} for number in range(FRAMES)]
        batch = pa.RecordBatch.from_pylist([{"path": "a.mp4", "frames": frames}] * 2)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
            writer.write_batch(batch)
    elif name.startswith("folder"):
        path.write_bytes(encoded(5, "PNG" if name.endswith("png") else "JPEG"))
    else:
        with zipfile.ZipFile(path, "w", METHODS.get(name, zipfile.ZIP_DEFLATED)) as packed:
            if name == "video.zip":
                write_video(folder / "mpeg4.mp4")
                packed.write(folder / "mpeg4.mp4", "a/b.mp4")
            for number in range(FRAMES if name != "video.zip" else 0):
                packed.writestr(f"a/img_{number}.png", encoded(number, "PNG"))
    return path


def video_of(path: Path) -> str:
    """What read_frames is given for a file of this kind."""
    if path.name == "cache.arrow":
        return f"{path}#1"
    if path.name.endswith("archive.zip"):
        return f"{path}#/a"
    if path.name.endswith("video.zip"):
        return f"{path}#/a/b.mp4"
    if path.name.startswith("folder"):
        frames = path.parent / f"{path.stem}_frames"
        frames.mkdir(exist_ok=True)
        for old in frames.iterdir():
            old.unlink()
        for number in range(4):
            (frames / f"{number}{path.suffix}").write_bytes(path.read_bytes())
        return str(frames)
    return str(path)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to three changes, of bits, bytes, whole parts, or a number where a field may be."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        head = draw.random() < 0.4  # where the headers and tables of most files are
        at = draw.randrange(min(len(data), 1024) if head else len(data))
        length = min(draw.choice((1, 4, 16, 64, 512)), len(data) - at)
        change = draw.randrange(8)
        if change == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif change == 1:
            data[at : at + length] = draw.randbytes(length)
        elif change == 2:
            data[at : at + length] = bytes([draw.choice((0, 255))]) * length
        elif change == 3:
            del data[at:]
        elif change == 4:
            del data[at : at + length]
        elif change == 5:
            data[at:at] = draw.randbytes(length)
        elif change == 6:
            other = draw.randrange(len(data))
            data[at : at + length] = data[other : other + length]
        else:
            number = draw.choice((0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 30_000_000, 65535, 0))
            data[at : at + 4] = number.to_bytes(4, draw.choice(("big", "little")))
    return bytes(data)


def outcome(video: str, expected: bytes) -> str:
    """What became of a case; a fault is named by its exception."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        probe_video(video)
        result = "same frames" if read_frames(video, FRAMES).numpy().tobytes() == expected else "other frames"
    except VideoDecodeError:
        result = "refused"
    except Exception as error:  # what this test looks for
        return f"FAULT {type(error).__name__}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    return result if grown < MEGABYTES else f"FAULT takes {grown} MB"


def serve(connection) -> None:
    """A process that reads what it is told to: it may end, or hang, without the tests ending or hanging."""
    while (case := connection.recv()) is not None:
        connection.send(outcome(*case))


class Reader:
    """`outcome` in a process of its own."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, video: str, expected: bytes) -> str:
        self.connection.send((video, expected))
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            result = f"FAULT takes more than {SECONDS} s"
        except (EOFError, ConnectionError):
            result = "FAULT the process died"
        self.process.kill()
        self.process.join()
        self.start()
        return result

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()


def run(number: int, seed: int, keep: Path | None = None, only: str = "") -> dict[str, Counter]:
    """Outcomes of `number` cases by kind of file, the kinds taking turns."""
    kinds = [name for name in (*VIDEOS, *PICTURES) if only in name]
    counts = {name: Counter() for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seeds = {name: write_seed(folder, name) for name in kinds}
        data = {name: path.read_bytes() for name, path in seeds.items()}
        expected = {name: read_frames(video_of(path), FRAMES).numpy().tobytes() for name, path in seeds.items()}
        read = Reader()
        for case in range(number):
            name = kinds[case % len(kinds)]
            seeds[name].write_bytes(mutate(data[name], random.Random(f"{seed} {name} {case}")))
            result = read(video_of(seeds[name]), expected[name])
            counts[name][result] += 1
            if keep is not None and result.startswith("FAULT"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{seed}_{case}_{name}").write_bytes(seeds[name].read_bytes())
        read.close()
    return counts


def table(counts: dict[str, Counter]) -> str:
    columns = ("refused", "same frames", "other frames")
    lines = [f"{'':22}" + "".join(f"{name:>14}" for name in (*columns, "faults"))]
    for name, results in {**counts, "all": sum(counts.values(), Counter())}.items():
        faults = sum(count for result, count in results.items() if result not in columns)
        lines.append(f"{name:22}" + "".join(f"{count:14}" for count in (*(results[c] for c in columns), faults)))
    return "\n".join(lines)


def faults(counts: dict[str, Counter]) -> list[str]:
    return [f"{name}: {result}" for name, results in counts.items() for result in results if "FAULT" in result]


@pytest.mark.slow
def test_damaged_files_are_read_or_refused():
    counts = run(number=300, seed=0)
    assert not faults(counts)
    assert sum(results["refused"] for results in counts.values()) > 100  # that damage was done at all


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--only", default="", help="kinds of file whose name holds this")
    arguments = parser.parse_args()
    counts = run(arguments.number, arguments.seed, arguments.keep, arguments.only)
    print(table(counts))
    print("\n".join(faults(counts)))
