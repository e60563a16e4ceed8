import pytest
import torch

from dmgal_hf.model.alignment import bi_mhm, class_logits, cosine_distance, otam


def plain_distance(x, y, epsilon=0.01):
    return 1 - torch.dot(x, y) / (x.norm() * y.norm() + epsilon)


def plain_bi_mhm(query, support):
    matrix = torch.tensor([[plain_distance(x, y) for y in support] for x in query])
    return matrix.min(1).values.sum() + matrix.min(0).values.sum()


def plain_otam_one_way(matrix, smoothing):
    rows, columns = matrix.shape[0], matrix.shape[1] + 2
    cost = torch.zeros(rows, columns, dtype=matrix.dtype)
    cost[:, 1:-1] = matrix
    total = torch.zeros_like(cost)

    def soft_minimum(*cells):
        return -smoothing * torch.log(sum(torch.exp(-cell / smoothing) for cell in cells))

    for m in range(1, columns):
        total[0, m] = cost[0, m] + total[0, m - 1]
    for i in range(1, rows):
        for m in range(1, columns):
            before = [total[i - 1, m - 1], total[i, m - 1]]
            if m in (1, columns - 1):
                before.append(total[i - 1, m])
            total[i, m] = cost[i, m] + soft_minimum(*before)
    return total[-1, -1]


def plain_otam(query, support, smoothing=0.1):
    matrix = torch.tensor([[plain_distance(x, y) for y in support] for x in query], dtype=torch.float64)
    return plain_otam_one_way(matrix, smoothing) + plain_otam_one_way(matrix.T, smoothing)


@pytest.fixture
def descriptors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 5, 6, generator=generator), torch.randn(2, 3, 5, 6, generator=generator)


def test_distance_of_all_pairs(descriptors):
    query, support = descriptors
    distance = cosine_distance(query, support)
    assert distance.shape == (2, 4, 3, 5, 5)
    torch.testing.assert_close(distance[1, 3, 2, 4, 0], plain_distance(query[1, 3, 4], support[1, 2, 0]))
    assert torch.isfinite(cosine_distance(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 3))).all()


@pytest.mark.parametrize("metric, plain", [(bi_mhm, plain_bi_mhm), (otam, plain_otam)])
def test_metrics_match_plain_versions(descriptors, metric, plain):
    query, support = descriptors
    expected = [[[plain(q, s) for s in supports] for q in queries] for queries, supports in zip(query, support)]
    torch.testing.assert_close(metric(query, support), torch.tensor(expected).float(), atol=1e-4, rtol=1e-4)


def test_bi_mhm_ignores_the_order_of_frames_and_otam_does_not(descriptors):
    query, support = descriptors
    order = [3, 1, 4, 0, 2]
    torch.testing.assert_close(bi_mhm(query, support[:, :, order]), bi_mhm(query, support))
    assert (otam(query, support[:, :, order]) - otam(query, support)).abs().max() > 0.1


@pytest.mark.parametrize("alignment", ["bi_mhm", "otam", "mean"])
def test_gradients_are_finite(descriptors, alignment):
    query, support = descriptors
    query.requires_grad_()
    class_logits(query, support, torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, alignment).logsumexp(-1).sum().backward()
    assert torch.isfinite(query.grad).all() and query.grad.abs().sum() > 0


def test_classes_average_their_own_supports(descriptors):
    query, support = descriptors
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    distance = bi_mhm(query, support)
    logits = class_logits(query, support, labels, 2)
    assert logits.shape == (2, 4, 2)
    torch.testing.assert_close(logits[0, :, 0], -distance[0, :, 0])
    torch.testing.assert_close(logits[0, :, 1], -(distance[0, :, 1] + distance[0, :, 2]) / 2)
    torch.testing.assert_close(logits[1, :, 0], -(distance[1, :, 1] + distance[1, :, 2]) / 2)


def test_mean_prototypes(descriptors):
    query, support = descriptors
    logits = class_logits(query, support, torch.tensor([[0, 1, 1], [1, 0, 0]]), 2, "mean")
    prototype = support[0, 1:].flatten(0, 1).mean(0)
    torch.testing.assert_close(logits[0, 2, 1], -10 * plain_distance(query[0, 2].mean(0), prototype))


def test_low_precision_descriptors_are_compared_in_float32(descriptors):
    query, support = (x.bfloat16() for x in descriptors)
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = class_logits(query, support, labels, 2)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, class_logits(query.float(), support.float(), labels, 2))
