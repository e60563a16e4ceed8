"""How two sequences of frame descriptors are compared, and classes scored from it.

Every metric takes queries (B, Q, T, D) and supports (B, S, T, D) and compares all pairs of one episode at once.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def cosine_distance(query: torch.Tensor, support: torch.Tensor, epsilon: float = 0.01) -> torch.Tensor:
    """
    Distances of all frames of all pairs of videos, d = 1 - x.y / (|x||y| + epsilon), as the authors define the cosine.

    Args:
        query (`torch.Tensor` of shape `(B, Q, T, D)`): floating frame descriptors.
        support (`torch.Tensor` of shape `(B, S, T', D)`): the same of the supports.
        epsilon (`float`): keeps the quotient finite for descriptors of length zero.

    Returns:
        `torch.Tensor` of shape `(B, Q, S, T, T')`.
    """
    num_query, num_support = query.shape[1], support.shape[1]
    query, support = query.flatten(1, 2), support.flatten(1, 2).transpose(1, 2)  # (B, Q·T, D), (B, D, S·T')
    norms = query.norm(dim=2, keepdim=True) * support.norm(dim=1, keepdim=True)
    distance = 1 - torch.bmm(query, support) / (norms + epsilon)
    return distance.unflatten(2, (num_support, -1)).unflatten(1, (num_query, -1)).transpose(2, 3)


def bi_mhm(query: torch.Tensor, support: torch.Tensor, epsilon: float = 0.01) -> torch.Tensor:
    """
    Bidirectional mean Hausdorff metric: every frame of either video is matched to the nearest of the other
    (method: "Prototype matching"; summed over the frames as in the authors' code).

    Args and shapes as in [`cosine_distance`]. Returns `(B, Q, S)`.
    """
    distance = cosine_distance(query, support, epsilon)
    return distance.amin(-1).sum(-1) + distance.amin(-2).sum(-1)


def otam(query: torch.Tensor, support: torch.Tensor, epsilon: float = 0.01, smoothing: float = 0.1) -> torch.Tensor:
    """
    Ordered temporal alignment (OTAM, Cao et al. 2020), taken in both directions and added, so that neither video has
    to be matched as a whole from its first frame to its last.

    A soft dynamic programme has to go step by step; the loop runs over the T + T' - 1 anti-diagonals of the distance
    matrices, all pairs and all cells of a diagonal at once.

    Args and shapes as in [`cosine_distance`]; `smoothing` is the temperature of the soft minimum. Returns `(B, Q, S)`.
    """
    distance = cosine_distance(query, support, epsilon)
    return _soft_alignment(distance, smoothing) + _soft_alignment(distance.transpose(-1, -2), smoothing)


def _soft_alignment(distance: torch.Tensor, smoothing: float) -> torch.Tensor:
    # A free column before the first frame and one after the last let a path leave out the ends of the second video.
    # It moves right or diagonally; in the first real and the last free column also straight down.
    distance = F.pad(distance, (1, 1))
    rows, columns = distance.shape[-2:]
    infinity = 1e6  # far above any path, yet finite: the soft minimum of unreachable cells keeps a gradient of zero
    # A row that is skewed by its number turns every anti-diagonal into a column.
    skewed = distance.new_zeros(*distance.shape[:-1], rows + columns - 1)
    row, column = torch.meshgrid(
        torch.arange(rows, device=distance.device), torch.arange(columns, device=distance.device), indexing="ij"
    )
    skewed[..., row, row + column] = distance
    row = torch.arange(rows, device=distance.device)
    one_back = two_back = distance.new_full(distance.shape[:-1], infinity)
    for diagonal in range(rows + columns - 1):
        column = diagonal - row
        left = one_back  # (row, column - 1)
        up = _shift_down(one_back, infinity)  # (row - 1, column)
        up_left = _shift_down(two_back, infinity)  # (row - 1, column - 1)
        straight_down = (column == 1) | (column == columns - 1)
        previous = torch.stack([left, up_left, up.masked_fill(~straight_down, infinity)], -1)
        soft_minimum = -smoothing * torch.logsumexp(-previous / smoothing, -1)
        # The first row accumulates plainly and the first column is the free start, as in the published code.
        value = torch.where(row == 0, left, soft_minimum)
        value = torch.where(column == 0, torch.zeros_like(value), value) + skewed[..., diagonal]
        value = value.masked_fill((column < 0) | (column >= columns), infinity)
        one_back, two_back = value, one_back
    return one_back[..., -1]


def _shift_down(column: torch.Tensor, fill: float) -> torch.Tensor:
    return F.pad(column, (1, 0), value=fill)[..., :-1]


def class_logits(
    query: torch.Tensor,
    support: torch.Tensor,
    support_labels: torch.Tensor,
    way: int,
    alignment: str = "bi_mhm",
    epsilon: float = 0.01,
    smoothing: float = 0.1,
) -> torch.Tensor:
    """
    Scores of the classes of an episode: minus the mean distance of the query to the supports of the class
    (method: "Prototype matching"). Classes may have different numbers of supports.

    With `"mean"` the prototype of a class is the mean over the frames and supports of the class, and the distance to
    it is scaled by 2 T so that it lies in the range of the other two (ours).

    Args:
        query (`torch.Tensor` of shape `(B, Q, T, D)`): floating frame descriptors; compared in float32.
        support (`torch.Tensor` of shape `(B, S, T, D)`): the same of the supports.
        support_labels (`torch.LongTensor` of shape `(B, S)`): classes 0..way-1; one without supports
            (which has a text instead) gets a logit of minus infinity.
        way (`int`): number of classes N.
        alignment (`str`): `"bi_mhm"`, `"otam"` or `"mean"`.
        epsilon (`float`): of [`cosine_distance`].
        smoothing (`float`): of [`otam`].

    Returns:
        `torch.FloatTensor` of shape `(B, Q, way)`.
    """
    if not support.shape[1]:
        return query.new_full((*query.shape[:2], way), -math.inf, dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, support = query.float(), support.float()
        # Not F.one_hot, which reads the labels to check them.
        weights = (support_labels[..., None] == torch.arange(way, device=query.device)).to(query.dtype)
        counts = weights.sum(1, keepdim=True)
        weights = weights / counts.clamp(min=1)  # (B, S, N)
        if alignment == "mean":
            prototypes = weights.transpose(1, 2) @ support.mean(2)  # (B, N, D)
            distance = cosine_distance(query.mean(2, keepdim=True), prototypes.unsqueeze(2), epsilon)
            logits = -2 * query.shape[2] * distance.flatten(2)
        else:
            pair_distance = partial(otam, smoothing=smoothing) if alignment == "otam" else bi_mhm
            logits = -(pair_distance(query, support, epsilon) @ weights)
        return logits.masked_fill(counts == 0, -math.inf)
