"""Stopping and going on: bitwise the same training, for every algorithm and at every moment."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import sparsetrain
from sparsetrain import schedules
from sparsify_cases import ALGORITHMS, OPTIMIZERS, batch, network, train

EVERY = 6
SCHEDULES = {
    "Static": schedules.Never(),
    "SET": schedules.Constant(0.3, every=EVERY),
    "RigL": schedules.Cosine(0.3, every=EVERY, stop=40),
    "MEST": schedules.Cosine(0.3, every=EVERY, stop=40),
    "GMP": schedules.Cubic(every=EVERY, stop=30),
    "ACDC": schedules.Periodic(warmup=5, dense=7, sparse=6, stop=36),
    "TopKAST": schedules.Constant(0.3, every=EVERY, stop=30),
}


def make(kind, optimizer="adam", **options):
    model = network(dtype=torch.float32)
    opt = OPTIMIZERS[optimizer](model.parameters())
    options = {"schedule": SCHEDULES[kind], **options}
    return model, opt, ALGORITHMS[kind](model, opt, 0.7, **options)


def run(model, opt, sparsifier, steps):
    return train(model, opt, sparsifier, steps, torch.float32)


def everything(model, opt, sparsifier):
    return {
        "model": model.state_dict(),
        "optimizer": opt.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Steps before an update, right after one, in between, and in an ACDC phase of either kind.
@pytest.mark.parametrize("stop", [0, 5, 6, 9, 17, 33])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_resumed_is_bitwise_the_same_as_uninterrupted(kind, stop):
    whole = make(kind)
    losses = run(*whole, range(44))
    first = make(kind)
    run(*first, range(stop))
    file = io.BytesIO()
    torch.save(everything(*first), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, opt, sparsifier = second = make(kind)
    sparsetrain.load_state_dict(model, saved["model"])
    opt.load_state_dict(saved["optimizer"])
    sparsifier.load_state_dict(saved["sparsifier"])
    assert same(everything(*second), saved)
    assert run(*second, range(stop, 44)) == losses[stop:]
    assert same(everything(*second), everything(*whole))


@pytest.mark.parametrize("optimizer", ["sgd_momentum", "adam_fused", "adagrad"])
def test_resumed_with_other_optimizers(optimizer):
    whole = make("RigL", optimizer)
    losses = run(*whole, range(30))
    first = make("RigL", optimizer)
    run(*first, range(13))
    saved = copy.deepcopy(everything(*first))
    model, opt, sparsifier = second = make("RigL", optimizer)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    sparsifier.load_state_dict(saved["sparsifier"])
    assert run(*second, range(13, 30)) == losses[13:]


def test_another_seed_gives_another_topology():
    patterns = [make("SET", seed=seed)[2].layers[2].module.pattern for seed in (0, 0, 1)]
    assert patterns[0] == patterns[1] != patterns[2]


def refused(sparsifier, state, message):
    before = copy.deepcopy(sparsifier.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(state)
    assert same(sparsifier.state_dict(), before)


def test_a_state_that_does_not_fit_changes_nothing():
    model, opt, sparsifier = make("RigL")
    run(model, opt, sparsifier, range(13))
    state = sparsifier.state_dict()
    refused(make("SET", schedule=SCHEDULES["RigL"])[2], state, "algorithm RigL, this is SET")
    refused(make("RigL", schedule=schedules.Cosine())[2], state, "is of schedule Cosine")
    refused(make("RigL")[2], state, "load the model's state_dict")
    refused(make("RigL", exclude="5")[2], state, "another model: layer 5 has shape")
    refused(make("RigL")[2], {"steps": 3}, "no sparsifier's: it lacks algorithm")
    refused(make("RigL")[2], opt.state_dict(), "no sparsifier's")
    with pytest.raises(TypeError, match="state_dict must be a sparsifier's; got NoneType"):
        sparsifier.load_state_dict(None)


def test_the_state_is_no_view_of_what_goes_on():
    model, opt, sparsifier = made = make("TopKAST")
    run(*made, range(8))
    state = everything(*made)
    kept = copy.deepcopy(state)
    run(*made, range(8, 20))
    assert same(state["sparsifier"], kept["sparsifier"])
    assert model(batch(0, torch.float32)[0]).isfinite().all()
    assert opt.state
    assert sparsifier.steps == 20
