"""Changing patterns, and finding places for newcomers: against plain dense masks."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

import sparsetrain
from helpers import MASKS
from sparsetrain.pattern import SparsePattern
from sparsetrain.sparsify import _growth, _monitor, keep_top
from sparsetrain.sparsify._growth import gradient_at, strongest_inactive
from sparsetrain.sparsify._optimizer import gather
from sparsetrain.sparsify._topology import (
    change_pattern,
    full_pattern,
    inactive_count,
    random_inactive,
)
from sparsify_cases import network

EMPTY = torch.empty(0, dtype=torch.int64)


def exact_change(pattern, drop, grown):
    """The same by a dense table of where each weight was."""
    table = torch.full((pattern.shape[0] * pattern.shape[1],), -2)
    flat = pattern.flat_indices()
    table[flat[~drop]] = torch.arange(pattern.nnz)[~drop]
    table[grown] = -1
    mask = (table != -2).view(pattern.shape)
    return SparsePattern.from_mask(mask), table[table != -2]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 33)])
def test_change_pattern(kind, shape):
    pattern = SparsePattern.from_mask(MASKS[kind](*shape))
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.4, 1.0):
        drop = torch.rand(pattern.nnz, generator=generator) < share
        free = ~pattern.to_mask().view(-1)
        free[pattern.flat_indices()[drop]] = True
        grown = (free & (torch.rand(free.shape, generator=generator) < 0.3)).nonzero().squeeze(1)
        new, source = change_pattern(pattern, drop, grown)
        expected, where = exact_change(pattern, drop, grown)
        assert new == expected
        assert torch.equal(source.long(), where)
        SparsePattern(new.crow_indices, new.col_indices, new.shape)
        values = torch.randn(pattern.nnz)
        moved = gather(values, source)
        assert torch.equal(moved[source >= 0], values[source[source >= 0].long()])
        assert bool((moved[source < 0] == 0).all())


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(rows=st.integers(1, 20), cols=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_change_pattern_of_random_patterns(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    pattern = SparsePattern.from_mask(torch.rand(rows, cols, generator=generator) < 0.4)
    drop = torch.rand(pattern.nnz, generator=generator) < 0.5
    count = int(torch.randint(inactive_count(pattern) + 1, (), generator=generator))
    grown = random_inactive(pattern, count, generator)
    new, source = change_pattern(pattern, drop, grown)
    expected, where = exact_change(pattern, drop, grown)
    assert new == expected
    assert torch.equal(source.long(), where)


def test_change_pattern_passes_opcheck():
    pattern = SparsePattern.from_mask(torch.rand(9, 8) < 0.5)
    drop = torch.zeros(pattern.nnz, dtype=torch.bool)
    args = (pattern.crow_indices, pattern.col_indices, 8, drop, EMPTY)
    torch.library.opcheck(torch.ops.sparsetrain.change_pattern.default, args)


def test_change_pattern_refuses_what_does_not_fit():
    pattern = SparsePattern.from_mask(torch.tensor([[True, False], [False, True]]))
    keep = torch.zeros(2, dtype=torch.bool)
    for drop, grown, message in [
        (keep, torch.tensor([0]), r"grown\[0\] = 0 is a weight that exists"),
        (keep, torch.tensor([2, 1]), r"grown\[1\] = 1 is not above the one before"),
        (keep, torch.tensor([1, 1]), r"grown\[1\] = 1 is not above the one before"),
        (keep, torch.tensor([4]), r"grown\[0\] = 4 is outside the weight"),
        (keep, torch.tensor([-1]), r"grown\[0\] = -1 is outside the weight"),
        (keep[:1], EMPTY, "drop has 1 entries, expected 2"),
        (keep.int(), EMPTY, "drop must be bool"),
        (keep, EMPTY.int(), "grown must be int64"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            change_pattern(pattern, drop, grown)


@pytest.mark.parametrize("kind", MASKS)
def test_random_inactive_places_are_free_distinct_and_reproducible(kind):
    pattern = SparsePattern.from_mask(MASKS[kind](30, 21))
    free = inactive_count(pattern)
    for count in {0, min(1, free), free // 10, free // 2, free}:
        drawn = [
            random_inactive(pattern, count, torch.Generator().manual_seed(5)) for _ in range(2)
        ]
        assert torch.equal(*drawn)
        assert drawn[0].numel() == count
        assert bool((drawn[0].diff() > 0).all())
        assert not bool(pattern.to_mask().view(-1)[drawn[0]].any())
    with pytest.raises(ValueError, match="count must be between"):
        random_inactive(pattern, free + 1, torch.Generator())


def test_random_inactive_is_uniform():
    pattern = SparsePattern.random((10, 10), 0.7, seed=1)
    free = inactive_count(pattern)
    generator = torch.Generator().manual_seed(2)
    for count in (free // 5, free // 2):  # both ways of drawing
        hits = torch.zeros(100)
        for _ in range(2000):
            hits[random_inactive(pattern, count, generator)] += 1
        share = hits[~pattern.to_mask().view(-1)] / 2000
        deviation = (count / free * (1 - count / free) / 2000) ** 0.5
        assert float((share - count / free).abs().max()) < 4.5 * deviation


def test_full_pattern():
    assert full_pattern((3, 5)) == SparsePattern.from_mask(torch.ones(3, 5, dtype=torch.bool))


@hypothesis.settings(deadline=None)
@hypothesis.given(rows=st.integers(1, 9), cols=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_packed_masks_count_and_grow_as_dense_ones_do(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    tried, new = (torch.rand(2, rows, cols, generator=generator) < 0.2).unbind()
    grown = new & ~tried & (torch.rand(rows, cols, generator=generator) < 0.3)
    pattern = SparsePattern.from_mask(new)
    bits = _monitor.pack(SparsePattern.from_mask(tried))
    assert _monitor.count(bits) == int(tried.sum())
    assert _monitor.shared(bits, pattern) == int((tried & new).sum())
    tried |= new & ~grown
    bits = _monitor.pack(SparsePattern.from_mask(tried))
    _monitor.extend(bits, pattern, pattern.gather(grown.float()).nonzero().squeeze(1))
    assert torch.equal(bits, _monitor.pack(SparsePattern.from_mask(tried | new)))


LAYERS = {
    "linear": (lambda: nn.Linear(7, 11), (5, 7)),
    "linear_of_sequences": (lambda: nn.Linear(7, 11), (2, 3, 7)),
    "linear_of_a_vector": (lambda: nn.Linear(7, 11), (7,)),
    "linear_of_nothing": (lambda: nn.Linear(7, 11), (0, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, dilation=2), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (3, 4, 9, 8)),
    "conv2d_without_batch": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), (3, 4, 5, 5)),
    "conv2d_groups": (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "conv2d_circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (2, 4, 5, 5),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("chunk", [1, 300, 1 << 22])
@pytest.mark.parametrize("name", LAYERS)
def test_growth_finds_the_largest_dense_gradients(name, chunk, monkeypatch):
    monkeypatch.setattr(_growth, "CHUNK_BYTES", chunk)
    torch.manual_seed(3)
    build, shape = LAYERS[name]
    dense = build().double()
    layer = sparsetrain.sparsify(nn.Sequential(dense), 0.7)[0]
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    recording = layer._recorder = _growth.Recording()
    for _ in range(2):  # two calls in one step add up
        x = torch.randn(shape, dtype=torch.float64)
        layer(x).pow(2).sum().backward()
        dense(x).pow(2).sum().backward()
    gradient = dense.weight.grad.view(-1)
    free = ~layer.pattern.to_mask().view(-1)
    for count in (0, 1, 5, int(free.sum())):
        found = strongest_inactive(layer, recording.calls, count)
        expected = keep_top(torch.where(free, gradient.abs(), -1.0), count).nonzero().squeeze(1)
        assert torch.equal(found, expected)
        torch.testing.assert_close(
            gradient_at(layer, recording.calls, found), gradient[found], rtol=1e-9, atol=1e-9
        )


def test_growth_among_equals_takes_the_lowest_position_and_nan_counts_as_zero(monkeypatch):
    monkeypatch.setattr(_growth, "CHUNK_BYTES", 16)
    layer = sparsetrain.nn.SparseLinear(
        4,
        6,
        pattern=SparsePattern.from_mask(torch.eye(6, 4, dtype=torch.bool)),
        dtype=torch.float64,
    )
    ones = torch.ones(1, 4, dtype=torch.float64)
    grad = torch.ones(1, 6, dtype=torch.float64)
    assert strongest_inactive(layer, [(ones, grad)], 5).tolist() == [1, 2, 3, 4, 6]
    grad[0, 0] = float("nan")
    assert strongest_inactive(layer, [(ones, grad)], 5).tolist() == [4, 6, 7, 8, 9]


def test_growth_never_holds_a_whole_dense_gradient():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    Largest.size = max(Largest.size, t.untyped_storage().nbytes())
            return result

    layer = sparsetrain.nn.SparseLinear(2048, 4096, sparsity=0.99)  # 32 MiB if it were dense
    x, grad = torch.randn(4, 2048), torch.randn(4, 4096)
    with Largest():
        strongest_inactive(layer, [(x, grad)], layer.nnz // 3)
    assert 0 < Largest.size <= 2 * _growth.CHUNK_BYTES


def test_the_checkpointed_layer_is_recorded_once():
    from torch.utils.checkpoint import checkpoint

    model = network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sparsetrain.RigL(
        model, opt, 0.7, schedule=sparsetrain.schedules.Constant(0.3, every=1)
    )
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    for reentrant in (False, True):
        calls = model[0]._recorder.calls
        calls.clear()
        checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).sum().backward()
        assert len(calls) == 1
    sparsifier.close()
