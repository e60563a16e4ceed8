"""Frames as pictures: which of them are the clip, and what is refused before it takes memory."""

import io
import shutil
import zipfile
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dmgal_hf.model.reading_limits import LIMITS, VideoDecodeError
from dmgal_hf.model.video_decoding import probe_video, read_frames, read_frames_at


def shade(value, kind="PNG", size=(32, 24)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, kind)
    return file.getvalue()


def put(folder: Path, pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, members: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def doors(tmp_path: Path, pictures: dict[str, bytes]) -> list[str]:
    """The same frames in a folder, in a zip of their own, and in an archive of many clips."""
    folder = put(tmp_path / "clip", pictures)
    pack(tmp_path / "clip.zip", pictures)
    pack(tmp_path / "all.zip", {f"run/clip/{name}": data for name, data in pictures.items()})
    return [str(folder), str(tmp_path / "clip.zip"), f"{tmp_path}/all.zip#/run/clip"]


@pytest.mark.parametrize(
    "names",
    [
        ("img_{:05}.jpg", "flow_x_{:05}.jpg", "flow_y_{:05}.jpg"),
        ("{:04}_rgb.png", "{:04}_depth.png"),
        ("Frame{}.jpg", "mask{}.jpg", "thumb.jpg"),
        ("image-{}.jpg", "image-{}.png.mask.png"),
    ],
)
def test_of_several_series_the_one_in_colour_is_the_clip(tmp_path, names):
    pictures = {name.format(k): shade(20 * k + 100 * (name != names[0])) for k in range(4) for name in names}
    if names[0].startswith("image"):  # both names tell of colour
        for video in doors(tmp_path, pictures):
            with pytest.raises(VideoDecodeError, match=r"holds 2 series of pictures, 'image-#', 'image-#\.png\.mask'"):
                probe_video(video)
        return
    for video in doors(tmp_path, pictures):
        assert probe_video(video).num_frames == 4
        assert [int(frame[0, 0, 0]) // 20 for frame in read_frames(video, 4)] == [0, 1, 2, 3]


def test_series_that_no_name_tells_apart_are_named(tmp_path):
    pictures = {f"{kind}_{k}.png": shade(k) for kind in ("left", "right") for k in range(3)}
    for video in doors(tmp_path, pictures):
        with pytest.raises(
            VideoDecodeError, match=r"holds 2 series of pictures, 'left_#', 'right_#' .* folder of its"
        ):
            read_frames(video)
    two = pack(tmp_path / "two.zip", {f"{clip}/{k}.png": shade(k) for clip in ("1", "2") for k in range(3)})
    with pytest.raises(VideoDecodeError, match=r"2 series of pictures, '1/#', '2/#'"):
        read_frames(two)
    rgb = pack(tmp_path / "rgb.zip", {f"{kind}/{k}.png": shade(9 * k) for kind in ("rgb", "flow") for k in range(3)})
    assert probe_video(rgb).num_frames == 3
    one = put(tmp_path / "one", {name: shade(k) for k, name in enumerate(("a.png", "b.png", "c.jpg"))})
    assert probe_video(one).num_frames == 3


def test_a_picture_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    for data in (postscript, shade(1, "GIF"), shade(1, "BMP"), shade(1, "PPM")):
        for video in doors(tmp_path, {"0.png": data}):
            with pytest.raises(VideoDecodeError, match=r"0\.png: no JPEG or PNG picture\."):
                read_frames(video)
    assert probe_video(put(tmp_path / "other", {"0.png": shade(1, "JPEG")})).num_frames == 1


def test_large_pictures_are_refused_by_their_size(tmp_path, monkeypatch):
    header = shade(0)[:16] + (50_000).to_bytes(4, "big") * 2 + shade(0)[24:]
    crc = zlib.crc32(header[12:29]).to_bytes(4, "big")
    for video in doors(tmp_path, {"0.png": header[:29] + crc + header[33:]}):  # PIL has a limit of its own
        with pytest.raises(VideoDecodeError, match=r"0\.png"):
            read_frames(video)
    monkeypatch.setattr(LIMITS, "pixels", 700)
    for video in doors(tmp_path, {"0.png": shade(0)}):
        with pytest.raises(VideoDecodeError, match=r"0\.png: it has 768 pixels or more, and 700 .*LIMITS\.pixels"):
            read_frames(video)
    monkeypatch.setattr(LIMITS, "pixels", 768)
    assert read_frames(str(tmp_path / "clip")).shape == (8, 3, 24, 32)


def test_what_unpacks_to_too_much_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(LIMITS, "unpacked_bytes", 5_000)
    members = {"a/0.png": shade(0) + bytes(10_000), "b.mp4": bytes(10_000)}
    path = pack(tmp_path / "all.zip", members)
    own = pack(tmp_path / "own.zip", {"0.png": members["a/0.png"]})
    for video in (f"{path}#/a", f"{path}#/b.mp4", own):
        with pytest.raises(VideoDecodeError, match=r"unpacked bytes or more, and 5,000 are the limit"):
            read_frames(video)
    data = path.read_bytes()
    assert data.count((10_000).to_bytes(4, "little")) == 2  # the size of b.mp4, before it and in the directory
    path.write_bytes(data.replace((10_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(VideoDecodeError, match=r"wrong checksum"):
        read_frames(f"{path}#/b.mp4")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_of_every_method(tmp_path, method):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    path = pack(tmp_path / "clip.zip", {f"a/{k}.png": file.getvalue() for k in range(3)}, method)
    whole, in_folder = path.read_bytes(), method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    for video in (path, f"{path}#/a") if in_folder else (path,):
        for at in range(40, 400, 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
            with pytest.raises(VideoDecodeError, match=r"clip\.zip"):
                read_frames(video)


def test_a_file_that_is_there_is_that_file(tmp_path):
    """Whatever name a stranger gave it."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for k in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 80 * k, np.uint8), "rgb24")))
        container.mux(stream.encode())
    expected = read_frames(tmp_path / "a.mp4")
    pack(tmp_path / "a.zip", {"b.mp4": b"no video"})
    for name in ("a.zip#b.mp4", "a.arrow#0"):
        shutil.copy(tmp_path / "a.mp4", tmp_path / name)
        assert read_frames(tmp_path / name).equal(expected)


def write_shard(folder: Path, frames: list[bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"path": "a.mp4", "frames": [{"bytes": data, "path": None} for data in frames]}
    batch = pa.RecordBatch.from_pylist([record])
    with pa.OSFile(str(folder / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    return folder / "x.arrow"


def test_frame_caches_are_those_of_a_prepared_folder_and_sound(tmp_path):
    frames = [shade(20 * k, "PPM") for k in range(4)]
    loose = write_shard(tmp_path / "loose", frames)
    with pytest.raises(VideoDecodeError, match="not in the shards of a prepared folder"):
        read_frames(f"{loose}#0")
    path = write_shard(tmp_path / "prepared" / "shards", frames)
    (tmp_path / "prepared" / "settings.json").write_text("{}")
    assert read_frames_at(f"{path}#0", [3, 1])[:, 0, 0, 0].tolist() == [60, 20]

    data, offsets = path.read_bytes(), np.cumsum([0, *map(len, frames)]).astype("<i4").tobytes()
    assert data.count(offsets) == 1
    for number, place in enumerate((4, 8, 16)):  # numbers that point beyond the bytes would end the process
        damaged = path.with_name(f"{number}.arrow")
        at = data.index(offsets) + place
        damaged.write_bytes(data[:at] + (2**30).to_bytes(4, "little") + data[at + 4 :])
        with pytest.raises(VideoDecodeError, match=r"not a cached clip .*prepare_data\.py again"):
            read_frames(f"{damaged}#0")
