"""SparsePattern: construction, invariants, identity, and what it gives out."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain import SparsePattern
from sparsetrain.pattern import nonzeros_for

masks = st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32), st.floats(0, 1)).map(
    lambda t: torch.rand(t[0], t[1], generator=torch.Generator().manual_seed(t[2])) < t[3]
)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_mask_round_trip_transpose_and_scatter(mask):
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.to_mask(), mask)
    assert pattern.nnz == int(mask.sum())
    assert pattern.row_counts().tolist() == mask.sum(1).tolist()
    # Independent construction through torch's own CSR.
    csr = mask.float().to_sparse_csr()
    assert pattern.crow_indices.tolist() == csr.crow_indices().tolist()
    assert pattern.col_indices.tolist() == csr.col_indices().tolist()
    again = SparsePattern(pattern.crow_indices, pattern.col_indices, pattern.shape)
    assert again == pattern

    values = torch.arange(1.0, pattern.nnz + 1)
    dense = pattern.dense(values)
    assert torch.equal(dense != 0, mask)
    assert torch.equal(pattern.gather(dense), values)
    transposed, perm = pattern.transpose()
    assert perm.dtype == torch.int32
    assert torch.equal(transposed.dense(values[perm]), dense.T)
    assert transposed.transpose()[0] == pattern


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 1000),
)
def test_random_has_exactly_the_asked_nonzeros(rows, cols, sparsity, seed):
    pattern = SparsePattern.random((rows, cols), sparsity, seed=seed)
    assert pattern.nnz == max(1, rows * cols - round(sparsity * rows * cols))
    assert pattern.nnz == nonzeros_for(rows * cols, sparsity)
    assert pattern == SparsePattern.random((rows, cols), sparsity, seed=seed)


def test_random_seeds_and_generators():
    first = SparsePattern.random((50, 40), 0.5, seed=1)
    assert first != SparsePattern.random((50, 40), 0.5, seed=2)
    assert first == SparsePattern.random((50, 40), 0.5, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    assert first == SparsePattern.random((50, 40), 0.5)
    state = torch.random.get_rng_state()
    SparsePattern.random((50, 40), 0.5, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_random_is_uniform_over_positions():
    total = sum(SparsePattern.random((4, 5), 0.8, seed=s).to_mask().double() for s in range(300))
    assert (total / 300 - 0.2).abs().max() < 5 * (0.2 * 0.8 / 300) ** 0.5


def test_from_dense_keeps_what_is_not_zero():
    weight = torch.tensor([[0.0, -0.0, 1.0], [float("nan"), 0.0, -2.0]])
    assert SparsePattern.from_dense(weight).to_mask().tolist() == [
        [False, False, True],
        [True, False, True],
    ]


def test_a_convolution_weight_is_flattened():
    mask = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    pattern = SparsePattern.from_mask(mask)
    assert pattern.shape == (4, 12)
    assert torch.equal(pattern.to_mask(), mask.reshape(4, -1))
    assert pattern == SparsePattern(pattern.crow_indices, pattern.col_indices, mask.shape)
    dense = torch.randn(4, 3, 2, 2)
    assert torch.equal(pattern.gather(dense), dense[mask])


def test_strided_masks():
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(SparsePattern.from_mask(mask.T).to_mask(), mask.T)
    assert torch.equal(SparsePattern.from_mask(mask[::2, 1::3]).to_mask(), mask[::2, 1::3])


def test_counts():
    pattern = SparsePattern.from_mask(torch.eye(4, 5, dtype=torch.bool))
    assert (pattern.nnz, pattern.shape) == (4, (4, 5))
    assert pattern.density == pytest.approx(0.2)
    assert pattern.sparsity == pytest.approx(0.8)
    assert repr(pattern) == "SparsePattern(shape=(4, 5), nnz=4, sparsity=0.8000)"


def test_equality_and_hash():
    mask = torch.eye(3, dtype=torch.bool)
    one, two = SparsePattern.from_mask(mask), SparsePattern.from_mask(mask)
    assert one == two
    assert hash(one) == hash(two)
    assert one != SparsePattern.from_mask(mask.flip(0))
    assert one != SparsePattern.from_mask(torch.eye(3, 4, dtype=torch.bool))
    assert one != "pattern"


def test_each_pattern_has_its_own_key():
    mask = torch.eye(3, dtype=torch.bool)
    keys = [SparsePattern.from_mask(mask).key for _ in range(5)]
    assert all(key.dtype == torch.int64 and key.shape == (1,) for key in keys)
    assert len({int(key) for key in keys}) == 5
    assert min(int(key) for key in keys) > 0


def test_the_given_indices_are_copied():
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    pattern = SparsePattern(crow, col, (2, 2))
    col.fill_(7)
    assert pattern.col_indices.tolist() == [0, 1]


def test_int64_indices_are_narrowed():
    pattern = SparsePattern(torch.tensor([0, 1, 2]), torch.tensor([1, 0]), (2, 2))
    assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32


def test_immutable():
    pattern = SparsePattern.random((3, 3), 0.5, seed=0)
    with pytest.raises(AttributeError, match="immutable"):
        pattern.shape = (9, 9)
    with pytest.raises(AttributeError, match="immutable"):
        del pattern.key


def test_copies_share_and_pickles_are_equal():
    pattern = SparsePattern.random((7, 5), 0.5, seed=0)
    assert copy.copy(pattern) is pattern
    assert copy.deepcopy(pattern) is pattern
    loaded = pickle.loads(pickle.dumps(pattern))
    assert loaded == pattern
    assert int(loaded.key) != int(pattern.key)


def test_a_dead_pattern_drops_its_plan():
    pattern = SparsePattern.random((64, 64), 0.5, seed=0)
    key, crow, col = pattern.key, pattern.crow_indices, pattern.col_indices
    torch.ops.sparsetrain.linear(torch.ones(2, 64), torch.ones(pattern.nnz), None, crow, col, key)
    assert torch.ops.sparsetrain.plan_bytes(key) > 0
    del pattern
    gc.collect()
    assert torch.ops.sparsetrain.plan_bytes(key) == 0


def test_made_under_inference_mode_or_another_default_device():
    with torch.inference_mode():
        pattern = SparsePattern.from_mask(torch.eye(3, dtype=torch.bool))
        copied = SparsePattern(torch.tensor([0, 1]), torch.tensor([0]), (1, 1))
    for made in (pattern, copied):
        assert not made.crow_indices.is_inference()
        assert not made.col_indices.is_inference()
    with torch.device("meta"):
        assert SparsePattern.random((3, 3), 0.5, seed=0).crow_indices.is_cpu


def test_scatter_and_gather_are_differentiable():
    pattern = SparsePattern.random((4, 5), 0.5, seed=0)
    values = torch.randn(pattern.nnz, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pattern.dense, values)
    assert torch.autograd.gradcheck(pattern.gather, dense)


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([1, 1, 2], [0, 1], r"start with 0; got 1"),
        ([0, 2, 1], [0], r"not decrease; entry 1 is 2 and entry 2 is 1"),
        ([0, 100000, 2], [0, 1], r"not decrease; entry 1 is 100000"),
        ([0, -5, 2], [0, 1], r"not decrease; entry 0 is 0 and entry 1 is -5"),
        ([0, 1, 3], [0, 1], r"end with the number of col_indices, 2; got 3"),
        ([0, 1, 1], [0, 1], r"end with the number of col_indices, 2; got 1"),
        ([0, 1, 2], [0, 3], r"col_indices\[1\] is 3, out of range: takes 0 to 2"),
        ([0, 1, 2], [-1, 0], r"col_indices\[0\] is -1, out of range"),
        ([0, 1, 2], [0, 2**31 - 1], r"col_indices\[1\] is 2147483647, out of range"),
        ([0, 2, 2], [2, 0], r"sorted inside a row; entry 1 is 0 after 2"),
        ([0, 2, 2], [1, 1], r"col_indices\[1\] = 1 is a duplicate"),
        ([0, 2], [0, 1], r"rows \+ 1 = 3 entries.*got 2"),
        ([], [], r"rows \+ 1 = 3 entries.*got 0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_invalid_indices_raise(crow, col, message, dtype):
    with pytest.raises(ValueError, match=message):
        SparsePattern(torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype), (2, 3))


@pytest.mark.parametrize(
    ("crow", "col", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([0]), TypeError, "crow_indices must be int32"),
        (torch.tensor([0, 1]), torch.tensor([float("nan")]), TypeError, "col_indices must be int3"),
        (torch.tensor([False, True]), torch.tensor([0]), TypeError, "crow_indices.*bool"),
        ([0, 1], torch.tensor([0]), TypeError, "crow_indices must be an int32 tensor; got list"),
        (torch.tensor([[0, 1]]), torch.tensor([0]), ValueError, "one dimension"),
        (torch.tensor(0), torch.tensor([0]), ValueError, "one dimension"),
        (torch.tensor([0, 2**40]), torch.tensor([0]), ValueError, "holds 1099511627776"),
        (torch.tensor([0, 1]), torch.tensor([-(2**40)]), ValueError, "col_indices holds -109951"),
        (torch.empty(2, dtype=torch.int32, device="meta"), torch.tensor([0]), TypeError, "meta"),
        (torch.tensor([0, 1]).to_sparse(), torch.tensor([0]), TypeError, "layout"),
    ],
)
def test_indices_of_a_wrong_kind_raise(crow, col, error, message):
    with pytest.raises(error, match=message):
        SparsePattern(crow, col, (1, 3))


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        ((3,), ValueError, "two dimensions"),
        ((3, -1), ValueError, "none negative"),
        ((3, 2.0), TypeError, "integers"),
        ("33", TypeError, "sequence of integers"),
        (9, TypeError, "sequence of integers"),
        ((2, 2**31), ValueError, "too large"),
    ],
)
def test_a_wrong_shape_raises(shape, error, message):
    with pytest.raises(error, match=message):
        SparsePattern.random(shape, 0.5)


def test_wrong_masks_raise():
    with pytest.raises(TypeError, match=r"bool tensor; got a torch.float32 tensor.*mask != 0"):
        SparsePattern.from_mask(torch.ones(2, 2))
    with pytest.raises(TypeError, match="got a list"):
        SparsePattern.from_mask([[True]])
    with pytest.raises(ValueError, match="two dimensions"):
        SparsePattern.from_mask(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="meta"):
        SparsePattern.from_mask(torch.ones(3, 3, dtype=torch.bool, device="meta"))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        SparsePattern.from_dense([[1.0]])
    with pytest.raises(ValueError, match="either generator or seed"):
        SparsePattern.random((2, 2), 0.5, seed=0, generator=torch.Generator())


def test_wrong_lengths_raise():
    pattern = SparsePattern.random((4, 5), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"shape \(10,\).*got \(9,\)"):
        pattern.dense(torch.ones(9))
    with pytest.raises(ValueError, match=r"shape \(4, 5\).*got \(5, 4\)"):
        pattern.gather(torch.ones(5, 4))
