"""Sparse training against masks over dense weights, and the laws that hold for every algorithm."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import schedules
from sparsify_cases import ALGORITHMS, OPTIMIZERS, MaskedRun, batch, loss_of, network, train

SCHEDULES = {
    "Static": schedules.Never(),
    "SET": schedules.Constant(0.3, every=10),
    "RigL": schedules.Cosine(0.3, every=10, stop=180),
    "MEST": schedules.Cosine(0.3, every=10, stop=180),
    "GMP": schedules.Cubic(every=10, stop=150),
    "ACDC": schedules.Periodic(warmup=20, dense=30, sparse=25, stop=170),
    "TopKAST": schedules.Constant(0.3, every=10),
}


def make(kind, optimizer="sgd_momentum", schedule=None, sparsity=0.7, **options):
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    schedule = schedule or SCHEDULES[kind]
    return model, opt, ALGORITHMS[kind](model, opt, sparsity, schedule=schedule, **options)


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adam"])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_two_hundred_steps_as_with_masks_over_dense_weights(kind, optimizer):
    dense = network()
    model, opt, sparsifier = make(kind, optimizer)
    simulated = MaskedRun(dense, OPTIMIZERS[optimizer], sparsifier)
    theirs = simulated.train(range(200))
    ours = train(model, opt, sparsifier, range(200))
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-7, atol=1e-9)
    assert sum(ours[-50:]) < sum(ours[:50])
    for layer, mask in zip(sparsifier.layers, simulated.masks, strict=True):
        assert torch.equal(layer.module.pattern.to_mask().view(-1), mask)
    if kind != "Static":
        assert sparsifier.updates > 3


def test_what_an_update_recorded_goes_without_the_garbage_collector():
    def living():
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    model, opt, sparsifier = make("RigL")
    train(model, opt, sparsifier, range(20))
    gc.collect()
    gc.disable()
    try:
        before = living()
        train(model, opt, sparsifier, range(20, 70))
        assert sparsifier.updates == 7
        assert living() == before
    finally:
        gc.enable()


def test_a_simulation_with_another_rule_is_noticed():
    dense = network()
    model, opt, sparsifier = make("SET")
    simulated = MaskedRun(dense, OPTIMIZERS["sgd_momentum"], sparsifier)
    simulated.kind = "RigL"
    assert abs(simulated.train(range(60))[-1] - train(model, opt, sparsifier, range(60))[-1]) > 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_survivors_keep_value_and_state_and_newcomers_start_at_zero(optimizer):
    model, opt, sparsifier = make("SET", optimizer, schedules.Constant(0.5, every=5))
    train(model, opt, sparsifier, range(4))
    parameters = [layer.module.values for layer in sparsifier.layers]
    loss_of(model, 4).backward()
    opt.step()
    before = [
        (
            x.module.pattern.flat_indices(),
            x.module.values.detach().clone(),
            {
                k: v.clone()
                for k, v in opt.state[x.module.values].items()
                if isinstance(v, torch.Tensor)
            },
        )
        for x in sparsifier.layers
    ]
    assert sparsifier.step()
    for layer, parameter, (old, values, state) in zip(
        sparsifier.layers, parameters, before, strict=True
    ):
        assert layer.module.values is parameter
        assert parameter.grad is None
        assert any(p is parameter for g in opt.param_groups for p in g["params"])
        new = layer.module.pattern.flat_indices()
        stayed, place = torch.isin(new, old), torch.searchsorted(old, new).clamp(max=len(old) - 1)
        assert layer.grown == layer.dropped == int((~stayed).sum())

        def check(now, then, stayed=stayed, place=place):
            assert torch.equal(now[stayed], then[place[stayed]])
            assert bool((now[~stayed] == 0).all())

        check(parameter.detach(), values)
        elements = 0
        for key, then in state.items():
            now = opt.state[parameter][key]
            if then.shape == values.shape:
                elements += 1
                check(now, then)
            else:
                assert torch.equal(now, then), key
        assert elements >= 1
    train(model, opt, sparsifier, range(5, 12))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_dense_model_with_history_keeps_the_state_of_what_stays(optimizer):
    model = network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    for step in range(3):
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()
    weight = model[5].weight
    before = weight.detach().clone().view(-1)
    state = {k: v.clone() for k, v in opt.state[weight].items() if isinstance(v, torch.Tensor)}
    place = [p is weight for g in opt.param_groups for p in g["params"]].index(True)
    sparsifier = sparsetrain.Static(model, opt, 0.8)
    values = model[5].values
    assert opt.param_groups[0]["params"][place] is values
    assert weight not in opt.state
    index = model[5].pattern.flat_indices()
    assert torch.equal(values.detach(), before[index])
    for key, then in state.items():
        expected = then.view(-1)[index] if then.shape == weight.shape else then
        assert torch.equal(opt.state[values][key], expected), key
    train(model, opt, sparsifier, range(3))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    kind=st.sampled_from(["SET", "RigL", "MEST"]),
    widths=st.lists(st.integers(3, 12), min_size=2, max_size=4),
    sparsity=st.floats(0.0, 0.8),
    fraction=st.floats(0.01, 1.0),
    distribution=st.sampled_from(["uniform", "erk", "global"]),
    seed=st.integers(0, 99),
)
def test_nonzeros_are_conserved_for_random_models(
    kind, widths, sparsity, fraction, distribution, seed
):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    opt = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = ALGORITHMS[kind](
            model,
            opt,
            sparsity,
            distribution=distribution,
            seed=seed,
            schedule=schedules.Constant(fraction, every=2),
        )
    counts = [layer.nnz for layer in sparsifier.layers]
    for _ in range(6):
        model(torch.randn(3, widths[0])).square().sum().backward()
        opt.step()
        sparsifier.step()
        opt.zero_grad()
        assert [layer.nnz for layer in sparsifier.layers] == counts
        for layer in sparsifier.layers:
            p = layer.module.pattern
            sparsetrain.SparsePattern(p.crow_indices, p.col_indices, p.shape)  # valid
            assert layer.module.values.shape == (p.nnz,)
    assert sparsifier.updates == 3


@pytest.mark.parametrize("kind", ["GMP", "ACDC"])
def test_it_ends_at_exactly_the_goal(kind):
    model, opt, sparsifier = make(kind, sparsity=0.9)
    assert all(layer.nnz == layer.size for layer in sparsifier.layers)
    train(model, opt, sparsifier, range(200))
    total = sum(layer.size for layer in sparsifier.layers)
    assert sum(layer.nnz for layer in sparsifier.layers) == total - round(0.9 * total)


def test_acdc_is_dense_and_sparse_in_turn_under_the_same_names():
    model, opt, sparsifier = make("ACDC", "adam")
    names = [name for name, _ in model.named_parameters()]
    seen = []
    for step in range(200):
        train(model, opt, sparsifier, range(step, step + 1))
        layer = sparsifier.layers[2]
        seen.append("dense" if layer.nnz == layer.size else "sparse")
        assert opt.state[layer.module.values]["exp_avg"].shape == (layer.nnz,)
        assert [name for name, _ in model.named_parameters()] == names
    phases = [s for i, s in enumerate(seen) if i == 0 or seen[i - 1] != s]
    assert phases == ["dense", "sparse"] * 4


def test_a_layer_with_all_weights_is_computed_as_the_dense_layer_is():
    model = network(dtype=torch.float32)
    reference = copy.deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsetrain.GMP(model, opt, 0.9)
    x, _ = batch(0, torch.float32)
    torch.testing.assert_close(model(x), reference(x))
    few, many = torch.randn(7, 32), torch.randn(4000, 32)
    torch.testing.assert_close(model[5](few), reference[5](few))
    torch.testing.assert_close(model[5](many), reference[5](many))
    values, bias, pattern = model[5].values, model[5].bias, model[5].pattern
    topology = (pattern.crow_indices, pattern.col_indices, pattern.key)
    dense = torch.ops.sparsetrain.linear_dense(many, values, bias, *topology)
    assert torch.equal(dense, reference[5](many))  # the library's own product
    model(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(model[5].values.grad, reference[5].weight.grad.view(-1))


def test_topkast_computes_with_the_forward_set_and_learns_on_the_backward_set():
    model, opt, sparsifier = make("TopKAST", sparsity=0.8, distribution="uniform")
    layer = next(x for x in sparsifier.layers if x.name == "5")
    module, size = layer.module, layer.size
    assert layer.nnz == size - round(0.6 * size)
    assert int(module._active.sum()) == size - round(0.8 * size)
    weight = module.weight.detach()
    assert int((weight != 0).sum()) == int(module._active.sum())
    dense = nn.Linear(32, 24).double()
    dense.load_state_dict({"weight": weight, "bias": module.bias.detach()})
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x), dense(x))
    module(x).square().sum().backward()
    dense(x).square().sum().backward()
    torch.testing.assert_close(module.values.grad, module.pattern.gather(dense.weight.grad))
    assert bool((module.values.grad[~module._active] != 0).any())
    output = model(batch(0)[0])
    sparsifier.finish()
    sparsifier.finish()
    torch.testing.assert_close(model(batch(0)[0]), output)
    assert layer.nnz == size - round(0.8 * size)
    train(model, opt, sparsifier, range(30))
    assert layer.nnz == size - round(0.8 * size)


def test_mest_with_a_soft_bound_exceeds_the_goal_and_returns_to_it():
    model, opt, sparsifier = make("MEST", soft=True)
    goal = sum(layer.goal for layer in sparsifier.layers)
    counts = []
    for step in range(200):
        train(model, opt, sparsifier, range(step, step + 1))
        counts.append(sum(layer.nnz for layer in sparsifier.layers))
    assert max(counts) > 1.2 * goal
    assert counts[-1] == goal


def test_gmp_with_a_global_distribution_ranks_all_layers_together():
    with pytest.warns(UserWarning, match="fewer weights than outputs"):
        model, opt, sparsifier = make("GMP", sparsity=0.9, distribution="global")
    for layer in sparsifier.layers:
        if layer.name == "5":
            layer.module.values.data *= 100
    train(model, opt, sparsifier, range(150))
    by_name = {layer.name: layer.nnz / layer.size for layer in sparsifier.layers}
    assert by_name["5"] > 3 * by_name["2"]
    total = sum(layer.size for layer in sparsifier.layers)
    assert abs(sum(layer.nnz for layer in sparsifier.layers) - 0.1 * total) <= 4


@pytest.mark.parametrize("kind", ["RigL", "GMP", "SET"])
def test_an_already_sparse_model(kind):
    model = sparsetrain.sparsify(network(), 0.5)
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    sparsity = 0.9 if kind == "GMP" else None
    sparsifier = ALGORITHMS[kind](
        model, opt, sparsity, distribution="uniform", schedule=SCHEDULES[kind]
    )
    train(model, opt, sparsifier, range(200))
    for layer in sparsifier.layers:
        share = 0.9 if kind == "GMP" else 0.5
        assert layer.nnz == layer.size - round(share * layer.size)


def test_rigl_adds_up_what_an_accumulated_step_has_seen():
    """Two half batches and a layer that is called twice give what one whole batch gives."""

    def run(parts):
        model = network()
        opt = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier = sparsetrain.RigL(model, opt, 0.7, schedule=schedules.Constant(0.3, every=1))
        for step in range(3):
            x, y = batch(step)
            for i in range(parts):
                rows = slice(i * 8 // parts, (i + 1) * 8 // parts)
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum")
                loss.backward()
            opt.step()
            sparsifier.step()
            opt.zero_grad()
        return [layer.module.pattern for layer in sparsifier.layers]

    assert run(1) == run(2) == run(4)


def test_rigl_leaves_a_layer_alone_that_took_no_part():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsetrain.RigL(
        model, opt, 0.5, distribution="uniform", schedule=schedules.Constant(0.5, every=1)
    )
    model["used"](torch.randn(4, 8)).sum().backward()
    opt.step()
    assert sparsifier.step()
    assert [layer.grown for layer in sparsifier.layers] == [16, 0]


def test_rigl_without_any_gradient_raises_and_changes_nothing():
    _, opt, sparsifier = make("RigL", schedule=schedules.Constant(0.5, every=1))
    patterns = [layer.module.pattern for layer in sparsifier.layers]
    opt.step()
    with pytest.raises(RuntimeError, match="saw no gradient at step 1"):
        sparsifier.step()
    assert sparsifier.steps == 0
    assert all(x.module.pattern is p for x, p in zip(sparsifier.layers, patterns, strict=True))


def test_a_model_copied_or_pickled_at_an_update_step_comes_without_its_recording():
    model, opt, sparsifier = make("RigL", schedule=schedules.Constant(0.5, every=1))
    loss_of(model, 0).backward()
    assert sparsifier.took_part(sparsifier.layers[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0]._recorder is None
        torch.testing.assert_close(other(batch(1)[0]), model(batch(1)[0]))
    opt.step()
    assert sparsifier.step()
    sparsifier.close()
    assert model[0]._recorder is None


@pytest.mark.parametrize("kind", ["RigL", "GMP", "TopKAST"])
def test_it_trains_under_autocast_and_gradient_scaling(kind):
    model = network(dtype=torch.float32)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = ALGORITHMS[kind](model, opt, 0.7, total_steps=40)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses = []
    for step in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step, torch.float32)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        sparsifier.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
    assert sparsifier.updates > 3
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RigL", "GMP", "TopKAST"])
def test_a_compiled_model_follows_each_change(kind):
    torch._dynamo.reset()
    model, opt, sparsifier = make(kind, schedule=None, sparsity=0.7)
    other, other_opt, other_sparsifier = make(kind, schedule=None, sparsity=0.7)
    compiled = torch.compile(model, backend="aot_eager")
    ours = train(compiled, opt, sparsifier, range(22))
    theirs = train(other, other_opt, other_sparsifier, range(22))
    assert sparsifier.updates >= 1
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=1e-9)


def test_a_callback_sees_each_update_and_the_log_is_plain():
    model, opt, sparsifier = make("RigL")
    seen = []
    sparsifier.register_callback(lambda s: seen.append(s.log()))
    train(model, opt, sparsifier, range(60))
    assert [int(entry["sparsity/steps"]) for entry in seen] == [10, 20, 30, 40, 50, 60]
    assert all(isinstance(v, (int, float)) for entry in seen for v in entry.values())
    assert all(entry["sparsity/dropped"] == entry["sparsity/grown"] > 0 for entry in seen)
    rates = [entry["sparsity/itop_rate"] for entry in seen]
    assert rates == sorted(rates)
    assert 0.3 < rates[0] < rates[-1] < 1.0
    overlaps = [entry["sparsity/overlap_with_start"] for entry in seen]
    assert all(0.3 < overlap < 1.0 for overlap in overlaps)
    with pytest.raises(TypeError, match="callback must be callable"):
        sparsifier.register_callback(3)


def test_the_tried_share_and_the_overlap_are_counted_exactly():
    model, opt, sparsifier = make("SET", schedule=schedules.Constant(0.4, every=1))
    start = [x.module.pattern.to_mask() for x in sparsifier.layers]
    tried = [mask.clone() for mask in start]
    for step in range(5):
        train(model, opt, sparsifier, range(step, step + 1))
        for mask, layer in zip(tried, sparsifier.layers, strict=True):
            mask |= layer.module.pattern.to_mask()
    size = sum(mask.numel() for mask in tried)
    assert sparsifier.itop_rate() == sum(int(m.sum()) for m in tried) / size
    both = sum(
        int((m & x.module.pattern.to_mask()).sum())
        for m, x in zip(start, sparsifier.layers, strict=True)
    )
    assert sparsifier.overlap() == both / sum(x.nnz for x in sparsifier.layers)


@pytest.mark.parametrize("rich", [True, False])
def test_the_summary_names_each_layer(rich, monkeypatch):
    model, opt, sparsifier = make("RigL")
    train(model, opt, sparsifier, range(10))
    if not rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    text = sparsifier.summary()
    assert "RigL, step 10, 1 updates" in text
    for layer in sparsifier.layers:
        line = next(line for line in text.splitlines() if f" {layer.name} " in f" {line}")
        assert f"{layer.nnz:,}" in line
        assert "x".join(map(str, layer.module.weight_shape)) in line
    assert "RigL(layers=4" in repr(sparsifier)
