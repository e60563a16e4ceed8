import copy
import io
import json
import pickle
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from dmgal_hf.model.configuration_dmgal import DmgalConfig
from dmgal_hf.model.modeling_dmgal import DmgalModel
from dmgal_hf.model.video_decoding import VideoDecodeError, segment_indices
from dmgal_hf.model.video_processing_dmgal import DmgalVideoProcessor, center_crop, resize, resize_short_side

HEIGHT, WIDTH, LENGTH = 48, 64, 20


def picture(height, width, seed=0):
    """Smooth colours with some detail, (height, width, 3) uint8."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(2 * np.pi * (a * rows + b * columns + c)) for a, b, c in generator.uniform(-3, 3, (3, 3))]
    return np.clip(127 + 100 * np.stack(waves, -1) + generator.normal(0, 8, (height, width, 3)), 0, 255).astype(
        "uint8"
    )


def write_video(path, level=0):
    """LENGTH flat grey frames, 10 grey levels apart from one to the next."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(LENGTH):
            frame = np.full((HEIGHT, WIDTH, 3), level + 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{level}.mp4", level) for level in (0, 20, 50)]


@pytest.fixture(scope="module")
def frames(videos):
    """All frames of the first video, decoded plainly: (LENGTH, H, W, 3) uint8."""
    with av.open(str(videos[0])) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def processor():
    return DmgalVideoProcessor(num_frames=4, size=32, crop_size=24)


def plain_pixel_values(frames, num_frames, size, crop, mean, std, resample=Image.BILINEAR):
    """One frame after the other with PIL and numpy: (T, 3, crop, crop) float64."""
    result = []
    for index in [int((i + 0.5) * len(frames) / num_frames) for i in range(num_frames)]:
        image = Image.fromarray(frames[index])
        width, height = image.size
        scaled = (size, size * height // width) if width < height else (size * width // height, size)
        array = np.asarray(image.resize(scaled, resample)).astype(float)
        top, left = (array.shape[0] - crop) // 2, (array.shape[1] - crop) // 2
        array = array[top : top + crop, left : left + crop]
        result.append(((array / 255 - np.array(mean)) / np.array(std)).transpose(2, 0, 1))
    return np.stack(result)


@pytest.mark.parametrize("height, width", [(48, 64), (64, 48), (37, 91), (90, 31), (32, 32), (20, 27)])
def test_pixel_values_are_those_of_pil_and_numpy(height, width):
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    clip = np.stack([picture(height, width, seed) for seed in range(11)])
    processor = DmgalVideoProcessor(num_frames=5, size=32, crop_size=27, image_mean=mean, image_std=std)
    pixel_values = processor(clip).pixel_values
    assert pixel_values.dtype == torch.float32 and pixel_values.is_contiguous()
    expected = plain_pixel_values(clip, 5, 32, 27, mean, std)
    one_level = 1.01 / 255 / min(std)
    np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=one_level)
    assert np.abs(pixel_values[0].numpy() - expected).mean() < one_level / 20


def test_bicubic_is_that_of_pil():
    clip = np.stack([picture(80, 100, seed) for seed in range(2)])
    processor = DmgalVideoProcessor(num_frames=2, size=32, crop_size=32, resample=Image.BICUBIC)
    expected = plain_pixel_values(clip, 2, 32, 32, 0.45, 0.225, Image.BICUBIC)
    np.testing.assert_allclose(processor(clip).pixel_values[0].numpy(), expected, atol=1.01 / 255 / 0.225)


def test_every_kind_of_video_gives_the_same_frames(processor, videos, frames):
    path = videos[0]
    tensor = torch.from_numpy(frames)
    kinds = {
        "path": path,
        "string": str(path),
        "bytes": path.read_bytes(),
        "file": io.BytesIO(path.read_bytes()),
        "dict of path": {"path": str(path), "bytes": None},
        "dict of bytes": {"path": None, "bytes": path.read_bytes()},
        "numpy, channels last": frames,
        "numpy, channels first": frames.transpose(0, 3, 1, 2),
        "tensor, channels last": tensor,
        "tensor, channels first": tensor.permute(0, 3, 1, 2),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "list of arrays": list(frames),
        "tuple of tensors": tuple(tensor.permute(0, 3, 1, 2)),
        "int64": frames.astype(np.int64),
        "uint16": frames.astype(np.uint16),
        "float": frames / 255,
        "float tensor": tensor.float() / 255,
        "reversed view": frames[::-1].copy()[::-1],
    }
    expected = plain_pixel_values(frames, 4, 32, 24, 0.45, 0.225)
    assert len({round(frame.mean(), 2) for frame in expected}) == 4
    for kind, video in kinds.items():
        pixel_values = processor(video).pixel_values
        assert pixel_values.shape == (1, 4, 3, 24, 24), kind
        np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=2 / 255 / 0.225, err_msg=kind)


def test_lists_are_several_videos_unless_of_pictures(processor, videos, frames):
    one_by_one = torch.cat([processor(video).pixel_values for video in videos])
    assert torch.equal(processor(videos).pixel_values, one_by_one)
    assert torch.equal(processor([videos[0], frames]).pixel_values[1:], processor(frames).pixel_values)
    assert processor([frames, frames[:3]]).pixel_values.shape[0] == 2
    assert processor(np.stack([frames, frames])).pixel_values.shape[0] == 2
    pictures = [Image.fromarray(frame) for frame in frames]
    assert processor([pictures]).pixel_values.shape[0] == 1
    assert torch.equal(processor([pictures, frames]).pixel_values, processor([frames, pictures]).pixel_values)


def test_where_both_layouts_fit_numpy_is_channels_last_and_a_tensor_channels_first():
    processor = DmgalVideoProcessor(num_frames=1, size=3, crop_size=3, do_rescale=False, do_normalize=False)
    video = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    assert torch.equal(processor(video).pixel_values[0, 0], torch.arange(27.0).view(3, 3, 3).permute(2, 0, 1))
    assert torch.equal(processor(torch.from_numpy(video)).pixel_values[0, 0], torch.arange(27.0).view(3, 3, 3))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 100])
def test_frames_are_the_segment_centres_whatever_the_length(length):
    processor = DmgalVideoProcessor(num_frames=8, size=4, crop_size=4, do_rescale=False, do_normalize=False)
    levels = np.arange(length, dtype=np.uint8)
    video = np.broadcast_to(levels[:, None, None, None], (length, 4, 4, 3))
    taken = processor(video).pixel_values[0, :, 0, 0, 0].int().tolist()
    assert taken == segment_indices(length, 8)
    assert taken == [(2 * i + 1) * length // 16 for i in range(8)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_other_modes_become_rgb(processor, mode):
    pictures = [Image.fromarray(picture(40, 50, seed)).convert(mode) for seed in range(4)]
    expected = np.stack([np.asarray(image.convert("RGB")) for image in pictures])
    assert torch.equal(processor(pictures).pixel_values, processor(expected).pixel_values)


def test_exact_size_without_crop():
    clip = np.stack([picture(40, 70, seed) for seed in range(3)])
    processor = DmgalVideoProcessor(num_frames=3, size={"height": 24, "width": 30}, do_center_crop=False)
    pixels = processor(clip).pixel_values[0] * 0.225 + 0.45
    for frame, result in zip(clip, pixels, strict=True):
        expected = np.asarray(Image.fromarray(frame).resize((30, 24), Image.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_allclose(result.numpy() * 255, expected, atol=1.01)


def test_episode_has_what_the_model_takes(processor, videos, frames):
    pictures = [Image.fromarray(frame) for frame in frames]
    support = {"wave": [videos[1], videos[2]], "clap": pictures, 7: [videos[0]]}
    episode = processor(support=support, query=[videos[2], frames])
    assert set(episode) == {"support_pixel_values", "support_labels", "query_pixel_values"}
    assert set(episode) <= set(DmgalModel.forward.__code__.co_varnames)  # its signature is for transformers.Trainer
    assert episode["support_labels"].tolist() == [[0, 0, 1, 2]] and episode["support_labels"].dtype == torch.int64
    expected = processor([videos[1], videos[2], frames, videos[0]]).pixel_values[None]
    torch.testing.assert_close(episode["support_pixel_values"], expected, atol=2 / 255 / 0.225, rtol=0)
    assert torch.equal(episode["query_pixel_values"], processor([videos[2], frames]).pixel_values[None])
    assert processor(support=support, query=videos[0])["query_pixel_values"].shape == (1, 1, 4, 3, 24, 24)


def test_label_names_stay_with_the_episode(processor, videos):
    episode = processor(support={"wave": videos[0], "clap": videos[1]}, query=videos[2])
    for moved in (
        episode.to("cpu"),
        episode.to(torch.bfloat16),
        copy.copy(episode),
        pickle.loads(pickle.dumps(episode)),
    ):
        assert moved.label_names == ["wave", "clap"] and set(moved) == set(episode)
    assert episode["query_pixel_values"].dtype == torch.bfloat16
    assert episode["support_labels"].dtype == torch.int64
    arrays = processor(support={"a": videos[0], "b": videos[1]}, query=videos[2], return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values()) and arrays.label_names == ["a", "b"]


@pytest.mark.parametrize("do_rescale", [True, False])
@pytest.mark.parametrize("do_normalize", [True, False])
def test_normalize_is_the_textbook_formula(do_rescale, do_normalize):
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    processor = DmgalVideoProcessor(
        do_rescale=do_rescale, do_normalize=do_normalize, image_mean=mean, image_std=std, rescale_factor=1 / 127.5
    )
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    expected = pixels.double() / 127.5 if do_rescale else pixels.double()
    if do_normalize:
        expected = (expected - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    for dtype, tolerance in (
        (torch.uint8, 1e-6),
        (torch.float32, 1e-6),
        (torch.float64, 1e-6),
        (torch.bfloat16, 1e-2),
    ):
        result = processor.normalize(pixels.to(dtype))
        assert result.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(processor.normalize(pixels[None, None])[0, 0], processor.normalize(pixels))
    with pytest.raises(ValueError, match=r"torch.int64 of \(2, 3, 16, 16\)"):
        processor.normalize(pixels.long())
    with pytest.raises(ValueError, match=r"\(2, 16, 16, 3\)"):
        processor.normalize(pixels.permute(0, 2, 3, 1))


@pytest.mark.parametrize("height, width, size", [(240, 427, 64), (100, 75, 64), (33, 90, 45), (64, 64, 64)])
def test_resize_is_that_of_pil_in_both_memory_layouts(height, width, size):
    frames = np.stack([picture(height, width, seed) for seed in range(2)])
    channels_last = torch.from_numpy(frames).permute(0, 3, 1, 2)
    result = resize_short_side(channels_last, size)
    expected_size = (size, size * width // height) if height <= width else (size * height // width, size)
    assert result.dtype == torch.uint8 and result.shape == (2, 3, *expected_size)
    assert torch.equal(result, resize_short_side(channels_last.contiguous(), size))
    for frame, resized in zip(frames, result, strict=True):
        expected = np.asarray(Image.fromarray(frame).resize(expected_size[::-1], Image.BILINEAR))
        assert np.abs(resized.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert resize(channels_last, 31, 17).shape == (2, 3, 31, 17)


def test_center_crop_is_a_view_of_the_middle():
    clip = torch.arange(7 * 10, dtype=torch.uint8).view(1, 1, 7, 10).repeat(2, 3, 1, 1)
    crop = center_crop(clip, 4, 5)
    assert torch.equal(crop, clip[:, :, 1:5, 2:7])
    assert crop.untyped_storage().data_ptr() == clip.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"8 x 5 pixels .* larger than the frames of 7 x 10"):
        center_crop(clip, 8, 5)


@pytest.mark.parametrize(
    "clip",
    [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)],
)
def test_functions_refuse_what_is_no_clip(clip):
    for function in (lambda: resize_short_side(clip, 4), lambda: center_crop(clip, 2, 2), lambda: resize(clip, 4, 4)):
        with pytest.raises(ValueError, match=r"uint8 tensor of shape \(T, 3, H, W\), not torch"):
            function()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_frames": 0}, "`num_frames` is 0; allowed is a whole number"),
        ({"num_frames": 2.5}, "`num_frames` is 2.5"),
        ({"do_resize": "yes"}, "`do_resize` is 'yes'; allowed is True or False"),
        ({"size": {"longest_edge": 3}}, "`size` is {'longest_edge': 3}; allowed .*shortest_edge.*height"),
        ({"size": 0}, r"`size\[shortest_edge\]` is 0"),
        ({"crop_size": {"height": 3}}, "`crop_size` is {'height': 3}"),
        ({"size": 100, "crop_size": 112}, "`crop_size` is .*112.* what `size` leaves .*100"),
        ({"size": {"height": 300, "width": 200}}, "`crop_size` is .*224"),
        ({"resample": 1}, r"`resample` is 1; allowed is 2 \(bilinear\) or 3"),
        ({"resample": "bilinear"}, "`resample` is 'bilinear'"),
        ({"rescale_factor": 0}, "`rescale_factor` is 0; allowed is a number above 0"),
        ({"image_mean": [0.5, 0.5]}, r"`image_mean` is \[0.5, 0.5\]; allowed is one number, or one each"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"`image_std` is \[0.2, 0.0, 0.2\]; allowed is a number above 0"),
        ({"image_mean": float("nan")}, "`image_mean` is nan"),
        ({"frames": 8}, "no field 'frames'; its fields are num_frames, do_resize"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DmgalVideoProcessor(**fields)


def test_saved_and_loaded_it_is_the_same(tmp_path, videos):
    AutoProcessor.register(DmgalConfig, DmgalVideoProcessor, exist_ok=True)
    processor = DmgalVideoProcessor(
        num_frames=3, size=30, crop_size={"height": 20, "width": 28}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["crop_size"] == {"height": 20, "width": 28} and saved["size"] == {"shortest_edge": 30}
    for loaded in (DmgalVideoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is DmgalVideoProcessor and loaded.to_dict() == processor.to_dict()
        assert torch.equal(loaded(videos).pixel_values, processor(videos).pixel_values)
    assert AutoProcessor.from_pretrained(tmp_path, num_frames=5)(videos[0]).pixel_values.shape[1] == 5
    with pytest.raises(ValueError, match="`num_frames` is -1"):
        AutoProcessor.from_pretrained(tmp_path, num_frames=-1)


@pytest.mark.parametrize(
    "file, fields",
    [
        (  # CLIP
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_center_crop": True,
                "crop_size": 224,
                "size": {"shortest_edge": 224},
                "resample": 3,
                "image_mean": [0.48, 0.45, 0.4],
                "image_std": [0.26, 0.26, 0.27],
                "do_convert_rgb": True,
            },
            {
                "size": {"shortest_edge": 224},
                "crop_size": {"height": 224, "width": 224},
                "image_mean": [0.48, 0.45, 0.4],
            },
        ),
        (  # ViT
            {"image_processor_type": "ViTImageProcessor", "size": 224, "resample": 2, "image_std": [0.5, 0.5, 0.5]},
            {"size": {"height": 224, "width": 224}, "do_center_crop": False, "image_std": [0.5, 0.5, 0.5]},
        ),
        (  # ResNet
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875, "resample": 3},
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
        ),
    ],
)
def test_starts_from_the_file_of_an_image_backbone(tmp_path, file, fields):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    processor = DmgalVideoProcessor.from_pretrained(tmp_path, num_frames=6)
    assert processor.num_frames == 6 and processor.resample == file["resample"]
    assert {name: getattr(processor, name) for name in fields} == fields
    assert processor(np.zeros((2, 250, 300, 3), np.uint8)).pixel_values.shape == (1, 6, 3, 224, 224)
    DmgalVideoProcessor(**processor.to_dict())


def test_unusable_videos_are_named(processor, videos, frames, tmp_path):
    broken, missing = tmp_path / "broken.mp4", tmp_path / "missing.mp4"
    broken.write_bytes(b"no video at all")
    gray16 = [Image.fromarray(np.zeros((40, 40), np.uint16))]
    pictures = [Image.fromarray(frame) for frame in frames]
    cases = [
        ([videos[0], broken], "broken.mp4"),
        (missing, "missing.mp4"),
        ([videos[0], b"nothing"], r"videos\[1\] <bytes>"),
        ([], "`videos` is empty"),
        (pictures[0], "videos is a single picture"),
        ([videos[0], pictures[0]], r"mixes videos with single pictures \(first at 1\)"),
        ([videos[0], pictures[:2] + [str(videos[0])]], r"videos\[1\] is a list.* frame 2 is a str"),
        ([videos[0], []], r"videos\[1\] is a list without frames"),
        (gray16, "frame 0 of videos has PIL mode 'I;16'"),
        ([frames[0], frames[1][:30]], r"different shapes, \[\(30, 64, 3\), \(48, 64, 3\)\]"),
        (frames[..., :2], r"shape \(20, 48, 64, 2\)"),
        (frames[:0], r"shape \(0, 48, 64, 3\)"),
        (np.zeros((3, 3), np.uint8), r"shape \(3, 3\)"),
        (frames.astype(np.float32), "values from 19.0 to .* floats 0..1"),
        (frames.astype(np.int16) - 300, "values from -281 to .* integers 0..255"),
        (np.full((2, 8, 8, 3), np.nan), "values from nan"),
        (frames > 100, "dtype torch.bool"),
    ]
    for video, message in cases:
        with pytest.raises(ValueError, match=message):
            processor(video)
    with pytest.raises(VideoDecodeError) as error:
        processor(support={"a": videos[0], "b": broken}, query=videos[0])
    assert error.value.source == str(broken)


def test_sizes_that_do_not_fit_are_named(frames):
    small, large = frames[:, :20, :20], frames
    with pytest.raises(ValueError, match=r"videos\[1\]: the crop of 24 x 24 .* frames of 20 x 20.*do_resize=False"):
        DmgalVideoProcessor(do_resize=False, crop_size=24)([large, small])
    with pytest.raises(ValueError, match=r"different sizes, 48 x 64 \(videos\[0\]\), 20 x 20 \(videos\[1\]\)"):
        DmgalVideoProcessor(do_resize=False, do_center_crop=False)([large, small])
    assert DmgalVideoProcessor(do_resize=False, crop_size=20)([large, small]).pixel_values.shape[-2:] == (20, 20)


def test_calls_that_make_no_episode_say_why(processor, videos):
    cases = [
        ({}, "nothing to process"),
        ({"query": videos}, "nothing to process"),
        ({"support": {"a": videos[0], "b": videos[1]}}, "needs `query`"),
        ({"support": {"a": videos}, "query": videos}, r"1 class\(es\), \['a'\]: an episode needs at least two"),
        ({"support": {"a": videos, "b": []}, "query": videos}, r"`support\['b'\]` is empty"),
        ({"support": {"a": videos, "b": videos}, "query": []}, "`query` is empty"),
        ({"support": [videos, videos], "query": videos}, "mapping of labels to videos, not a list"),
        ({"videos": videos, "query": videos}, "not both"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            processor(**arguments)


REMOTE = """
import sys
from transformers import AutoProcessor
folder, video = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert not any(name.startswith("dmgal_hf") for name in sys.modules)
assert processor.num_frames == 3 and processor(video).pixel_values.shape == (1, 3, 3, 24, 24)
processor.save_pretrained(folder + "/again")
AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
"""


@pytest.mark.slow
def test_loads_as_remote_code_without_the_package(tmp_path, videos, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(DmgalVideoProcessor, "_auto_class", None)
    DmgalVideoProcessor.register_for_auto_class()
    DmgalVideoProcessor(num_frames=3, size=32, crop_size=24).save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "checkpoint"), str(videos[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
