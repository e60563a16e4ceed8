"""A single picture is no video by whichever door it comes; videos that lie elsewhere are fetched."""

import io
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dmgal_hf import DmgalVideoProcessor
from dmgal_hf.inference.streaming import decode_in_order
from dmgal_hf.model.reading_limits import VideoDecodeError
from dmgal_hf.model.video_decoding import probe_video, read_frames


def video_bytes(format, codec, pix_fmt="yuv420p", length=3):
    file = io.BytesIO()
    with av.open(file, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, pix_fmt
        for k in range(length):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 70 * k, np.uint8), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def encoded(kind, **options):
    if kind == "HEIF":  # no encoder is there: how the pictures of phones begin
        return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    file = io.BytesIO()
    Image.new("RGB", (48, 40), (200, 10, 10)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "BMP", "TIFF", "AVIF", "HEIF"])
def test_single_pictures_are_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(encoded(kind))
    disguised = tmp_path / "a.mp4"
    disguised.write_bytes(encoded(kind))
    for video in (path, disguised, path.read_bytes(), {"path": str(path), "bytes": None}):
        for read in (read_frames, probe_video, DmgalVideoProcessor(), lambda v: list(decode_in_order(v, None))):
            with pytest.raises(VideoDecodeError, match=rf"a single picture \({kind}\), no video.*\[picture\]"):
                read(video)


def test_video_of_a_motion_photo(tmp_path):
    clip = video_bytes("mp4", "libx264")
    previews = encoded("JPEG", progressive=True)
    several = io.BytesIO()
    first, second = (Image.new("RGB", (48, 40), shade) for shade in ("red", "blue"))
    first.save(several, "MPO", save_all=True, append_images=[second])
    for still in (encoded("JPEG"), previews, several.getvalue(), encoded("HEIF")):
        path = tmp_path / "photo.jpg"
        path.write_bytes(still + b"MotionPhoto_Data" + clip)
        assert read_frames(path).equal(read_frames(clip)) and probe_video(path) == probe_video(clip)
        streamed = [picture.clip()[0] for _, picture in decode_in_order(path, None)]
        assert torch.stack(streamed).equal(read_frames(clip, 3))
    path.write_bytes(several.getvalue())
    with pytest.raises(VideoDecodeError, match="a single picture"):
        read_frames(path)


def test_moving_pictures_stay_videos():
    assert probe_video(video_bytes("mjpeg", "mjpeg", "yuvj420p")).num_frames == 3
    assert probe_video(video_bytes("apng", "apng", "rgb24")).num_frames == 3
    assert probe_video(video_bytes("gif", "gif", "rgb8", length=1)).num_frames == 1
    more = [Image.new("RGB", (48, 40), shade) for shade in ("green", "blue")]
    assert probe_video(encoded("AVIF", save_all=True, append_images=more)).num_frames == 3


def test_videos_of_other_file_systems(tmp_path):
    import fsspec

    clip = video_bytes("mp4", "libx264")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("run/a.mp4", clip)
    fsspec.filesystem("memory").pipe("/doors/a.mp4", clip)
    for path in (f"zip://run/a.mp4::{tmp_path}/all.zip", "memory://doors/a.mp4"):
        for video in (path, {"path": path, "bytes": None}):
            assert read_frames(video).equal(read_frames(clip))
    for path in (f"zip://run/b.mp4::{tmp_path}/all.zip", "memory://doors/b.mp4", "nosuch://a/b.mp4"):
        with pytest.raises(VideoDecodeError, match=rf"{path}: cannot be fetched") as caught:
            read_frames(path)
        assert caught.value.source == path
    named = tmp_path / "a::b.mp4"
    named.write_bytes(clip)
    assert read_frames(named).equal(read_frames(clip))


def test_rows_that_are_decoded_already_name_the_remedy():
    class VideoDecoder:  # as torchcodec's is called
        pass

    with pytest.raises(ValueError, match=r"videos is a VideoDecoder, .*Video\(decode=False\)"):
        DmgalVideoProcessor()(VideoDecoder())
