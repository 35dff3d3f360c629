"""Schedules, distributions and the errors that a sparsifier gives before it changes anything."""

from __future__ import annotations

import copy
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import schedules
from sparsetrain.pattern import nonzeros_for
from sparsetrain.sparsify import erk, uniform
from sparsify_cases import ALGORITHMS, batch, loss_of, network, train

# ---- schedules -----------------------------------------------------------------------------------


def test_constant():
    s = schedules.Constant(0.25, every=10, start=5, stop=40)
    assert [t for t in range(60) if s.due(t)] == [15, 25, 35]
    assert {s.value(t) for t in range(60)} == {0.25}
    assert schedules.Constant(0.1, every=3).due(3_000_000)


def test_cosine_ends_at_zero_and_is_half_in_the_middle():
    s = schedules.Cosine(0.3, every=100, stop=1000)
    assert s.value(0) == 0.3
    assert s.value(500) == pytest.approx(0.15)
    assert s.value(1000) == 0.0
    assert s.value(250) == pytest.approx(0.15 * (1 + math.sqrt(0.5)))
    assert [t for t in range(2000) if s.due(t)] == list(range(100, 1000, 100))


def test_cubic_reaches_one_exactly_at_its_stop():
    s = schedules.Cubic(every=30, start=10, stop=100)
    assert [t for t in range(200) if s.due(t)] == [40, 70, 100]
    assert [s.value(t) for t in (0, 10, 100, 500)] == [0.0, 0.0, 1.0, 1.0]
    assert s.value(55) == pytest.approx(1 - 0.5**3)
    assert schedules.Cubic(every=30, stop=100).due(100)


def test_periodic_begins_dense_and_ends_sparse():
    s = schedules.Periodic(warmup=3, dense=2, sparse=4, stop=13)
    assert [int(s.value(t)) for t in range(16)] == [1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert [t for t in range(16) if s.due(t)] == [3, 7, 9]


def test_warm_up_scales_another_schedule():
    s = schedules.WarmUp(schedules.Constant(0.4, every=5), steps=20)
    assert [s.value(t) for t in (0, 5, 10, 20, 50)] == [0.0, 0.1, 0.2, 0.4, 0.4]
    assert s.due(5)
    assert not s.due(6)
    assert (s.every, s.stop) == (5, None)
    assert schedules.WarmUp(schedules.WarmUp(schedules.Cubic(stop=90), 5), 9).stop == 90


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.Cosine(stop=100, start=100), ValueError, "end before it starts"),
        (lambda: schedules.Cubic(stop=10, start=50), ValueError, "stop = 10 must come after start"),
        (lambda: schedules.Constant(stop=0), ValueError, "end before it starts"),
        (lambda: schedules.Periodic(warmup=10, stop=5), ValueError, "end before it starts"),
        (
            lambda: schedules.Cosine(stop=100),
            ValueError,
            "update at step 100, but stop = 100",
        ),
        (
            lambda: schedules.Constant(stop=99),
            ValueError,
            "update at step 100, but stop = 99",
        ),
        (lambda: schedules.Constant(every=5, start=9, stop=13), ValueError, "end before it starts"),
        (
            lambda: schedules.WarmUp(schedules.Cosine(every=9, stop=50), 50),
            ValueError,
            "never be at full",
        ),
        (lambda: schedules.WarmUp(3, 50), TypeError, "must have due and value"),
        (lambda: schedules.Cosine(drop_fraction=0.0), ValueError, "drop_fraction must be in"),
        (lambda: schedules.Constant(drop_fraction=1.5), ValueError, "drop_fraction must be in"),
        (
            lambda: schedules.Constant(drop_fraction="a"),
            TypeError,
            "drop_fraction must be a number",
        ),
        (lambda: schedules.Constant(every=0), ValueError, "every must be at least 1"),
        (lambda: schedules.Constant(every=1.5), TypeError, "every must be an integer"),
        (lambda: schedules.Periodic(dense=0), ValueError, "dense must be at least 1"),
    ],
)
def test_bad_schedules(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_schedules_are_frozen_and_comparable():
    s = schedules.Cosine()
    assert s == schedules.Cosine(0.3, 100, 7500)
    with pytest.raises(AttributeError):
        s.every = 3


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_published_schedules_act_and_end_within_the_training(kind):
    for total in (2, 10, 500, 100_000):
        s = ALGORITHMS[kind].published(total)
        due = [t for t in range(1, total + 1) if s.due(t)]
        assert (len(due) == 0) == (kind == "Static")
        if kind == "GMP":
            assert s.value(total) == 1.0
        if kind == "ACDC":
            assert s.value(total) == 0.0


# ---- distributions -------------------------------------------------------------------------------


@hypothesis.given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0.0, 0.999),
)
def test_erk_sums_to_the_total_and_no_layer_exceeds_density_one(shapes, sparsity):
    sizes = [math.prod(shape) for shape in shapes]
    counts = erk(shapes, sparsity)
    total = max(len(shapes), nonzeros_for(sum(sizes), sparsity))
    assert sum(counts) == total
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    most = [max(1, size // 3) for size in sizes]
    counts = erk(shapes, sparsity, most)
    assert sum(counts) == min(total, sum(most))
    assert all(1 <= count <= limit for count, limit in zip(counts, most, strict=True))


def test_erk_gives_small_layers_more():
    shapes = [(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)]
    density = [c / math.prod(s) for c, s in zip(erk(shapes, 0.9), shapes, strict=True)]
    assert density[1] < 0.1 < density[0]
    assert density[1] < density[2]


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global", {"5": 0.5, "*": 0.9}])
def test_every_distribution_reaches_the_layers(distribution):
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = sparsetrain.SET(model, opt, 0.9, distribution=distribution)
    counts = {x.name: x.nnz for x in s.layers}
    shapes = [x.module.weight_shape for x in s.layers]
    total = sum(map(math.prod, shapes))
    if distribution == "uniform":
        assert list(counts.values()) == uniform(shapes, 0.9)
    elif isinstance(distribution, dict):
        assert counts["5"] == 32 * 24 // 2
        assert counts["2"] == 8 * 36 - round(0.9 * 8 * 36)
    else:
        assert sum(counts.values()) == total - round(0.9 * total)


def test_layers_are_chosen_by_include_and_exclude():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    s = sparsetrain.SET(model, opt, 0.8, exclude=["0", "7"], include=None)
    assert [x.name for x in s.layers] == ["2", "5"]
    assert isinstance(model[0], nn.Conv2d)


# ---- errors --------------------------------------------------------------------------------------


class Picture:
    """What must not change: modules, parameters, what the optimizer holds."""

    def __init__(self, model, opt):
        self.model, self.opt = model, opt
        self.seen = self.look()

    def look(self):
        return (
            [(n, id(m)) for n, m in self.model.named_modules()],
            [(n, id(p), p.detach().clone()) for n, p in self.model.named_parameters()],
            [[id(p) for p in g["params"]] for g in self.opt.param_groups],
            {id(p) for p in self.opt.state},
            len(self.opt._optimizer_step_post_hooks),
        )

    def unchanged(self):
        before, now = self.seen, self.look()
        return (
            before[0] == now[0]
            and before[2:] == now[2:]
            and all(
                a[:2] == b[:2] and torch.equal(a[2], b[2])
                for a, b in zip(before[1], now[1], strict=True)
            )
        )


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be in"),
        ({"sparsity": 90}, ValueError, "did you mean 0.9"),
        ({"sparsity": "much"}, TypeError, "sparsity must be a number"),
        ({"distribution": "fair"}, ValueError, "distribution must be one of"),
        ({"schedule": 100}, TypeError, "schedule must be one of sparsetrain.schedules"),
        ({"schedule": schedules.Cosine}, TypeError, "schedule must be one of"),
        ({"schedule": schedules.Cosine(), "total_steps": 5}, ValueError, "either schedule or"),
        ({"total_steps": 0}, ValueError, "total_steps must be an integer of at least 2"),
        ({"total_steps": 1e5}, ValueError, "total_steps must be an integer"),
        ({"exclude": "9"}, ValueError, "matches nothing"),
        ({"initial": "best"}, ValueError, "initial must be"),
        ({"sparsity": 0.9999}, ValueError, "no weight at all|at least one"),
        (
            {"sparsity": 0.9999, "distribution": "uniform"},
            ValueError,
            "no weight at all in layer 0",
        ),
    ],
)
def test_bad_arguments_change_nothing(kind, options, error, message):
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    picture = Picture(model, opt)
    options = dict(options)
    if kind == "TopKAST" and options.get("sparsity") == 0.9999:
        options["backward_sparsity"] = 0.9999
    with pytest.raises(error, match=message):
        ALGORITHMS[kind](model, opt, options.pop("sparsity", 0.8), **options)
    assert picture.unchanged()


def test_a_model_with_nothing_to_make_sparse():
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has no layer to convert"):
        sparsetrain.RigL(model, opt, 0.9)


@pytest.mark.parametrize("sparse", [False, True])
def test_an_optimizer_that_does_not_own_the_weights(sparse):
    model = sparsetrain.sparsify(network(), 0.8) if sparse else network()
    opt = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    picture = Picture(model, opt)
    with pytest.raises(ValueError, match="optimizer does not own the weights of 0, 2, 5, 7"):
        sparsetrain.RigL(model, opt, None if sparse else 0.9)
    assert picture.unchanged()
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer"):
        sparsetrain.RigL(model, "sgd")
    with pytest.raises(ValueError, match="LBFGS"):
        sparsetrain.RigL(model, torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_whose_state_cannot_follow():
    model = network()
    opt = torch.optim.Adafactor(model.parameters())
    loss_of(model, 0).backward()
    opt.step()
    picture = Picture(model, opt)
    with pytest.raises(ValueError, match="keeps state 'row_var' of shape"):
        sparsetrain.SET(model, opt, 0.9)
    assert picture.unchanged()


def test_an_output_that_gets_no_weight_by_rounding_is_warned_of():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"fewer weights than outputs.*5 \(15 weights for 24"):
        sparsetrain.RigL(model, opt, 0.98, distribution="uniform", include=["2", "5"])


def test_a_sparse_model_at_another_sparsity():
    model = sparsetrain.sparsify(network(), 0.8)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the model is sparse already, at 0"):
        sparsetrain.RigL(model, opt, 0.95)
    sparsetrain.RigL(model, opt, 0.8)


def test_own_arguments_of_algorithms():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    picture = Picture(model, opt)
    with pytest.raises(ValueError, match="gradient_weight must be at least 0"):
        sparsetrain.MEST(model, opt, 0.8, gradient_weight=-1.0)
    with pytest.raises(ValueError, match="backward_sparsity must be in"):
        sparsetrain.TopKAST(model, opt, 0.8, backward_sparsity=0.9)
    with pytest.raises(ValueError, match="exploration_decay must be at least 0"):
        sparsetrain.TopKAST(model, opt, 0.8, exploration_decay=-1.0)
    with pytest.raises(ValueError, match="GMP starts with all weights"):
        sparsetrain.GMP(model, opt, 0.8, initial="random")
    assert picture.unchanged()


def test_step_without_an_optimizer_step_does_nothing_and_warns_once():
    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    s = sparsetrain.SET(model, opt, 0.8, schedule=schedules.Constant(0.5, every=1))
    with pytest.warns(UserWarning, match=r"without an optimizer.step"):
        assert not s.step()
    train(model, opt, s, range(1))
    patterns = [x.module.pattern for x in s.layers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not s.step()
    assert s.steps == 1
    assert all(x.module.pattern is p for x, p in zip(s.layers, patterns, strict=True))


def test_magnitude_as_the_start_of_a_trained_model():
    model = network()
    weight = model[5].weight.detach().abs().view(-1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsetrain.RigL(model, opt, 0.8, initial="magnitude", distribution="uniform")
    kept = model[5].pattern.flat_indices()
    assert float(weight[kept].min()) >= float(weight.kthvalue(weight.numel() - len(kept)).values)
    assert model(batch(0)[0]).shape == (8, 4)
