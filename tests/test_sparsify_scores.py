"""Truth tables of the criteria, and pruning at once by scores that need data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import scores
from sparsetrain.sparsify import CRITERIA, keep_top, magnitude, random
from sparsify_cases import batch, loss_of, network


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return nn.Sequential(layer)


def test_magnitude():
    assert magnitude(torch.tensor([[1.0, -3.0], [0.0, 2.0]])).tolist() == [[1, 3], [0, 2]]
    with pytest.raises(ValueError, match="NaN"):
        magnitude(torch.tensor([float("nan")]))
    assert set(CRITERIA) == {"magnitude", "random"}


def test_random():
    weight = torch.zeros(3, 4)
    a, b = (random(weight, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == weight.shape


def test_keep_top_prefers_the_first_of_equals():
    assert keep_top(torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0]), 2).tolist() == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_the_criterion_of_mest():
    model = sparsetrain.sparsify(linear([[1.0, -2.0], [0.0, 4.0]]), 0.25)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    mest = sparsetrain.MEST(model, opt, gradient_weight=0.5)
    assert mest.drop_scores(mest.layers[0]).tolist() == [1.0, 2.0, 4.0]
    model[0].values.grad = torch.tensor([-6.0, 1.0, 0.0])
    assert mest.drop_scores(mest.layers[0]).tolist() == [4.0, 2.5, 4.0]


def test_snip():
    """loss = sum(w x): the gradient is x, so the score is |w x|, summed over the batches."""
    model = linear([[1.0, -2.0], [3.0, 0.5]])
    xs = [torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, -4.0]])]
    found = scores.snip(model, [lambda x=x: model(x).sum() for x in xs])
    assert found["0"].tolist() == [[2.0, 12.0], [6.0, 3.0]]
    assert model[0].weight.grad is None
    sparse = sparsetrain.sparsify(model, 0.5, criterion=found, distribution="global")
    assert sparse[0].weight.tolist() == [[0.0, -2.0], [3.0, 0.0]]


def test_wanda():
    model = linear([[1.0, -2.0, 1.0], [3.0, 0.5, 0.1]])
    x = torch.tensor([[3.0, 1.0, 0.0], [4.0, 0.0, 8.0]])  # norms 5, 1, 8
    plain = scores.wanda(model, [lambda: model(x)], per_output=False)["0"]
    torch.testing.assert_close(plain, torch.tensor([[5.0, 2.0, 8.0], [15.0, 0.5, 0.8]]))
    ranked = scores.wanda(model, [lambda: model(x)])["0"]
    torch.testing.assert_close(ranked * 3, torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 1.0]]))
    sparse = sparsetrain.sparsify(model, 2 / 3, criterion={"0": ranked})
    assert sparse[0].pattern.row_counts().tolist() == [1, 1]


def test_wanda_of_a_grouped_convolution_with_sequences_and_without_a_batch():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=2)
    model = nn.Sequential(conv)
    xs = [torch.randn(2, 4, 5, 5), torch.randn(4, 5, 5)]
    found = scores.wanda(model, [lambda x=x: model(x) for x in xs], per_output=False)["0"]
    norm = sum(x.square().sum((-2, -1)).reshape(-1, 4).sum(0) for x in xs).sqrt()
    for out in range(6):
        for channel in range(2):
            expected = conv.weight[out, channel].abs() * norm[out // 3 * 2 + channel]
            torch.testing.assert_close(found[out, channel], expected.detach())


@pytest.mark.parametrize("score", ["snip", "wanda"])
def test_scores_leave_the_model_as_it_is(score):
    model = nn.Sequential(*network(), nn.BatchNorm1d(4).double())
    loss_of(model, 0).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    x, y = batch(1)
    if score == "snip":
        found = scores.snip(model, [lambda: nn.functional.cross_entropy(model(x), y)])
    else:
        found = scores.wanda(model, [lambda: model(x)], exclude="0")
    assert set(found) == {"2", "5", "7"} | ({"0"} if score == "snip" else set())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    sparse = sparsetrain.sparsify(model, 0.8, criterion=found, include=list(found))
    assert sparse(x).shape == (8, 4)


def test_bad_scores():
    model = network()
    x, _ = batch(0)
    with pytest.raises(TypeError, match="functions that return a scalar loss"):
        scores.snip(model, [lambda: model(x)])
    with pytest.raises(ValueError, match="losses is empty"):
        scores.snip(model, [])
    with pytest.raises(ValueError, match="does not depend on layer 5"):
        scores.snip(model, [lambda: model[:3](x).sum()])
    with pytest.raises(TypeError, match="runs must hold functions"):
        scores.wanda(model, [x])
    with pytest.raises(ValueError, match="runs is empty"):
        scores.wanda(model, [])
    with pytest.raises(ValueError, match="no run has used layer 5"):
        scores.wanda(model, [lambda: model[:3](x)])
    good = scores.wanda(model, [lambda: model(x)])
    with pytest.raises(ValueError, match="criterion has no scores for layer 7"):
        sparsetrain.sparsify(model, 0.5, criterion={k: good[k] for k in ("0", "2", "5")})
    with pytest.raises(ValueError, match="must have its weight's shape"):
        sparsetrain.sparsify(model, 0.5, criterion=good | {"5": good["7"]})
    with pytest.raises(ValueError, match="hold NaN"):
        sparsetrain.sparsify(model, 0.5, criterion=good | {"5": good["5"] * float("nan")})
    with pytest.raises(ValueError, match="criterion must be one of 'magnitude', 'random' or a"):
        sparsetrain.sparsify(model, 0.5, criterion="best")
