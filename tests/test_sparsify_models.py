"""Models, optimizers and steps that are not the plain case: what happens to them, or why not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import schedules
from sparsetrain.sparsify import erk
from sparsify_cases import ALGORITHMS, loss_of, network, train


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_every_kind_of_convolution_with_and_without_groups(kind, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=2),
        nn.Unflatten(2, (2, 2, 2)),
        nn.Conv3d(8, 8, 2, groups=4, padding=1),
        nn.Flatten(),
        nn.Linear(216, 4),
    ).to(dtype)
    x, y = torch.randn(6, 4, 10, dtype=dtype), torch.arange(6) % 4
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsifier = ALGORITHMS[kind](model, opt, 0.6, total_steps=30)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        sparsifier.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    total = sum(layer.size for layer in sparsifier.layers)
    assert abs(sum(layer.nnz for layer in sparsifier.layers) - 0.4 * total) <= 2
    assert sparsifier.updates > 5 or kind == "Static"


def test_each_parameter_stays_in_its_group_under_its_new_name():
    model = network()
    named = list(model.named_parameters())
    opt = torch.optim.SGD([{"params": named[:3], "lr": 0.1}, {"params": named[3:], "lr": 0.01}])
    sparsifier = sparsetrain.RigL(model, opt, 0.7, schedule=schedules.Constant(0.3, every=2))
    train(model, opt, sparsifier, range(6))
    now = dict(model.named_parameters())
    for group, part in zip(opt.param_groups, (named[:3], named[3:]), strict=True):
        names = [name.replace("weight", "values") for name, _ in part]
        assert group["param_names"] == names
        assert all(p is now[name] for p, name in zip(group["params"], names, strict=True))
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.01]


def test_a_dense_layer_that_does_not_learn_is_refused():
    model = network()
    model[5].weight.requires_grad_(False)
    opt, weight = sgd(model), model[5].weight
    with pytest.raises(ValueError, match=r"weights of 5 do not learn .*exclude='5'"):
        sparsetrain.SET(model, opt, 0.7)
    assert model[5].weight is weight
    sparsetrain.SET(model, opt, 0.7, exclude="5")
    assert model[5].weight is weight


@pytest.mark.parametrize("kind", ["SET", "RigL", "MEST", "GMP", "ACDC", "TopKAST"])
def test_a_sparse_layer_that_does_not_learn_stays_as_it_is(kind):
    model = sparsetrain.sparsify(network(), 0.5)
    model[5].values.requires_grad_(False)
    before, pattern = model[5].values.detach().clone(), model[5].pattern
    schedule = schedules.Constant(0.5, every=1)
    if kind in ("GMP", "ACDC"):
        schedule = (
            schedules.Cubic(every=1, stop=4) if kind == "GMP" else schedules.Periodic(1, 1, 1)
        )
    sparsity = 0.8 if kind in ("GMP", "ACDC") else None
    opt = sgd(model)
    sparsifier = ALGORITHMS[kind](model, opt, sparsity, schedule=schedule)
    train(model, opt, sparsifier, range(5))
    assert model[5].pattern is pattern
    assert torch.equal(model[5].values, before)
    assert all(x.dropped + x.grown > 0 for x in sparsifier.layers if x.name == "2")


def test_sparse_layers_that_share_their_values_are_refused():
    a, b = (sparsetrain.nn.SparseLinear(8, 8, sparsity=0.5) for _ in range(2))
    b._pattern, b.values = a._pattern, a.values
    model = nn.Sequential(a, b)
    with pytest.raises(ValueError, match=r"0.values and 1.values are one tensor"):
        sparsetrain.SET(model, sgd(model))
    model = nn.Sequential(a, nn.Tanh(), a)  # one layer in two places
    opt = sgd(model)
    sparsifier = sparsetrain.SET(model, opt, schedule=schedules.Constant(0.5, every=1))
    model(torch.randn(3, 8)).sum().backward()
    opt.step()
    assert sparsifier.step()
    assert [layer.grown for layer in sparsifier.layers] == [16]


def test_an_optimizer_of_matrices_is_refused():
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match="Muon works on matrices"):
        sparsetrain.SET(model, torch.optim.Muon(model.parameters()), 0.5)


def test_what_is_no_model():
    for kind in (sparsetrain.SET, sparsetrain.TopKAST):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
            kind("model", sgd(network()))


@pytest.mark.parametrize(
    ("kind", "sparse", "options", "message"),
    [
        ("SET", False, {"distribution": {"5": 0.9999}}, "0.9999 rounds to no weight.*layer 5"),
        ("GMP", True, {"sparsity": 0.9999}, "0.9999 leaves 0.1 weights for 4 layers"),
        ("GMP", True, {"distribution": {"2": 0.999}}, "0.999 rounds to no weight.*layer 2"),
        ("GMP", True, {"sparsity": 0.3}, "sparse already, at 0.5000.*or a higher one"),
        ("TopKAST", False, {"sparsity": 0.999, "backward_sparsity": 0.5}, "0.999 leaves 1.3"),
        ("TopKAST", True, {"sparsity": 0.9999, "backward_sparsity": 0.5}, "layer 0 has 72 weights"),
    ],
)
def test_a_sparsity_that_cannot_be(kind, sparse, options, message):
    model = sparsetrain.sparsify(network(), 0.5) if sparse else network()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    opt = sgd(model)
    with pytest.raises(ValueError, match=message):
        ALGORITHMS[kind](model, opt, options.pop("sparsity", 0.6), **options)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert [id(p) for p in opt.param_groups[0]["params"]] == [i for _, i in before]


def test_outputs_that_the_forward_set_leaves_nothing_are_warned_of():
    model = nn.Sequential(nn.Linear(8, 20))
    with pytest.warns(UserWarning, match=r"0 \(16 weights for 20 outputs\)"):
        sparsetrain.TopKAST(model, sgd(model), 0.9)
    sparse = sparsetrain.sparsify(nn.Sequential(nn.Linear(8, 20)), 0.5)
    with pytest.warns(UserWarning, match=r"0 \(16 weights for 20 outputs\)"):
        sparsetrain.GMP(sparse, sgd(sparse), 0.9)


def test_a_sparse_model_gets_exactly_the_sparsity_that_was_asked():
    model = sparsetrain.sparsify(network(), 0.5)  # some layers have less than ERK would give them
    opt = sgd(model)
    sparsifier = sparsetrain.GMP(model, opt, 0.75, schedule=schedules.Cubic(every=2, stop=6))
    train(model, opt, sparsifier, range(6))
    counts, shapes = zip(*((x.nnz, x.module.weight_shape) for x in sparsifier.layers), strict=True)
    assert sum(counts) == sum(math.prod(shape) for shape in shapes) / 4
    assert counts[3] == 48 < erk(shapes, 0.75)[3]


def test_topkast_takes_a_sparse_model_for_its_backward_set():
    model = sparsetrain.sparsify(network(), 0.5)
    opt = sgd(model)
    counts = [m.nnz for m in model if hasattr(m, "nnz")]
    sparsifier = sparsetrain.TopKAST(model, opt, total_steps=20)
    assert [layer.nnz for layer in sparsifier.layers] == counts
    train(model, opt, sparsifier, range(20))
    assert [layer.nnz for layer in sparsifier.layers] == [count // 2 for count in counts]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (schedules.Constant(0.3, every=3, stop=8), [3, 6, 8]),
        (schedules.WarmUp(schedules.Constant(0.3, every=3, stop=8), 5), [3, 6, 8]),
    ],
)
def test_topkast_tells_of_each_change_when_all_of_it_is_done(schedule, steps):
    model = network()
    opt = sgd(model)
    sparsifier = sparsetrain.TopKAST(model, opt, 0.8, schedule=schedule)
    seen = []

    def check(s):
        seen.append(s.steps)
        for layer in s.layers:
            weights = layer.module.weight.detach().count_nonzero()
            assert weights <= layer.goal  # newcomers are zero
            if layer.module._active is not None:
                values = layer.module.values.detach().abs()
                assert values[layer.module._active].min() >= values[~layer.module._active].max()

    sparsifier.register_callback(check)
    train(model, opt, sparsifier, range(12))
    assert seen == steps
    assert sparsifier.updates == 3
    assert all(layer.nnz == layer.goal for layer in sparsifier.layers)


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (schedules.Constant(0.3, every=3, stop=18), 18),
        (schedules.Cosine(0.3, every=3, stop=18), 15),
        (schedules.WarmUp(schedules.Cosine(0.3, every=3, stop=20), 5), 18),
    ],
)
def test_mest_is_back_at_its_goal_at_the_last_update_and_not_before(schedule, last):
    model = network()
    opt = sgd(model)
    sparsifier = sparsetrain.MEST(model, opt, 0.8, soft=True, schedule=schedule)
    goal = sum(layer.goal for layer in sparsifier.layers)
    for step in range(1, 25):
        train(model, opt, sparsifier, range(step, step + 1))
        present = sum(layer.nnz for layer in sparsifier.layers)
        assert (present == goal) == (step < 3 or step >= last), step


def test_gradients_of_a_step_that_was_skipped_do_not_count():
    def topology(skip):
        model = network()
        opt = sgd(model)
        sparsifier = sparsetrain.RigL(model, opt, 0.8, schedule=schedules.Constant(0.3, every=2))
        train(model, opt, sparsifier, range(1))
        if skip:  # as a GradScaler does where gradients are infinite
            (loss_of(model, 7) * float("inf")).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                sparsifier.step()
            opt.zero_grad()
        train(model, opt, sparsifier, range(1, 2))
        return [layer.module.pattern for layer in sparsifier.layers]

    assert topology(skip=True) == topology(skip=False)
