"""Frames read by packets against decoding everything, on real files whose pictures tell their number."""

import io
import multiprocessing
import pickle
import re
import struct
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image, ImageOps

from dmgal_hf.inference.streaming import decode_in_order
from dmgal_hf.model import video_files, video_packets
from dmgal_hf.model.reading_limits import LIMITS
from dmgal_hf.model.video_decoding import VideoDecodeError, probe_video, read_frames, read_frames_at, segment_indices

FRAMES, SIZE = 30, (64, 96)
VOP = b"\x00\x00\x01\xb6"
NOT_CODED_VOP = VOP + b"\x50\x4f"  # P, time 0 of 25 (five bits), vop_coded = 0, stuffing


def picture(number, size=SIZE):
    """The bits of `number` as eight bars above a texture that moves."""
    height, width = size
    image = np.full((height, width, 3), 30, np.uint8)
    for bit in range(8):
        image[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 220 if number >> bit & 1 else 30
    y, x = np.mgrid[: height - height // 2, :width]
    image[height // 2 :] = np.stack([x * 3 + number * 7, y * 5 + number * 3, x + y + number * 11], -1) % 256
    return image


def number_in(image):
    height, width = image.shape[:2]
    bars = [image[height // 8 : 3 * height // 8, (2 * bit + 1) * width // 16].mean() for bit in range(8)]
    return sum(1 << bit for bit, bar in enumerate(bars) if bar > 125)


def encode(stream, images, stamps=None):
    for k, image in enumerate(images):
        frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[-1] == 4 else "rgb24")
        frame.pts, frame.time_base = k if stamps is None else stamps[k], Fraction(1, 25)
        yield from stream.encode(frame)
    yield from stream.encode()


def write(
    path,
    codec="libx264",
    images=None,
    size=SIZE,
    pix_fmt="yuv420p",
    stamps=None,
    options=None,
    muxing=None,
    title=None,
    **context,
):
    images = [picture(k, size) for k in range(FRAMES)] if images is None else images
    with av.open(str(path), "w", options=muxing or {}) as container:
        if title is not None:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for packet in encode(stream, images, stamps):
            container.mux(packet)
    return path


def write_packets(path, codec, chunks, keys, size=SIZE, extradata=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.extradata = extradata
        for k, chunk in enumerate(chunks):
            packet = av.Packet(chunk)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), k in keys
            packet.pts = packet.dts = k
            container.mux(packet)
    return path


def mpeg4_pictures(b_frames):
    """Bare MPEG-4 part 2 pictures in decoding order; each key picture carries its headers."""
    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.height, encoder.width, encoder.pix_fmt = *SIZE, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    encoder.gop_size, encoder.max_b_frames, encoder.bit_rate = 12, b_frames, 800_000
    return [bytes(packet) for packet in encode(encoder, [picture(k) for k in range(FRAMES)])]


def vop_type(chunk):
    return "IPBS"[chunk[chunk.index(VOP) + 4] >> 6]


def write_packed(path, b_frames):
    """As old Xvid did: a P-frame and its first B-frame share a chunk, and a placeholder follows the last B-frame."""
    chunks, group_open = [], False
    for coded in mpeg4_pictures(b_frames):
        if vop_type(coded) == "B" and not group_open:
            chunks[-1] += coded
            group_open = True
        else:
            if vop_type(coded) != "B" and group_open:
                chunks.append(NOT_CODED_VOP)
                group_open = False
            chunks.append(coded)
    chunks += [NOT_CODED_VOP] * group_open
    at = chunks[0].index(b"\x00\x00\x01\xb3")  # the note of the encoder goes before the first group of pictures
    chunks[0] = chunks[0][:at] + b"\x00\x00\x01\xb2DivX503b1393p" + chunks[0][at:]
    return write_packets(path, "mpeg4", chunks, {k for k, chunk in enumerate(chunks) if vop_type(chunk) == "I"})


def decode_all(path):
    """The slow plain way: every frame, converted one by one. (L, H, W, 3)"""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def as_images(clip):
    return clip.permute(0, 2, 3, 1).numpy()


def assert_reads_as(path, reference):
    """Each frame alone, eight segment centres, a drawn handful with repeats, all of them backwards, and the probe."""
    length = len(reference)
    generator = torch.Generator().manual_seed(0)
    choices = [[k] for k in range(length)]
    choices += [torch.randint(length, (5,), generator=generator).tolist() for _ in range(8)]
    choices += [list(range(length))[::-1]]
    for indices in choices:
        np.testing.assert_array_equal(as_images(read_frames_at(path, indices)), reference[indices], str(indices))
    np.testing.assert_array_equal(as_images(read_frames(path)), reference[segment_indices(length, 8)])
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width) == reference.shape[:3]


def x264(parameters):
    return {"options": {"x264-params": parameters}}


def x265(parameters):
    return {"codec": "libx265", "options": {"x265-params": f"log-level=none:{parameters}"}}


STREAMS = {
    "h264.mp4": {"gop_size": 10},
    "h264_long_group.mp4": {"gop_size": 250},
    "h264_open_groups.mp4": x264("open-gop=1:keyint=10:min-keyint=10:scenecut=0:bframes=3:b-adapt=0"),
    "h264_intra_refresh.mp4": x264("intra-refresh=1:keyint=10:bframes=0"),
    "h264_interlaced.mp4": x264("interlaced=1:keyint=10"),
    "h264_10_bit.mp4": {"pix_fmt": "yuv420p10le", "gop_size": 10},
    "h264_fragmented.mp4": {"gop_size": 10, "muxing": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_b_frames.avi": {"gop_size": 10},
    "h264_b_frames.mkv": {"gop_size": 10},
    "h264.ts": {"gop_size": 10},
    "h264.flv": {"gop_size": 10},
    "hevc_open_groups.mp4": x265("keyint=10:min-keyint=10:open-gop=1:bframes=3"),
    "hevc_10_bit.mkv": {**x265("keyint=10:min-keyint=10"), "pix_fmt": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9", "gop_size": 10, "options": {"lag-in-frames": "12", "cpu-used": "5"}},
    "vp9_odd_size.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuv444p", "size": (63, 95), "options": {"cpu-used": "5"}},
    "vp8.webm": {"codec": "libvpx", "gop_size": 20, "options": {"auto-alt-ref": "1", "lag-in-frames": "12"}},
    "av1.webm": {"codec": "libsvtav1", "gop_size": 10, "options": {"preset": "12"}},
    "mpeg4.avi": {"codec": "mpeg4", "gop_size": 10},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "gop_size": 10, "max_b_frames": 2},
    "mpeg4_b_frames.mp4": {"codec": "mpeg4", "gop_size": 10, "max_b_frames": 2},
    "mpeg2.mpg": {"codec": "mpeg2video", "gop_size": 10, "max_b_frames": 2},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "wmv2.wmv": {"codec": "wmv2"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "ffv1_gray.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "apng.apng": {"codec": "apng", "pix_fmt": "rgb24"},
    "palette.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "odd_size.mp4": {"pix_fmt": "yuv444p", "size": (63, 95), "gop_size": 10},
    "late_start.mp4": {"gop_size": 10, "stamps": range(50, 50 + FRAMES)},
    "variable_rate.mp4": {"gop_size": 10, "stamps": np.cumsum([1 + k % 5 * 3 for k in range(FRAMES)]).tolist()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_frames_are_those_of_decoding_everything(tmp_path, name):
    path = write(tmp_path / name, **STREAMS[name])
    reference = decode_all(path)
    assert [number_in(image) for image in reference] == list(range(FRAMES))
    assert_reads_as(path, reference)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_edit_list_cuts_the_start(tmp_path, codec):
    path = write(tmp_path / "cut.mp4", codec, gop_size=10, stamps=range(-7, FRAMES - 7))
    reference = decode_all(path)
    assert [number_in(image) for image in reference] == list(range(7, FRAMES))
    assert_reads_as(path, reference)


@pytest.mark.slow
@pytest.mark.parametrize("b_frames", [1, 2])
def test_packed_b_frames(tmp_path, b_frames):
    path = write_packed(tmp_path / "xvid.avi", b_frames)
    with av.open(str(path)) as container:
        assert any(bytes(packet).count(VOP) == 2 for packet in container.demux())
    reference = decode_all(path)
    assert [number_in(image) for image in reference] == list(range(FRAMES))
    assert_reads_as(path, reference)


def test_packets_without_a_picture_are_not_counted(tmp_path):
    chunks = mpeg4_pictures(0)
    chunks[5:5] = [NOT_CODED_VOP, NOT_CODED_VOP]
    path = write_packets(
        tmp_path / "dropped.avi", "mpeg4", chunks, {k for k, c in enumerate(chunks) if vop_type(c) == "I"}
    )
    reference = decode_all(path)
    assert len(reference) == FRAMES == len(chunks) - 2
    assert_reads_as(path, reference)


def test_picture_that_ends_in_half_a_header(tmp_path):
    chunks = mpeg4_pictures(2)
    chunks[7] += VOP  # what type of picture begins here is not told
    keys = {k for k, chunk in enumerate(chunks) if vop_type(chunk) == "I"}
    path = write_packets(tmp_path / "cut.avi", "mpeg4", chunks, keys)
    assert_reads_as(path, decode_all(path))


def test_header_that_promises_more_frames(tmp_path):
    path = write(tmp_path / "lies.avi", "mpeg4", max_b_frames=2)
    data = bytearray(path.read_bytes())
    for at in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        assert int.from_bytes(data[at : at + 4], "little") == FRAMES
        data[at : at + 4] = (FRAMES + 2).to_bytes(4, "little")
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == FRAMES + 2
    assert_reads_as(path, decode_all(path))


def test_live_recording_without_lengths(tmp_path):
    """A Matroska stream that could not go back to write its length ends where the file ends."""
    whole = write(tmp_path / "whole.mkv", gop_size=10).read_bytes()
    at = whole.index(b"\x18\x53\x80\x67") + 4
    assert whole[at] == 1  # an eight byte length follows
    live = tmp_path / "live.mkv"
    live.write_bytes(whole[:at] + b"\x01" + b"\xff" * 7 + whole[at + 8 :])
    assert_reads_as(live, decode_all(live))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matrix", "shown"),  # a pixel stored at (x, y) is shown at (a x + c y, b x + d y)
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a phone held upright
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
    ],
)
def test_display_matrix(tmp_path, matrix, shown):
    path = write(tmp_path / "phone.mp4", images=[picture(k) for k in range(5)])
    a, b, c, d = (entry << 16 for entry in matrix)
    data = bytearray(path.read_bytes())
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert_reads_as(path, np.stack([shown(image) for image in decode_all(path)]))


def test_stored_pixels_are_kept(tmp_path):
    path = write(tmp_path / "anamorphic.mp4", sample_aspect_ratio=Fraction(4, 3))
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
    assert read_frames(path, 2).shape == (2, 3, *SIZE)


@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [("alpha.mov", "qtrle", "argb"), ("alpha.avi", "png", "rgba")])
def test_alpha_lies_over_black(tmp_path, name, codec, pix_fmt):
    images = [np.dstack([picture(k), np.full(SIZE, 255, np.uint8)]) for k in range(3)]
    for image in images:
        image[:20, :, 3], image[20:40, :, 3] = 0, 128
    path = write(tmp_path / name, codec, images, pix_fmt=pix_fmt)
    over_black = np.stack([np.rint(i[..., :3] * (i[..., 3:] / 255)) for i in images]).astype(np.uint8)
    assert not over_black[:, :20].any()
    assert_reads_as(path, over_black)


def test_stream_that_changes_size_is_scaled_to_its_first_frame(tmp_path):
    chunks = []
    for size in (SIZE, (32, 48)):
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *size, "yuvj420p", Fraction(1, 25)
        chunks += [bytes(packet) for packet in encode(encoder, [picture(k, size) for k in range(4)])]
    path = write_packets(tmp_path / "resized.avi", "mjpeg", chunks, range(8))
    clip = as_images(read_frames(path, 8))
    assert clip.shape == (8, *SIZE, 3)
    assert [number_in(image) for image in clip] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mp4", "libx264", "yuv420p"), ("a.webm", "libvpx", "yuv420p"), ("a.gif", "gif", "rgb8")],
)
def test_clips_shorter_than_asked_repeat_frames(tmp_path, name, codec, pix_fmt, length):
    path = write(tmp_path / name, codec, [picture(k) for k in range(length)], pix_fmt=pix_fmt)
    clip = as_images(read_frames(path, 8))
    assert [number_in(image) for image in clip] == {1: [0] * 8, 3: [0, 0, 0, 1, 1, 2, 2, 2]}[length]
    assert_reads_as(path, decode_all(path))


def rewrite(path, change):
    """The same stream with `change(packets)` in place of its packets."""
    changed = path.with_stem(path.stem + "_changed")
    with av.open(str(path)) as source, av.open(str(changed), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in change([packet for packet in source.demux(video=0) if packet.size]):
            packet.stream = stream
            container.mux(packet)
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hevc_open_groups.mp4", "h264_open_groups.mp4", "mpeg4_b_frames.mp4"])
def test_clip_cut_before_an_open_group(tmp_path, name):
    """The first pictures shown refer to a group that is gone: the decoder leaves them out."""
    path = write(tmp_path / name.replace("mp4", "mkv"), **STREAMS[name])
    cut = rewrite(path, lambda packets: packets[[k for k, p in enumerate(packets) if p.is_keyframe][1] :])
    with av.open(str(cut)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert min(stamps) < stamps[0]
    reference = decode_all(cut)
    assert_reads_as(cut, reference)


def test_pictures_that_are_only_referred_to_are_not_counted(tmp_path):
    def hide_two(packets):
        for k in (7, 20):
            data = bytearray(bytes(packets[k]))
            data[0] &= ~0x10  # VP8: show_frame
            hidden = av.Packet(bytes(data))
            hidden.pts, hidden.dts, hidden.time_base = packets[k].pts, packets[k].dts, packets[k].time_base
            packets[k] = hidden
        return packets

    path = rewrite(write(tmp_path / "a.webm", "libvpx"), hide_two)
    reference = decode_all(path)
    assert [number_in(image) for image in reference] == [k for k in range(FRAMES) if k not in (7, 20)]
    assert_reads_as(path, reference)


def damage_last_group(path, part):
    """Overwrite the last `part` of the last key packet."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.is_keyframe][-1]
        size = int(packet.size * part)
        start = packet.pos + packet.size - size
    data = bytearray(path.read_bytes())
    data[start : start + size] = np.random.default_rng(0).bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_only_the_wanted_group_is_decoded(tmp_path, part):
    """Damage in the last group of pictures is met by who reads there, and by nobody else."""
    path = write(tmp_path / "damaged.mp4", gop_size=10)
    reference = decode_all(path)
    damage_last_group(path, part)
    np.testing.assert_array_equal(as_images(read_frames_at(path, [12, 3])), reference[[12, 3]])
    with pytest.raises(VideoDecodeError, match=r"damaged\.mp4"):
        read_frames_at(path, [25])


def test_damage_is_met_where_everything_is_decoded(tmp_path):
    path = write(tmp_path / "damaged.ts", "mpeg2video", gop_size=10)
    data = bytearray(path.read_bytes())
    for packet in range(len(data) // 376 * 188, len(data), 188):
        data[packet + 60 : packet + 90] = b"\x55" * 30
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError, match=r"damaged\.ts: .*damaged"):
        read_frames(path)


def test_metadata_in_another_encoding(tmp_path):
    path = write(tmp_path / "a.mkv", title="Caf_ noir")
    path.write_bytes(path.read_bytes().replace(b"Caf_ noir", b"Caf\xe9 noir"))
    with pytest.raises(UnicodeDecodeError):
        av.open(str(path))
    assert [number_in(image) for image in as_images(read_frames(path, FRAMES))] == list(range(FRAMES))


def test_memory_is_channels_last(tmp_path):
    clip = read_frames(write(tmp_path / "a.mp4"), 4)
    assert clip.dtype == torch.uint8
    assert clip.shape == (4, 3, *SIZE)
    assert clip.permute(0, 2, 3, 1).is_contiguous()


def test_ways_to_name_a_video(tmp_path):
    path = write(tmp_path / "a b%d:c.mp4", gop_size=10)
    data, expected = path.read_bytes(), read_frames(path)
    with open(path, "rb") as file:
        file.seek(100)
        ways = [str(path), data, memoryview(data), io.BytesIO(data), file, {"path": str(path), "bytes": None}]
        ways += [{"path": "gone.mp4", "bytes": data}, {"path": None, "bytes": data}]
        for video in ways:
            assert torch.equal(read_frames(video), expected)
            assert probe_video(video) == probe_video(path)  # a file object is read from its start again


@pytest.mark.slow
def test_url(tmp_path):
    data = write(tmp_path / "a.mp4").read_bytes()

    class Serve(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.mp4" else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert torch.equal(read_frames(f"{url}/a.mp4"), read_frames(data))
        with pytest.raises(VideoDecodeError, match=r"gone\.mp4: download failed.*404") as caught:
            read_frames(f"{url}/gone.mp4")
        assert caught.value.source == f"{url}/gone.mp4"
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(VideoDecodeError, match="download failed"):
        read_frames(f"{url}/a.mp4")


def test_extracted_frames_in_a_folder_or_a_zip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(12):  # no leading zeros: frame 10 comes after frame 9
        Image.fromarray(picture(number)).save(folder / f"img_{number}.{'png' if number % 2 else 'jpg'}", quality=95)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._img_0.jpg").write_bytes(b"not a frame either")
    with zipfile.ZipFile(tmp_path / "clip.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"clip/{file.name}")
    clip = as_images(read_frames(folder, 12))
    assert [number_in(image) for image in clip] == list(range(12))
    np.testing.assert_array_equal(clip[3], picture(3))
    for video in (folder, tmp_path / "clip.zip", (tmp_path / "clip.zip").read_bytes()):
        np.testing.assert_array_equal(as_images(read_frames_at(video, [11, 0, 5, 5])), clip[[11, 0, 5, 5]])
        info = probe_video(video)
        assert (info.num_frames, info.height, info.width, info.fps, info.duration) == (12, *SIZE, None, None)

    (folder / "img_4.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(VideoDecodeError, match=r"img_4\.jpg"):
        read_frames(folder, 12)
    Image.fromarray(picture(4, (32, 48))).save(folder / "img_4.jpg")
    with pytest.raises(VideoDecodeError, match=r"img_4\.jpg.*\(32, 48\)"):
        read_frames(folder, 12)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """One zip of a whole data set: extracted frames, packed both ways, and a video file; the numbers count down in
    the file, and only their natural order is that of the clip."""
    root = tmp_path_factory.mktemp("archive")
    video = write(root / "a.mp4", gop_size=10)
    with zipfile.ZipFile(root / "all.zip", "w") as packed:
        packed.mkdir("frames/run")
        for clip, method in (("b c", zipfile.ZIP_STORED), ("d,e#1", zipfile.ZIP_DEFLATED)):
            for number in reversed(range(12)):
                file = io.BytesIO()
                Image.fromarray(picture(number)).save(file, "PNG")
                packed.writestr(f"frames/run/{clip}/img_{number}.png", file.getvalue(), method)
            packed.writestr(f"__MACOSX/frames/run/{clip}/._img_0.png", b"no picture")
        packed.writestr("frames/run/b c/.hidden.png", b"no picture")
        packed.write(video, "frames/run/f.mp4")
    return root / "all.zip"


@pytest.mark.parametrize("clip", ["b c", "d,e#1"])
def test_frames_in_one_archive_of_many_clips(archive, clip):
    path = f"{archive}#/frames/run/{clip}"
    assert_reads_as(path, np.stack([picture(k) for k in range(12)]))
    assert probe_video(path).fps is None


def test_video_file_in_an_archive(archive):
    path, video = f"{archive}#/frames/run/f.mp4", archive.with_name("a.mp4")
    assert torch.equal(read_frames({"path": path, "bytes": None}, 5), read_frames(video, 5))
    assert probe_video(path) == probe_video(video)


def test_forked_processes_and_threads_share_an_archive(archive):
    paths = [f"{archive}#/frames/run/{clip}" for clip in ("b c", "d,e#1", "f.mp4")] * 6
    expected = [read_bytes(path) for path in paths]  # here, first: what is forked inherits the open state
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_bytes, paths) == expected
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_bytes, paths)) == expected


def test_archive_that_is_replaced_is_read_anew(tmp_path):
    for number in (3, 5):
        file = io.BytesIO()
        Image.fromarray(picture(number)).save(file, "PNG")
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
            packed.writestr("a/1.png", file.getvalue())
            packed.writestr("padding", b" " * number)
        assert number_in(as_images(read_frames(f"{tmp_path}/all.zip#/a", 1))[0]) == number


def test_what_cannot_be_read_from_an_archive(archive, tmp_path):
    path = f"{archive}#/frames/run"
    with pytest.raises(
        VideoDecodeError, match=r"run/g: cannot be opened \(the archive .*all\.zip holds no 'frames/run/g'"
    ):
        read_frames(f"{path}/g")
    with pytest.raises(VideoDecodeError, match=r"frames/run: holds no \.jpg"):
        read_frames(path)
    with pytest.raises(VideoDecodeError, match=r"gone\.zip#/a: cannot be opened"):
        read_frames(tmp_path / "gone.zip#/a")
    with pytest.raises(IndexError, match=r"b c: frame 12 asked for"):
        read_frames_at(f"{path}/b c", [12])

    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as packed:
        places = {
            name: packed.getinfo(f"frames/run/{name}").header_offset for name in ("b c/img_3.png", "d,e#1/img_0.png")
        }
    data[places["b c/img_3.png"] + 200] ^= 1
    data[places["d,e#1/img_0.png"] + 6] |= 1  # the flag of encryption
    (tmp_path / "bad.zip").write_bytes(data)
    bad = f"{tmp_path}/bad.zip#/frames/run"
    assert number_in(as_images(read_frames_at(f"{bad}/b c", [4]))[0]) == 4
    for clip, problem in (("b c", "wrong checksum"), ("d,e#1", "encrypted")):
        with pytest.raises(VideoDecodeError, match=rf"{clip}: cannot be unpacked \({problem}"):
            read_frames(f"{bad}/{clip}", 12)
    (tmp_path / "bad.zip").write_bytes(data[:-100])
    with pytest.raises(VideoDecodeError, match=r"cannot be opened .*not a zip file"):
        read_frames(f"{bad}/b c")


def test_probe(tmp_path):
    info = probe_video(write(tmp_path / "a.mp4"))
    assert (info.num_frames, info.fps, info.height, info.width) == (FRAMES, 25.0, *SIZE)
    assert info.duration == pytest.approx(FRAMES / 25)


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        ("front.mp4", {"muxing": {"movflags": "faststart"}}),
        ("back.mp4", {}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.avi", {"codec": "mpeg4", "max_b_frames": 2}),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
)
def test_truncated_files_are_refused(tmp_path, name, stream):
    path = write(tmp_path / name, **stream)
    whole = path.read_bytes()
    with av.open(str(path)) as container:
        last = max(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    for kept in [2, 100, *(len(whole) * part // 100 for part in range(10, 100, 10)), last - 1]:
        path.write_bytes(whole[:kept])
        for read in (read_frames, probe_video):
            with pytest.raises(VideoDecodeError) as caught:
                read(path)
            assert caught.value.source == str(path)
            assert str(path) in str(caught.value)


def test_what_is_no_video_is_refused(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "notes.txt").write_text("a list of things\n" * 500)
    (tmp_path / "text.mp4").write_text("a list of things\n" * 500)
    (tmp_path / "noise.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "no_frames.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "no_frames.zip").read_bytes()[:20])
    expected = {
        "sound.mp4": "no video stream",
        "empty.mp4": "empty",
        "notes.txt": "no video stream",
        "text.mp4": "not a readable video",
        "noise.avi": "not a readable video",
        "folder": "no .jpg",
        "no_frames.zip": "no .jpg",
        "cut.zip": "cannot be opened",
        "gone.mp4": "cannot be opened",
    }
    for name, problem in expected.items():
        for read in (read_frames, probe_video):
            with pytest.raises(VideoDecodeError, match=problem) as caught:
                read(tmp_path / name)
            assert caught.value.source == str(tmp_path / name)
    for video, problem in ((b"", "empty"), ({"path": None, "bytes": None}, "None"), (3, "int"), (None, "NoneType")):
        with pytest.raises(VideoDecodeError, match=problem) as caught:
            read_frames(video)
        assert caught.value.source == "<bytes>"


def test_cover_picture_of_a_song_is_no_clip(tmp_path):
    cover = io.BytesIO()
    Image.fromarray(picture(1)).save(cover, "JPEG")
    size = len(cover.getvalue()) + 14
    sizes = bytes((size + 10) >> shift & 0x7F for shift in (21, 14, 7, 0))
    tag = b"ID3\x03\x00\x00" + sizes + b"APIC" + size.to_bytes(4, "big") + b"\x00\x00"
    tag += b"\x00image/jpeg\x00\x03\x00" + cover.getvalue()
    with av.open(str(tmp_path / "bare.mp3"), "w", format="mp3", options={"id3v2_version": "0"}) as container:
        stream = container.add_stream("mp3", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    path = tmp_path / "song.mp3"
    path.write_bytes(tag + (tmp_path / "bare.mp3").read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoDecodeError, match="no video stream"):
        read_frames(path)


def test_wrong_arguments(tmp_path):
    path, gif = write(tmp_path / "a.mp4"), write(tmp_path / "a.gif", "gif", pix_fmt="rgb8")
    for video in (path, gif):
        for index in (-1, FRAMES):
            with pytest.raises(IndexError, match=rf"frame {index} .* 0 to {FRAMES - 1}"):
                read_frames_at(video, [0, index])
    with pytest.raises(ValueError, match="indices is empty"):
        read_frames_at(path, [])
    with pytest.raises(ValueError, match="num_frames is 0"):
        read_frames(path, 0)
    with pytest.raises(ValueError, match="clip_length is 0"):
        segment_indices(0, 8)
    with pytest.raises(ValueError, match="num_frames is 0"):
        segment_indices(8, 0)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoDecodeError("a.mp4", "broken", "Mend it.")))
    assert (str(error), error.source) == ("a.mp4: broken. Mend it.", "a.mp4")


def test_segment_centres():
    for length in (1, 2, 5, 8, 48, 99, 300, 100_003):
        for count in (1, 3, 8, 16):
            expected = [int((Fraction(2 * i + 1, 2) * length) // count) for i in range(count)]
            assert segment_indices(length, count) == expected


def test_segment_draws():
    generator = torch.Generator().manual_seed(3)
    seen = [set() for _ in range(8)]
    for _ in range(400):
        drawn = segment_indices(20, 8, generator)
        assert drawn == sorted(drawn)
        for segment, index in zip(seen, drawn, strict=True):
            segment.add(index)
    # every frame that a segment [i * 20 / 8, (i + 1) * 20 / 8) touches, and no other
    assert seen == [{0, 1, 2}, {2, 3, 4}, {5, 6, 7}, {7, 8, 9}, {10, 11, 12}, {12, 13, 14}, {15, 16, 17}, {17, 18, 19}]
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    segment_indices(7, 8, first), segment_indices(1_000_000, 8, second)
    assert torch.equal(first.get_state(), second.get_state())  # what is drawn next does not depend on the clip


def test_drawn_frames_are_those_of_segment_indices(tmp_path):
    for path in (write(tmp_path / "a.mp4"), write(tmp_path / "a.gif", "gif", pix_fmt="rgb8")):
        indices = segment_indices(FRAMES, 8, torch.Generator().manual_seed(1))
        assert torch.equal(read_frames(path, 8, torch.Generator().manual_seed(1)), read_frames_at(path, indices))


def read_bytes(path):
    return read_frames(path).numpy().tobytes()


@pytest.mark.slow
def test_threads_and_forked_processes_read_alike(tmp_path):
    paths = [
        write(tmp_path / "a.mp4", gop_size=10),
        write(tmp_path / "b.webm", "libvpx", size=(48, 64)),
        write(tmp_path / "c.gif", "gif", pix_fmt="rgb8"),
    ] * 4
    expected = [read_bytes(path) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read_bytes, paths)) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_bytes, paths) == expected


def test_more_pixels_than_the_limit_are_refused_by_name_and_size(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setattr(LIMITS, "pixels", SIZE[0] * SIZE[1] - 1)
    for read in (read_frames, probe_video):
        with pytest.raises(VideoDecodeError, match=r"a\.mp4: it has 6,144 pixels .*6,143 are the limit"):
            read(path)
    monkeypatch.setattr(LIMITS, "pixels", SIZE[0] * SIZE[1])
    assert len(read_frames(path)) == 8


def test_whatever_a_reader_raises_becomes_one_error(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    for error in (
        MemoryError(),
        IndexError("list"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        EOFError("cut"),
    ):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(av, "open", fail)
        for read in (read_frames, probe_video, lambda video: read_frames_at(video, [0])):
            with pytest.raises(VideoDecodeError, match=rf"a\.mp4: .*{type(error).__name__}") as caught:
                read(path)
            assert caught.value.source == str(path)
            assert caught.value.__cause__ is error


def copies(path):
    """The same file by its path, its bytes and an open file."""
    yield path
    yield path.read_bytes()
    with open(path, "rb") as file:
        yield file


@pytest.mark.slow
def test_play_lists_are_refused_before_what_they_name_is_touched(tmp_path):
    asked = []

    class Note(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            return

    clip = write(tmp_path / "clip.ts")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/secret.ts"
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\n"
    lists = {
        "net.m3u8": f"{head}{url}\n#EXT-X-ENDLIST\n",
        "local.m3u8": f"{head}{clip.name}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile '{clip.name}'\n",
        "list.mpd": f'<?xml version="1.0"?>\n<MPD type="static"><BaseURL>{url}</BaseURL></MPD>',
        "session.sdp": "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        "m=video 50040 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n",
    }
    try:
        for name, text in lists.items():
            (tmp_path / name).write_text(text, newline="")
            for video in copies(tmp_path / name):
                for read in (read_frames, probe_video):
                    with pytest.raises(VideoDecodeError, match=r"a play list .* none of them was opened"):
                        read(video)
            with pytest.raises(VideoDecodeError):
                next(decode_in_order(tmp_path / name, None))
    finally:
        server.shutdown()
        server.server_close()
    assert not asked


@pytest.mark.parametrize("name", ["concat", "hls", "dash", "sdp"])
def test_ffmpeg_itself_is_kept_from_play_lists(tmp_path, name):
    """Also where the text does not begin as one: the demuxer is never let at a file."""
    assert name not in video_files._formats().split(",")
    (tmp_path / "a.ts").write_bytes(write(tmp_path / "b.ts").read_bytes())
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile a.ts\n")
    for media in (str(tmp_path / "list.txt"), b"ffconcat version 1.0\nfile a.ts\n"):
        with pytest.raises(VideoDecodeError, match="not a readable video"), video_files.open_video("list", media):
            pass


def test_a_name_that_is_a_pattern_stands_for_its_own_file(tmp_path):
    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"s{number}.ppm")
    for video in (tmp_path / "s%d.ppm", tmp_path / "s*.ppm"):
        with pytest.raises(VideoDecodeError, match="cannot be opened"):
            read_frames(video)
        with pytest.raises(VideoDecodeError):
            next(decode_in_order(video, None))


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize("by", ["disposition", "length"])
def test_the_track_that_a_player_shows_is_read(tmp_path, suffix, by):
    """Beside it a preview of another size, which comes first in the file."""
    path = tmp_path / f"two.{suffix}"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((48, 64), SIZE):
            stream = container.add_stream("libx264", rate=25, options={"g": "10"})
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            streams.append(stream)
        streams[0].disposition = 0 if by == "disposition" else Disposition.default
        streams[1].disposition = Disposition.default
        lengths = (FRAMES, FRAMES) if by == "disposition" else (3, FRAMES)
        for stream, length in zip(streams, lengths, strict=True):
            for packet in encode(stream, [picture(k, (stream.height, stream.width)) for k in range(length)]):
                container.mux(packet)
    clip = as_images(read_frames_at(path, list(range(FRAMES))))
    assert clip.shape == (FRAMES, *SIZE, 3)
    assert [number_in(image) for image in clip] == list(range(FRAMES))
    assert probe_video(path).num_frames == FRAMES
    assert next(decode_in_order(path, None))[1].clip().shape == (1, 3, *SIZE)


FILLER = b"\x0c" + b"\xff" * 20 + b"\x80"  # type 12
DELIMITER = b"\x09\xf0"


@pytest.mark.slow
@pytest.mark.parametrize("units", [[FILLER], [DELIMITER], [DELIMITER, FILLER]])
def test_h264_packets_without_a_picture_are_not_counted(tmp_path, units):
    path = write(tmp_path / "plain.mkv", **x264("keyint=10:bframes=0"))
    reference = decode_all(path)
    data = b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)

    def with_others(packets):
        for packet in packets:
            between = av.Packet(data)
            between.pts = between.dts = 2 * packet.pts
            between.time_base = packet.time_base
            packet.pts = packet.dts = 2 * packet.pts + packet.duration
            yield between
            yield packet

    path = rewrite(path, lambda packets: list(with_others(packets)))
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 2 * FRAMES
    assert_reads_as(path, reference)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_of_motion_jpeg_is_followed(tmp_path, orientation):
    """PyAV does not know the type of side data that FFmpeg makes of it."""
    chunks = []
    for number in range(3):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x112] = orientation
        Image.fromarray(picture(number)).save(file, "JPEG", quality=95, exif=exif, subsampling=0)
        chunks.append(file.getvalue())
    clip = as_images(read_frames(write_packets(tmp_path / "exif.mkv", "mjpeg", chunks, range(3)), 3))
    shown = [np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(chunk))).convert("RGB")) for chunk in chunks]
    assert clip.shape == np.stack(shown).shape
    assert np.abs(clip.astype(int) - np.stack(shown)).mean() < 3


LONG = ["h264.mp4", "h264_b_frames.avi", "h264.ts", "vp9.webm", "mpeg4_b_frames.avi", "mjpeg.avi", "wmv2.wmv"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_packets_of_a_long_clip_are_read_again(tmp_path, name, monkeypatch):
    path = write(tmp_path / name, **STREAMS[name])
    monkeypatch.setattr(video_packets, "_KEPT_BYTES", 2000)
    assert_reads_as(path, decode_all(path))


def test_packed_b_frames_of_a_long_clip(tmp_path, monkeypatch):
    path = write_packed(tmp_path / "xvid.avi", 2)
    monkeypatch.setattr(video_packets, "_KEPT_BYTES", 2000)
    assert_reads_as(path, decode_all(path))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Half a GB of raw video, read in a process of its own."""
    images = [np.full((960, 1280, 3), number, np.uint8) for number in range(2)]
    path = write(tmp_path / "raw.avi", "rawvideo", images * 80, pix_fmt="bgr24")
    assert path.stat().st_size > 500_000_000
    code = (
        "import resource, sys, torch\n"
        "from dmgal_hf.model.video_decoding import probe_video, read_frames\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert probe_video(sys.argv[1]).num_frames == 160\n"
        "read_frames(sys.argv[1], 2)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    path.unlink()
    assert int(done.stdout) < 100


def test_downloads_end_at_their_limit(tmp_path, monkeypatch):
    data = write(tmp_path / "a.mp4").read_bytes()
    unseekable = SimpleNamespace(read=io.BytesIO(data).read, seekable=lambda: False)
    assert torch.equal(read_frames(unseekable), read_frames(data))
    monkeypatch.setattr(LIMITS, "downloaded_bytes", len(data) - 1)
    unseekable = SimpleNamespace(read=io.BytesIO(data).read, seekable=lambda: False)
    with pytest.raises(VideoDecodeError, match=rf"{len(data):,} downloaded bytes"):
        read_frames(unseekable)


@pytest.mark.parametrize(("name", "options"), [("whole.mp4", {}), ("parts.mp4", {"movflags": "frag_keyframe"})])
def test_tables_that_claim_too_much_are_refused(tmp_path, name, options):
    path = write(tmp_path / name, gop_size=10, muxing=options)
    data = bytearray(path.read_bytes())
    at = data.index(b"trun") + 8 if options else data.index(b"stsz") + 12
    data[at : at + 4] = (30_000_000).to_bytes(4, "big")
    if not options:
        data[at - 4 : at] = (1).to_bytes(4, "big")  # all of one size: no table is needed
    path.write_bytes(data)
    for read in (read_frames, probe_video):
        with pytest.raises(VideoDecodeError, match=r"it has 30,000,0.* packets or more, and 4,000,000 are the limit"):
            read(path)


def test_a_checksum_that_differs_is_met_by_who_reads_there(tmp_path):
    path = write(tmp_path / "a.mkv", "ffv1", options={"level": "3", "slicecrc": "1"}, gop_size=1)
    reference = decode_all(path)
    with av.open(str(path)) as container:
        packet = next(p for p in container.demux(video=0) if p.pts == 400)  # frame 10
        at = packet.pos + packet.size // 2
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(VideoDecodeError, match=r"a\.mkv: damaged near 0\.40 s: .*CRC mismatch"):
            read_frames_at(path, [3, 10])
        with pytest.raises(VideoDecodeError, match="CRC mismatch"):
            probe_video(path)
    np.testing.assert_array_equal(as_images(read_frames_at(path, [3, 20])), reference[[3, 20]])
    with ThreadPoolExecutor(4) as pool:
        tried = [pool.submit(read_frames_at, path, [10]) for _ in range(8)]
        assert all(isinstance(one.exception(), VideoDecodeError) for one in tried)
    assert av.logging.get_level() is None


def test_most_of_a_clip_is_gone(tmp_path):
    path = write(tmp_path / "a.mkv", "libx264", gop_size=5, muxing={"cluster_time_limit": "200"})
    data = path.read_bytes()
    clusters = [match.start() for match in re.finditer(b"\x1f\x43\xb6\x75", data)]
    assert len(clusters) > 4
    path.write_bytes(data[: clusters[1]] + bytes(len(data) - clusters[1]))
    with pytest.raises(VideoDecodeError, match=r"a\.mkv: damaged"):
        read_frames(path)


@pytest.mark.parametrize("name", ["vp9.webm", "h264_b_frames.mkv", "palette.gif", "wmv2.wmv", "apng.apng"])
def test_bytes_behind_the_end_are_no_truncation(tmp_path, name):
    path = write(tmp_path / name, **STREAMS[name])
    reference = decode_all(path)
    path.write_bytes(path.read_bytes() + b"\x01 and what a program left behind" * 20)
    np.testing.assert_array_equal(as_images(read_frames(path, FRAMES)), reference)


@pytest.mark.parametrize("name", ["wmv2.wmv", "apng.apng"])
def test_truncated_where_lengths_are_declared(tmp_path, name):
    path = write(tmp_path / name, **STREAMS[name])
    whole = path.read_bytes()
    for part in (40, 70, 95):
        path.write_bytes(whole[: len(whole) * part // 100])
        with pytest.raises(VideoDecodeError, match="truncated"):
            read_frames(path)
