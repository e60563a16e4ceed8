import importlib
import io
import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ViTConfig

from dmgal_hf import DmgalConfig, DmgalModel, DmgalVideoProcessor

pytest.importorskip("matplotlib")
from dmgal_hf.inference.visualization import (
    plot_cross_attention,
    plot_episode,
    plot_motion_association,
    plot_self_attention,
)

pytestmark = pytest.mark.slow  # the fixtures that all share take seconds

RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
VIT = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                patch_size=8)  # fmt: skip
FRAMES, SIZE, GRID = 4, (32, 48), (4, 6)  # of videos that are as large as the model wants them


def make_model(seed=0, **fields):
    """A model in which every attention and every statistic is away from its start."""
    torch.manual_seed(seed)
    model = DmgalModel(DmgalConfig(**{"backbone_config": RESNET, "num_frames": FRAMES, **fields})).eval()
    for name, tensor in model.state_dict().items():
        if "gamma" in name or ("norm" in name and tensor.is_floating_point()):
            tensor.add_(0.3 * torch.rand_like(tensor))
        elif name.endswith(("motion.project.weight", "motion.neighbour.weight")):
            tensor.mul_(3)  # peaks in the attention
    return model


def make_adapter_model():
    torch.manual_seed(0)
    config = DmgalConfig(backbone_config=VIT, num_frames=FRAMES, paradigm="adapter", adapter_config={})
    return DmgalModel(config).eval()


def make_video(seed, frames=FRAMES, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


@pytest.fixture
def processor():
    # Unlike means and deviations tell the channels apart.
    return DmgalVideoProcessor(
        FRAMES, size=32, do_center_crop=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
    )


@pytest.fixture
def videos():
    """Three classes of 1, 3 and 2 supports, and two queries."""
    support = {"push": [make_video(0)], "pull $x^$": [make_video(1), make_video(2), make_video(3)], "lift": []}
    support["lift"] = [make_video(4), make_video(5)]
    return support, [make_video(6), make_video(7)]


@pytest.fixture
def episode(processor, videos):
    return processor(support=videos[0], query=videos[1])


def draw(figure):
    """Renders it, which is when matplotlib finds most mistakes; returns the axes by label."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    assert file.getvalue().startswith(b"\x89PNG")
    return {axes.get_label(): axes for axes in figure.axes}


def image(axes, number=-1):
    return np.asarray(axes.images[number].get_array())


def enlarge(heat, size):
    """PIL's bilinear enlarging of a (h, w) picture."""
    return np.asarray(Image.fromarray(heat.numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def one_direction(model, direction):
    """The same weights, but motion in one direction alone."""
    config = DmgalConfig.from_dict({**model.config.to_dict(), "motion_directions": direction})
    other = DmgalModel(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@torch.no_grad()
def self_attention(model, pixel_values):
    """(T, P, P) as the model itself returns it."""
    support, labels = torch.zeros(1, 1, *pixel_values.shape), torch.tensor([[0]])
    return model(support, labels, pixel_values[None, None], output_attentions=True).attentions["query_self"][0, 0]


@torch.no_grad()
@pytest.mark.parametrize("directions", ["both", "forward", "backward"])
def test_association_is_the_attention_by_the_motion_of_two_frames(processor, directions):
    model = make_model(motion_directions=directions)
    pixel_values = processor(make_video(0)).pixel_values[0]
    forward = self_attention(one_direction(model, "forward"), pixel_values)
    backward = self_attention(one_direction(model, "backward"), pixel_values)
    for frame in range(FRAMES - 1):
        expected = {"forward": forward[frame], "backward": backward[frame + 1].T}
        expected["both"] = (expected["forward"] + expected["backward"]) / 2
        assert expected["both"].max() > 2 * expected["both"].mean()  # there is something to see
        axes = draw(plot_motion_association(model, pixel_values, frame))
        assert set(axes) == {"association", "<colorbar>"}
        np.testing.assert_allclose(image(axes["association"]), expected[directions] * 24, rtol=1e-4, atol=1e-4)
        assert axes["association"].get_ylabel() == f"patch of $F_{{{frame}}}$"
        assert axes["association"].get_xlabel() == f"patch of $F_{{{frame + 1}}}$"
        # Only these two frames matter.
        others = torch.stack([value if t in (frame, frame + 1) else -value for t, value in enumerate(pixel_values)])
        again = plot_motion_association(model, others, frame)
        np.testing.assert_allclose(image(again.axes[0]), image(axes["association"]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_association_averages_patches_on_request_and_shows_the_frames(processor):
    model, video = make_model(), make_video(0)
    pixel_values = processor(video).pixel_values[0]
    full = image(plot_motion_association(model, pixel_values, 1).axes[0])
    axes = draw(plot_motion_association(model, pixel_values, 1, processor, pooled_grid=2))
    assert set(axes) == {"association", "<colorbar>", "frame 1", "frame 2"}
    cells = [[6 * row + column for row in rows for column in columns]
             for rows in ((0, 1), (2, 3)) for columns in ((0, 1, 2), (3, 4, 5))]  # fmt: skip
    expected = [[full[np.ix_(own, other)].mean() for other in cells] for own in cells]
    # The smallest lie where float32 has few digits left.
    np.testing.assert_allclose(image(axes["association"]), expected, rtol=1e-5, atol=1e-30)
    for t in (1, 2):
        np.testing.assert_array_equal(image(axes[f"frame {t}"]), video[t])
        assert [text.get_text() for text in axes[f"frame {t}"].texts] == ["0", "1", "2", "3"]
    axes = draw(plot_motion_association(model, pixel_values, 1, processor))
    places = {text.get_text(): text.get_position() for text in axes["frame 1"].texts}
    assert len(places) == 24 and places["7"] == (11.5, 11.5) and places["23"] == (43.5, 27.5)  # 8 pixels a patch


@torch.no_grad()
def test_self_attention_lies_over_the_frames(processor):
    model, video = make_model(), make_video(0)
    axes = draw(plot_self_attention(model, processor, video))
    assert set(axes) == {f"{kind} {t}" for kind in ("frame", "attention") for t in range(FRAMES)} | {"<colorbar>"}
    attention = self_attention(model, processor(video).pixel_values[0])
    highest = 0
    for t in range(FRAMES):
        received = torch.tensor([sum(float(attention[t, p, q]) for p in range(24)) for q in range(24)])
        expected = enlarge(received.view(GRID), SIZE)  # 24 patches: the sum is 24 times the mean
        highest = max(highest, expected.max())
        np.testing.assert_allclose(image(axes[f"attention {t}"]), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(image(axes[f"frame {t}"]), video[t])
        np.testing.assert_array_equal(image(axes[f"attention {t}"], 0), video[t])
    limits = {axes[f"attention {t}"].images[-1].get_clim() for t in range(FRAMES)}
    assert len(limits) == 1 and limits.pop() == pytest.approx((0, highest), rel=1e-4)


@torch.no_grad()
def test_cross_attention_lies_over_the_supports_at_the_same_frame(processor, episode, videos):
    model = make_model()
    axes = draw(plot_cross_attention(model, processor, episode, query=1, frame=2, patch=9))
    cross = model(**episode, output_attentions=True).attentions["cross"][0, 1, 2, 9]  # (S, P)
    assert set(axes) == {"query", "<colorbar>"} | {f"support {s}" for s in range(6)}
    clips = [clip for clips in videos[0].values() for clip in clips]
    for s in range(6):
        expected = enlarge(cross[s].view(GRID) * 6 * 24, SIZE)
        np.testing.assert_allclose(image(axes[f"support {s}"]), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(image(axes[f"support {s}"], 0), clips[s][2])
    np.testing.assert_array_equal(image(axes["query"]), videos[1][1][2])
    (outline,) = axes["query"].patches
    assert outline.get_xy() == (3 * 8 - 0.5, 8 - 0.5) and outline.get_bbox().size.tolist() == [8, 8]
    # The first of each class bears its name and what the class gets.
    for s, name, members in ((0, "push", [0]), (1, "pull $x^$", [1, 2, 3]), (4, "lift", [4, 5])):
        assert axes[f"support {s}"].get_title() == f"{name}\n{float(cross[members].sum()):.0%}"
    columns = [axes[f"support {s}"].get_subplotspec().colspan.start for s in range(6)]
    assert columns == [1, 2, 2, 2, 3, 3]
    # Frame and patch default to the middle.
    middle = draw(plot_cross_attention(model, processor, episode))
    assert middle["query"].get_title() == "query 0\nframe 1, patch 15"


@torch.no_grad()
@pytest.mark.parametrize("query", [0, 1])
def test_episode_sheet_adds_up_to_the_logits(processor, episode, videos, query):
    model = make_model()
    logits = model(**episode).logits[0, query]
    best, members = int(logits.argmax()), ([0], [1, 2, 3], [4, 5])
    shots = len(members[best])
    axes = draw(plot_episode(model, processor, episode, query=query, temperature=0.5))
    assert set(axes) == {"query", "scores", "distances", "<colorbar>"} | {f"support {s}" for s in range(6)}

    scores = [bar.get_width() for bar in axes["scores"].patches]
    np.testing.assert_allclose(scores, (logits / 0.5).softmax(-1), rtol=1e-4)
    assert [label.get_text() for label in axes["scores"].get_yticklabels()] == list(videos[0])

    distances = image(axes["distances"])
    assert distances.shape == (FRAMES, shots * FRAMES)
    x, y = model(**episode).query_features[0, query], model(**episode).support_features[0, members[best]].flatten(0, 1)
    expected = [[1 - float(a @ b / (a.norm() * b.norm() + 0.01)) for b in y] for a in x]
    np.testing.assert_allclose(distances, expected, atol=1e-5)

    # The distances at the marks make the logit, and every frame has its mark.
    marks = {line.get_label(): line.get_xydata().astype(int) for line in axes["distances"].lines}
    of_query, of_support = marks["query to support"], marks["support to query"]
    assert sorted(of_query[:, 1].tolist()) == sorted(list(range(FRAMES)) * shots)
    assert sorted(of_support[:, 0].tolist()) == list(range(shots * FRAMES))
    total = distances[of_query[:, 1], of_query[:, 0]].sum() + distances[of_support[:, 1], of_support[:, 0]].sum()
    assert -total / shots == pytest.approx(float(logits[best]), rel=1e-4)

    clips = [clip for clips in videos[0].values() for clip in clips]
    for label, clip in [("query", videos[1][query])] + [(f"support {s}", clip) for s, clip in enumerate(clips)]:
        strip = image(axes[label])
        assert strip.shape == (32, FRAMES * 48 + (FRAMES - 1) * 2, 3)
        for t in range(FRAMES):
            np.testing.assert_array_equal(strip[:, t * 50 : t * 50 + 48], clip[t])
    named = [axes[f"support {s}"].get_ylabel() for s in range(6)]
    assert named == ["push", "pull $x^$", "", "", "lift", ""]


def test_episode_sheet_takes_names_and_temperature_from_where_they_are(processor, episode):
    model = make_model(score_temperature=3.0)
    axes = draw(plot_episode(model, processor, dict(episode)))
    assert [label.get_text() for label in axes["scores"].get_yticklabels()] == ["class 0", "class 1", "class 2"]
    with torch.no_grad():
        expected = (model(**episode).logits[0, 0] / 3).softmax(-1)
    np.testing.assert_allclose([bar.get_width() for bar in axes["scores"].patches], expected, rtol=1e-4)
    axes = draw(plot_episode(model, processor, episode, label_names=("a", "b", "c")))
    assert [label.get_text() for label in axes["scores"].get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize("alignment", ["otam", "mean"])
def test_only_bi_mhm_matches_frames(processor, episode, alignment):
    axes = draw(plot_episode(make_model(alignment=alignment), processor, episode))
    assert all("support" not in line.get_label() for line in axes["distances"].lines)


@pytest.mark.parametrize("make", [make_model, make_adapter_model])
def test_episode_sheet_of_kept_supports_is_the_same(processor, make):
    processor.size = {"height": 32, "width": 32}
    episode = processor(support={"a": [make_video(0), make_video(1)], "b": [make_video(2)]}, query=[make_video(3)])
    model, counts = make(), []
    with torch.no_grad():
        kept = model.encode_support(episode["support_pixel_values"], episode["support_labels"])
    expected = draw(plot_episode(model, processor, episode))
    model.backbone.register_forward_hook(lambda module, args, output: counts.append(len(output.last_hidden_state)))
    sheet = draw(plot_episode(model, processor, episode, kept_support=kept))
    assert counts == [FRAMES]
    for axes in (sheet, expected):
        axes["widths"] = [bar.get_width() for bar in axes["scores"].patches]
        axes["matrix"] = axes["distances"].images[0].get_array()
    assert sheet["widths"] == pytest.approx(expected["widths"], abs=1e-5)
    np.testing.assert_allclose(sheet["matrix"], expected["matrix"], atol=1e-5)
    with pytest.raises(ValueError, match="other labels than the supports"):
        plot_episode(model, processor, episode, kept_support=kept.select([0, 2]))


def test_a_model_in_training_is_left_as_it_was(processor, episode):
    model = make_model()
    expected = image(plot_self_attention(model, processor, make_video(0)).axes[-2])
    model.train()
    model.backbone.eval()  # as one that is frozen
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn = image(plot_self_attention(model, processor, make_video(0)).axes[-2])
    np.testing.assert_array_equal(drawn, expected)
    plot_episode(model, processor, episode)
    with pytest.raises(ValueError):
        plot_cross_attention(model, processor, episode, patch=24)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_no_pyplot_figure_is_left_open(processor, episode):
    from matplotlib import pyplot

    plot_episode(make_model(), processor, episode)
    plot_cross_attention(make_model(), processor, episode)
    assert pyplot.get_fignums() == []


def test_a_model_without_attention_says_so():
    processor = DmgalVideoProcessor(FRAMES, size=32, crop_size=32)
    support = {"a": make_video(0, size=(32, 32)), "b": make_video(1, size=(32, 32))}
    episode = processor(support=support, query=make_video(2, size=(32, 32)))
    pixel_values, model = episode["query_pixel_values"][0, 0], make_adapter_model()
    for module, plot in {
        "S-MGA": lambda: plot_motion_association(model, pixel_values, 0),
        "C-MGA": lambda: plot_cross_attention(model, processor, episode),
    }.items():
        with pytest.raises(ValueError, match=f"no attention of {module} to draw: with paradigm='adapter'"):
            plot()
    with pytest.raises(ValueError, match="no attention of S-MGA"):
        plot_self_attention(model, processor, make_video(2, size=(32, 32)))
    assert {"scores", "distances", "query"} < set(draw(plot_episode(model, processor, episode)))

    with pytest.raises(ValueError, match="S-MGA to draw: its config has self_motion_attention=False"):
        plot_motion_association(make_model(self_motion_attention=False), pixel_values, 0)
    with pytest.raises(ValueError, match="C-MGA to draw: its config has cross_motion_attention=False"):
        plot_cross_attention(make_model(cross_motion_attention=False), processor, episode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 3}, r"`frame` is 3; there are 3 frames with a successor, so it must lie in 0..2"),
        ({"frame": -1}, r"`frame` is -1"),
        ({"frame": 0, "pooled_grid": 5}, r"`pooled_grid` is 5; the frames have 4 x 6 patches, .* 1..4"),
        ({"frame": 0, "pooled_grid": 0}, r"`pooled_grid` is 0"),
        ({"frame": 0, "pixel_values": torch.zeros(1, 4, 3, 32, 48)}, r"shape \(1, 4, 3, 32, 48\); one video is"),
        ({"frame": 0, "pixel_values": torch.zeros(1, 3, 32, 48)}, r"a single frame"),
        ({"frame": 0, "pixel_values": torch.zeros(3, 3, 32, 48)}, r"3 frames a video, .* num_frames=4"),
    ],
)
def test_association_refuses(processor, options, message):
    arguments = {"pixel_values": processor(make_video(0)).pixel_values[0], **options}
    with pytest.raises(ValueError, match=message):
        plot_motion_association(make_model(), **arguments)


def test_episodes_that_are_refused(processor, episode, videos):
    model = make_model()
    for options, message in [
        ({"frame": 4}, r"`frame` is 4; there are 4 frames a video, so it must lie in 0..3"),
        ({"patch": 24}, r"`patch` is 24; there are 24 patches a frame, so it must lie in 0..23"),
        ({"query": 2}, r"`query` is 2; there are 2 queries, so it must lie in 0..1"),
        ({"label_names": ["a", "b"]}, r"`label_names` has 2 names, but the supports are of 3 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot_cross_attention(model, processor, episode, **options)
    with pytest.raises(ValueError, match=r"`query` is -1"):
        plot_episode(model, processor, episode, query=-1)
    with pytest.raises(ValueError, match="`temperature` is 0"):
        plot_episode(model, processor, episode, temperature=0)
    with pytest.raises(ValueError, match="`episode` lacks support_labels, query_pixel_values"):
        plot_episode(model, processor, {"support_pixel_values": episode["support_pixel_values"]})
    with pytest.raises(ValueError, match=r"`episode` must be one episode, .* \(2, 6, 4, 3, 32, 48\)"):
        plot_episode(model, processor, {name: torch.cat([value, value]) for name, value in episode.items()})
    with pytest.raises(ValueError, match="`video` holds 2 videos"):
        plot_self_attention(model, processor, videos[1])


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dmgal_hf.inference.visualization")
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install dmgal-hf\[viz\]"):
        importlib.import_module("dmgal_hf.inference.visualization")


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("paradigm", ["ft", "adapter"])
def test_script_writes_pictures(tmp_path, monkeypatch, capsys, paradigm):
    for number, name in enumerate(["push/0", "push/1", "pull/0", "query"]):
        path = tmp_path / ("query.mp4" if name == "query" else f"support/{name}.mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, make_video(number, 8))
    (make_model() if paradigm == "ft" else make_adapter_model()).save_pretrained(tmp_path / "model")
    DmgalVideoProcessor(FRAMES, size=32, crop_size=32).save_pretrained(tmp_path / "model")
    script = str(Path(__file__).parents[2] / "scripts" / "visualize.py")

    def run(**options):
        given = {"model": "model", "support": "support", "query": "query.mp4", "output": "out/pictures"}
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(tmp_path / value))]
        arguments += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")

    run(frame=0, patch=3, pooled_grid=3, dpi=50)
    written = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    printed = capsys.readouterr().out
    if paradigm == "adapter":
        assert written == {"episode.png"} and "adapters return no attention" in printed
    else:
        assert written == {"episode.png", "motion_association.png", "self_attention.png", "cross_attention.png"}
        with pytest.raises(ValueError, match="`patch` is 16"):
            run(patch=16)
    for name in written:
        picture = Image.open(tmp_path / "out" / "pictures" / name)
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50 and name in printed
    with pytest.raises(FileNotFoundError, match=r"no folder of videos .*nowhere"):
        run(support=tmp_path / "nowhere")
