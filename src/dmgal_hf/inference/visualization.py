"""Pictures of what a [`DmgalModel`] looks at and how it decides. Needs matplotlib: `pip install dmgal-hf[viz]`.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no pyplot state: show it in a
notebook or call its `savefig`. Frames, patches, queries and supports are numbered from 0, the patches of a frame row
by row. Models may be in any mode and on any device; they are read in eval mode and left as they were.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..model.alignment import cosine_distance
from ..model.class_texts import combined_logits
from ..model.modeling_dmgal import DmgalModel, DmgalOutput, DmgalSupport
from ..model.motion_attention import SelfMotionAttention
from ..model.video_processing_dmgal import DmgalVideoProcessor

try:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("dmgal_hf.inference.visualization needs matplotlib: pip install dmgal-hf[viz]") from error

HEAT = "inferno"
BEST, OTHERS = "tab:orange", "tab:gray"
PLATE = {"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.45, "linewidth": 0}


def plot_motion_association(
    model: DmgalModel,
    pixel_values: torch.Tensor,
    frame: int,
    processor: DmgalVideoProcessor | None = None,
    pooled_grid: int | None = None,
) -> Figure:
    """
    The association between the patches of frame F_i and those of F_i+1, as in the paper's Figure 4: a heat map with
    the patches of F_i from top to bottom and those of F_i+1 from left to right.

    What is drawn (ours, the paper leaves it open) is all attention of S-MGA whose motion is the difference of just
    these two frames: at row p and column q the mean of how much patch p looks at patch q by the forward motion of
    F_i, and of how much patch q looks at patch p by the backward motion of F_i+1. A model with one
    `motion_directions` has that one alone. Values are given as multiples of an even spread, 1 / P.

    Args:
        model ([`DmgalModel`]): with paradigm "ft" and S-MGA.
        pixel_values (`torch.FloatTensor` of shape `(T, 3, H, W)`): one normalised video.
        frame (`int`): i, 0..T-2.
        processor ([`DmgalVideoProcessor`], *optional*): if given, the two frames are shown with their patch numbers.
        pooled_grid (`int`, *optional*):
            Averages the patches over a grid of this many by as many, such as 3 for the paper's 3 x 3.

    Returns:
        `Figure`: its axes labelled "association" hold an image of shape (P, P), P patches a frame.

    Raises:
        ValueError: `frame` or `pooled_grid` is out of range, the video has another shape, or the model has no S-MGA.
    """
    pixel_values = _check_video(pixel_values)
    _check_index("frame", frame, len(pixel_values) - 1, "frames with a successor")
    with _reading(model):
        maps = _read_video(model, pixel_values).hidden_states[0][0, 0]
        association = _associate(model.self_attention, maps, frame)
    grid = tuple(maps.shape[-2:])
    association = association.float().cpu().view(*grid, *grid)
    if pooled_grid is not None:
        _check_pooled_grid(pooled_grid, grid)
        grid = (pooled_grid, pooled_grid)
        association = F.adaptive_avg_pool2d(association, grid)
        association = F.adaptive_avg_pool2d(association.permute(2, 3, 0, 1), grid).permute(2, 3, 0, 1)
    return _draw_association(association, maps[0, 0].numel(), pixel_values, frame, processor)


def plot_self_attention(model: DmgalModel, processor: DmgalVideoProcessor, video: Any) -> Figure:
    """
    S-MGA over the frames of a video, as in the paper's Figure 5: the frames, and again under a heat map of the
    attention that every patch receives from the patches of its frame (mean over them and over the directions).

    The heat map is upsampled to the frame (bilinear). Its values are multiples of an even spread, 1 / P, on one scale
    for all frames.

    Args:
        model ([`DmgalModel`]): with paradigm "ft" and S-MGA.
        processor ([`DmgalVideoProcessor`]): of the model.
        video: one video of any kind the processor takes.

    Returns:
        `Figure`: with axes labelled "frame t" and "attention t"; the last image of the latter is the heat map (H, W).

    Raises:
        ValueError: there are several videos, or the model has no S-MGA. `VideoDecodeError` for an unreadable video.
    """
    pixel_values = processor(video).pixel_values
    if len(pixel_values) != 1:
        raise ValueError(f"`video` holds {len(pixel_values)} videos: plot_self_attention() draws one at a time")
    with _reading(model):
        output = _read_video(model, pixel_values[0])
    grid = tuple(output.hidden_states[0].shape[-2:])
    attention = output.attentions["query_self"][0, 0].float().cpu()  # (T, P, P)
    received = attention.mean(1) * attention.shape[-1]
    heat = _upsample(received.unflatten(-1, grid), pixel_values.shape[-2:])
    frames = _frames(processor, pixel_values[0])

    height, width = frames.shape[1:3]
    figure = Figure(figsize=(1.5 * len(frames) + 0.8, 3.0 * height / width + 0.8), layout="constrained")
    rows = figure.subplots(2, len(frames), squeeze=False)
    for t, (above, below) in enumerate(rows.T):
        _draw_frame(above, frames[t], f"frame {t}")
        above.set_title(f"frame {t}", fontsize=10)
        _draw_heat(below, frames[t], heat[t], heat.max(), f"attention {t}")
    _add_colorbar(figure, rows[1], heat.max(), "received attention\n(1 = even)")
    figure.suptitle("S-MGA: where the patches of each frame look")
    return figure


def plot_cross_attention(
    model: DmgalModel,
    processor: DmgalVideoProcessor,
    episode: Mapping[str, torch.Tensor],
    query: int = 0,
    frame: int | None = None,
    patch: int | None = None,
    label_names: Sequence[Any] | None = None,
) -> Figure:
    """
    C-MGA: where a patch of a query looks in the supports, all at the same frame index. One column a class, headed by
    the share of the attention that goes to the class.

    Heat maps are upsampled to the frame (bilinear). Their values are multiples of an even spread over all patches of
    all supports, 1 / (S P), on one scale.

    Args:
        model ([`DmgalModel`]): with paradigm "ft" and C-MGA.
        processor ([`DmgalVideoProcessor`]): of the model.
        episode (`Mapping`): what the processor returns for `support` and `query`; of one episode.
        query (`int`): which of the queries, 0..Q-1.
        frame (`int`, *optional*): 0..T-1, by default one in the middle.
        patch (`int`, *optional*): 0..P-1, by default one in the middle of the frame.
        label_names (`Sequence`, *optional*): names of the N classes; by default those of the episode, or numbers.

    Returns:
        `Figure`: with axes labelled "query" and "support s"; the last image of the latter is the heat map (H, W).

    Raises:
        ValueError: a number is out of range, the episode lacks a tensor or is not one, or the model has no C-MGA.
    """
    support, labels, query_video = _read_episode(episode, query)
    names = _class_names(episode, label_names, labels)
    frame = (support.shape[1] - 1) // 2 if frame is None else frame
    _check_index("frame", frame, support.shape[1], "frames a video")
    with _reading(model):
        output = _run(model, support, labels, query_video)
    cross = _attention_of(model, output, "cross")
    grid = tuple(output.hidden_states[0].shape[-2:])
    patch = grid[0] // 2 * grid[1] + grid[1] // 2 if patch is None else patch
    _check_index("patch", patch, math.prod(grid), "patches a frame")
    attention = cross[0, 0, frame, patch].float().cpu()  # (S, P)
    heat = _upsample((attention * attention.numel()).unflatten(-1, grid), support.shape[-2:])
    shares = F.one_hot(labels, len(names)).float().T @ attention.sum(-1)

    members = [(labels == n).nonzero()[:, 0].tolist() for n in range(len(names))]
    shots = max(map(len, members))
    height, width = support.shape[-2:]
    figure = Figure(figsize=(1.9 * (len(names) + 1) + 0.8, 1.9 * shots * height / width + 1.1), layout="constrained")
    layout = figure.add_gridspec(shots, len(names) + 1)
    axes = figure.add_subplot(layout[:, 0])
    _draw_frame(axes, _frames(processor, query_video[frame]), "query")
    _outline_patch(axes, patch, grid, (height, width))
    axes.set_title(f"query {query}\nframe {frame}, patch {patch}", fontsize=10)
    supports = []
    for n, videos in enumerate(members):
        for row, s in enumerate(videos):
            axes = figure.add_subplot(layout[row, n + 1])
            _draw_heat(axes, _frames(processor, support[s, frame]), heat[s], heat.max(), f"support {s}")
            if row == 0:
                axes.set_title(f"{_wrap(names[n], 20)}\n{shares[n]:.0%}", fontsize=10, parse_math=False)
            supports.append(axes)
    _add_colorbar(figure, supports, heat.max(), "attention (1 = even)")
    figure.suptitle("C-MGA: where this patch looks in the supports")
    return figure


def plot_episode(
    model: DmgalModel,
    processor: DmgalVideoProcessor,
    episode: Mapping[str, torch.Tensor],
    query: int = 0,
    label_names: Sequence[Any] | None = None,
    temperature: float | None = None,
    kept_support: DmgalSupport | None = None,
    text_embeds: torch.Tensor | None = None,
    text_weight: float | None = None,
) -> Figure:
    """
    An episode sheet: the query and the supports as strips of frames, the scores of the classes, and how the frames of
    the query match those of the best class.

    The matrix holds the cosine distances of all frames of the query to all frames of the supports of the best class.
    For a model with `alignment="bi_mhm"` the nearest frames that its distance adds up are marked, in both directions;
    the other alignments match no single frames.

    Args:
        model ([`DmgalModel`]): of any paradigm.
        processor ([`DmgalVideoProcessor`]): of the model.
        episode (`Mapping`): what the processor returns for `support` and `query`; of one episode.
        query (`int`): which of the queries, 0..Q-1.
        label_names (`Sequence`, *optional*): names of the N classes; by default those of the episode, or numbers.
        temperature (`float`, *optional*):
            Scores are softmax(logits / temperature); by default `config.score_temperature` of the model.
        kept_support ([`DmgalSupport`], *optional*):
            The supports of the episode as [`DmgalModel.encode_support`] gave them, so that only the query is encoded.
        text_embeds (`torch.FloatTensor` of shape `(N, E)`, *optional*):
            Prototypes by text, from [`DmgalModel.embed_class_names`]: the scores are those of clips and of texts.
        text_weight (`float`, *optional*): of the texts; by default `config.text_weight` of the model.

    Returns:
        `Figure`: with axes labelled "query", "support s", "scores" (N bars) and "distances" (an image of shape
        (T, K T) for K supports of the best class; the lines labelled "query to support" and "support to query" hold
        the matches, the frame of the support as x).

    Raises:
        ValueError: a number is out of range, the episode lacks a tensor or is not one, or `kept_support` has other
            labels.
    """
    temperature = model.config.score_temperature if temperature is None else temperature
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature!r}; it must be more than 0")
    support, labels, query_video = _read_episode(episode, query)
    names = _class_names(episode, label_names, labels)
    if kept_support is not None and not torch.equal(kept_support.labels.cpu(), labels[None]):
        raise ValueError("`kept_support` has other labels than the supports of `episode`: encode just those")
    with _reading(model):
        if kept_support is None:
            output = _run(model, support, labels, query_video)
        else:
            query_pixel_values = query_video[None, None].to(model.device, model.dtype)
            output = model(query_pixel_values=query_pixel_values, support=kept_support, return_dict=True)
    logits = output.logits[0, 0].float()
    if text_embeds is not None:
        text_weight = model.config.text_weight if text_weight is None else text_weight
        by_text = model.text_logits(output.query_embeds[0], text_embeds)[0].detach().log_softmax(-1)
        logits = combined_logits(logits, by_text, temperature, text_weight)
    logits = logits.cpu()
    best = int(logits.argmax())
    features = output.query_features.float(), output.support_features[:, labels == best].float()
    distance = cosine_distance(*features, model.config.cosine_epsilon)[0, 0].cpu()  # (K, T, T)

    height, width = support.shape[-2:]
    strips = 0.6 + (len(support) + 1) * (0.1 + 6.5 * height / (width * support.shape[1]))  # inches
    bars, matrix = 0.8 + 0.45 * len(names), 4.0
    total = max(strips, bars + matrix)
    figure = Figure(figsize=(14, total), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    _draw_strips(left, _frames(processor, support), labels, _frames(processor, query_video), names, best)
    # Beside many supports the last row stays free.
    above, below, _ = right.subfigures(3, 1, height_ratios=(bars, matrix, total - bars - matrix + 0.01))
    _draw_scores(above.add_subplot(label="scores"), logits, temperature, names, best)
    _draw_distances(below, distance, names[best], matched=model.config.alignment == "bi_mhm")
    return figure


# Reading the model


@contextmanager
def _reading(model: DmgalModel) -> Iterator[None]:
    """Eval mode without gradients; every module has its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _run(model: DmgalModel, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> DmgalOutput:
    """One episode of one query: (S, T, 3, H, W), (S,) and (T, 3, H, W)."""
    return model(
        support_pixel_values=support[None].to(model.device, model.dtype),
        support_labels=labels[None].to(model.device),
        query_pixel_values=query[None, None].to(model.device, model.dtype),
        output_attentions=True,
        output_hidden_states=True,
        return_dict=True,
    )


def _read_video(model: DmgalModel, pixel_values: torch.Tensor) -> DmgalOutput:
    """A video (T, 3, H, W) as a query: S-MGA does not see the supports, so the video itself will do as support."""
    output = _run(model, pixel_values[None], torch.zeros(1, dtype=torch.int64), pixel_values)
    _attention_of(model, output, "query_self")
    return output


def _attention_of(model: DmgalModel, output: DmgalOutput, name: str) -> torch.Tensor:
    if name in output.attentions:
        return output.attentions[name]
    module, switch = {"query_self": ("S-MGA", "self_motion_attention"), "cross": ("C-MGA", "cross_motion_attention")}[
        name
    ]
    if model.config.paradigm == "adapter":
        reason = "with paradigm='adapter' the attention inside the adapters is not returned; plot_episode() works"
    else:
        reason = f"its config has {switch}=False"
    raise ValueError(f"this model has no attention of {module} to draw: {reason}")


def _associate(attention: SelfMotionAttention, maps: torch.Tensor, frame: int) -> torch.Tensor:
    """
    What frames `frame` and `frame + 1` of the maps (T, C, h, w) have to do with each other: (P, P), even is 1 / P.

    The model returns the mean over the directions, in which the other neighbours of both frames have their part too.
    """
    parts = []
    for direction, of_frames in zip(attention.motion.directions, attention._attention(maps[None])):  # (T, P, P)
        parts.append(of_frames[frame] if direction == "forward" else of_frames[frame + 1].T)
    return torch.stack(parts).mean(0)


# Checks


def _check_video(pixel_values: torch.Tensor) -> torch.Tensor:
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
        raise ValueError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}; one video is (T, 3, H, W), such as "
            "processor(video).pixel_values[0]"
        )
    if len(pixel_values) < 2:
        raise ValueError("`pixel_values` has a single frame: an association needs two")
    return pixel_values


def _check_index(name: str, value: int, size: int, of: str):
    if not isinstance(value, int) or not 0 <= value < size:
        raise ValueError(f"`{name}` is {value!r}; there are {size} {of}, so it must lie in 0..{size - 1}")


def _check_pooled_grid(pooled_grid: int, grid: tuple[int, int]):
    if not isinstance(pooled_grid, int) or not 1 <= pooled_grid <= min(grid):
        raise ValueError(
            f"`pooled_grid` is {pooled_grid!r}; the frames have {grid[0]} x {grid[1]} patches, so it must lie in "
            f"1..{min(grid)}"
        )


def _read_episode(episode: Mapping[str, torch.Tensor], query: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Supports (S, T, 3, H, W), their labels (S,) and one query (T, 3, H, W)."""
    names = ("support_pixel_values", "support_labels", "query_pixel_values")
    missing = [name for name in names if name not in episode]
    if missing:
        raise ValueError(f"`episode` lacks {', '.join(missing)}: pass what processor(support=..., query=...) returns")
    support, labels, queries = (torch.as_tensor(episode[name]).cpu() for name in names)
    if (support.dim(), labels.dim(), queries.dim()) != (6, 2, 6) or len(support) != 1:
        raise ValueError(
            f"`episode` must be one episode, (1, S, T, 3, H, W) supports and (1, Q, T, 3, H, W) queries; they are "
            f"{tuple(support.shape)} and {tuple(queries.shape)}"
        )
    _check_index("query", query, queries.shape[1], "queries")
    return support[0], labels[0], queries[0, query]


def _class_names(episode: Mapping[str, Any], label_names: Sequence[Any] | None, labels: torch.Tensor) -> list[str]:
    way = int(labels.max()) + 1
    if label_names is None:
        label_names = getattr(episode, "label_names", None) or [f"class {n}" for n in range(way)]
    if len(label_names) != way:
        raise ValueError(f"`label_names` has {len(label_names)} names, but the supports are of {way} classes")
    return [str(name) for name in label_names]


# Drawing


def _frames(processor: DmgalVideoProcessor, pixel_values: torch.Tensor) -> np.ndarray:
    """Normalised (..., 3, H, W) -> what the processor had before normalising, uint8 (..., H, W, 3)."""
    pixels = pixel_values.float().cpu().movedim(-3, -1)
    if processor.do_normalize:
        pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).to(torch.uint8).numpy()


def _upsample(heat: torch.Tensor, size: Sequence[int]) -> np.ndarray:
    """(V, h, w) -> (V, H, W)."""
    return F.interpolate(heat[:, None], tuple(size), mode="bilinear")[:, 0].numpy()


def _wrap(text: str, width: int) -> str:
    return textwrap.fill(text, width, max_lines=3, placeholder=" ...")


def _draw_frame(axes: Axes, picture: np.ndarray, label: str):
    axes.set_label(label)
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])


def _draw_heat(axes: Axes, picture: np.ndarray, heat: np.ndarray, highest: float, label: str):
    """The frame, covered the more the more attention falls on a place."""
    _draw_frame(axes, picture, label)
    axes.imshow(heat, cmap=HEAT, vmin=0, vmax=highest, alpha=0.2 + 0.6 * heat / highest)


def _add_colorbar(figure: Figure | SubFigure, axes: Sequence[Axes], highest: float, label: str):
    # A bar of its own colours: that of the image would be as transparent as the heat map.
    figure.colorbar(ScalarMappable(Normalize(0, highest), HEAT), ax=axes, label=label, fraction=0.05, pad=0.01)


def _outline_patch(axes: Axes, patch: int, grid: tuple[int, int], size: tuple[int, int]):
    height, width = size[0] / grid[0], size[1] / grid[1]
    row, column = divmod(patch, grid[1])
    corner = (column * width - 0.5, row * height - 0.5)
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="cyan", linewidth=2))


def _number_patches(axes: Axes, grid: tuple[int, int], size: tuple[int, int]):
    height, width = size[0] / grid[0], size[1] / grid[1]
    for row in range(1, grid[0]):
        axes.axhline(row * height - 0.5, color="white", linewidth=0.6)
    for column in range(1, grid[1]):
        axes.axvline(column * width - 0.5, color="white", linewidth=0.6)
    if math.prod(grid) > 100:
        return  # unreadable
    for patch in range(math.prod(grid)):
        row, column = divmod(patch, grid[1])
        centre = ((column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5)
        axes.text(*centre, patch, color="white", fontsize=7, ha="center", va="center", bbox=PLATE)


def _draw_association(
    association: torch.Tensor,
    num_patches: int,
    pixel_values: torch.Tensor,
    frame: int,
    processor: DmgalVideoProcessor | None,
) -> Figure:
    """`association` is (h, w, h, w); even is 1 / num_patches."""
    grid = tuple(association.shape[:2])
    width_ratios = [2.2] if processor is None else [1, 2.2]
    figure = Figure(figsize=(2.6 * sum(width_ratios), 5), layout="constrained")
    layout = figure.add_gridspec(2, len(width_ratios), width_ratios=width_ratios)
    if processor is not None:
        for row, picture in enumerate(_frames(processor, pixel_values[frame : frame + 2])):
            axes = figure.add_subplot(layout[row, 0])
            _draw_frame(axes, picture, f"frame {frame + row}")
            _number_patches(axes, grid, picture.shape[:2])
            axes.set_title(f"$F_{{{frame + row}}}$", fontsize=10)
    axes = figure.add_subplot(layout[:, -1], label="association")
    values = association.flatten(2).flatten(0, 1).numpy() * num_patches
    image = axes.imshow(values, cmap=HEAT, vmin=0)
    # All patches if they can be read, else the first of every row.
    step = 1 if math.prod(grid) <= 25 else grid[1]
    ticks = range(0, math.prod(grid), step)
    axes.set(xticks=ticks, yticks=ticks, xlabel=f"patch of $F_{{{frame + 1}}}$", ylabel=f"patch of $F_{{{frame}}}$")
    axes.tick_params(labelsize=8)
    axes.set_title(f"S-MGA: association of $F_{{{frame}}}$ and $F_{{{frame + 1}}}$")
    figure.colorbar(image, ax=axes, label="attention (1 = even)", shrink=0.8)
    return figure


def _draw_strips(
    figure: SubFigure, support: np.ndarray, labels: torch.Tensor, query: np.ndarray, names: list[str], best: int
):
    """The query and below it the supports, class by class."""
    rows = [("query", "query", query, "black")]
    for n, name in enumerate(names):
        for place, s in enumerate((labels == n).nonzero()[:, 0].tolist()):
            colour = BEST if n == best else "black"
            rows.append((f"support {s}", name if place == 0 else "", support[s], colour))
    for (label, title, frames, colour), axes in zip(rows, figure.subplots(len(rows), 1, squeeze=False)[:, 0]):
        _draw_frame(axes, _strip(frames), label)
        weight = "bold" if colour == BEST or label == "query" else "normal"
        axes.set_ylabel(_wrap(title, 20), rotation=0, ha="right", va="center", color=colour, weight=weight,
                        parse_math=False)  # fmt: skip
        axes.spines[:].set_visible(False)
    figure.suptitle("frames of the query and the supports", fontsize=11)


def _strip(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) -> one picture, (H, T W and a white gap between frames, 3)."""
    gap = max(1, frames.shape[2] // 20)
    padded = np.pad(frames, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), 1)[:, :-gap]


def _draw_scores(axes: Axes, logits: torch.Tensor, temperature: float, names: list[str], best: int):
    scores = (logits / temperature).softmax(-1).tolist()
    places = range(len(names))
    bars = axes.barh(places, scores, color=[BEST if n == best else OTHERS for n in places])
    texts = [f" {score:.2f}  (logit {logit:.2f})" for score, logit in zip(scores, logits.tolist())]
    axes.bar_label(bars, texts, fontsize=8)
    axes.set_yticks(places, [_wrap(name, 24) for name in names], parse_math=False, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.45), xticks=[0, 0.5, 1])
    axes.set_title("scores" if temperature == 1 else f"scores at temperature {temperature:g}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 1)


def _draw_distances(figure: SubFigure, distance: torch.Tensor, name: str, matched: bool):
    """`distance` is (K, T, T), query frames by support frames."""
    shots, num_frames = distance.shape[:2]
    axes = figure.add_subplot(label="distances")
    image = axes.imshow(distance.transpose(0, 1).flatten(1).numpy(), cmap="viridis", aspect="auto")
    for k in range(1, shots):
        axes.axvline(k * num_frames - 0.5, color="white", linewidth=2)
    if matched:
        start = np.arange(shots)[:, None] * num_frames  # of each support among the columns
        frames = np.arange(num_frames)
        of_query = (start + distance.argmin(2).numpy()).ravel()
        axes.plot(of_query, np.tile(frames, shots), "ro", ms=11, mfc="none", mew=1.5, label="query to support")
        of_support = distance.argmin(1).numpy().ravel()
        axes.plot((start + frames).ravel(), of_support, "rx", ms=6, mew=1.5, label="support to query")
    columns = range(0, shots * num_frames, 1 if shots * num_frames <= 20 else 4)
    axes.set_xticks(columns, [column % num_frames for column in columns])
    axes.set(yticks=range(num_frames), xlabel="frame of the support", ylabel="frame of the query")
    figure.suptitle(f"distances to {_wrap(name, 60)}", fontsize=11, parse_math=False)
    figure.colorbar(image, ax=axes, label="cosine distance")
    if matched:
        figure.legend(loc="outside lower center", ncols=2, title="nearest frame", fontsize=9, title_fontsize=9)
