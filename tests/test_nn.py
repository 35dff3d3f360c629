"""SparseLinear as a module: construction, initialisation, conversions, training."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsetrain import SparsePattern
from sparsetrain.nn import SparseLinear


def make(out=12, width=20, sparsity=0.7, seed=0, **kwargs) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(width, out, sparsity=sparsity, **kwargs)


def inputs(*shape, seed=1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(20,), (5, 20), (2, 3, 20), (0, 20), (2, 0, 3, 20)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_that_of_the_masked_weight(shape, bias, dtype):
    layer = make(bias=bias, dtype=dtype)
    x = inputs(*shape, dtype=dtype)
    with torch.no_grad():
        expected = F.linear(
            x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )
        got = layer(x)
    assert got.dtype == dtype
    assert got.shape == (*shape[:-1], 12)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * 20)


def test_constructor_defaults_and_attributes():
    layer = SparseLinear(40, 30)
    assert layer.nnz == layer.values.numel() == 120
    assert layer.sparsity == pytest.approx(0.9)
    assert layer.density == pytest.approx(0.1)
    assert layer.pattern.shape == (30, 40)
    assert layer.bias is not None
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert list(layer.buffers()) == []
    assert layer.values.dtype == torch.get_default_dtype()
    assert repr(layer) == (
        "SparseLinear(in_features=40, out_features=30, bias=True, sparsity=0.9000, nnz=120)"
    )


def test_the_pattern_is_shared_not_copied():
    pattern = SparsePattern.random((12, 20), 0.5, seed=0)
    assert SparseLinear(20, 12, pattern=pattern).pattern is pattern


def test_the_same_seed_gives_the_same_layer():
    one, two = make(seed=3), make(seed=3)
    assert one.pattern == two.pattern
    assert torch.equal(one.values, two.values)


def test_initialisation_follows_the_fan_in_of_each_row():
    counts = [1, 0, 400, 100, 4]
    mask = torch.arange(400) < torch.tensor(counts)[:, None]
    torch.manual_seed(0)
    layer = SparseLinear(400, 5, pattern=SparsePattern.from_mask(mask))
    drawn = {row: [] for row in range(5)}
    biases = []
    for _ in range(10):
        layer.reset_parameters()
        for row in range(5):
            drawn[row].append(layer.weight[row, : counts[row]].detach())
        biases.append(layer.bias.detach().clone())
    for row, count in enumerate(counts):
        bias = torch.stack(biases)[:, row].abs().max()
        if count == 0:
            assert bias == 0
            continue
        bound = 1 / math.sqrt(count)
        assert 0.5 * bound < torch.cat(drawn[row]).abs().max() <= bound
        assert 0.3 * bound < bias <= bound


def test_weight_is_dense_differentiable_and_read_only():
    layer = make()
    weight = layer.weight
    assert weight.shape == (12, 20)
    assert torch.equal(weight != 0, layer.pattern.to_mask())
    weight.sum().backward()
    assert torch.equal(layer.values.grad, torch.ones(layer.nnz))
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.ones(12, 20))


def test_from_dense_keeps_the_nonzeros_and_to_dense_gives_them_back():
    dense = nn.Linear(20, 12)
    with torch.no_grad():
        dense.weight[torch.rand(12, 20) < 0.8] = 0
    layer = SparseLinear.from_dense(dense)
    assert layer.nnz == int((dense.weight != 0).sum())
    back = layer.to_dense()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    x = inputs(6, 20)
    torch.testing.assert_close(layer(x), dense(x))
    # Independent copies, all of them.
    with torch.no_grad():
        layer.values.zero_()
        layer.bias.zero_()
    assert dense.weight.abs().sum() > 0
    assert dense.bias.abs().sum() > 0
    assert back.bias.abs().sum() > 0


def test_from_dense_with_a_mask_keeps_zeros_inside_it():
    dense = nn.Linear(4, 3)
    mask = torch.eye(3, 4, dtype=torch.bool)
    with torch.no_grad():
        dense.weight[0, 0] = 0
    layer = SparseLinear.from_dense(dense, mask)
    assert torch.equal(layer.pattern.to_mask(), mask)
    assert torch.equal(layer.weight, dense.weight * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_flags_go_over_both_ways(dtype, bias):
    dense = nn.Linear(8, 6, bias=bias, dtype=dtype).eval()
    dense.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = SparseLinear.from_dense(dense)
    back = layer.to_dense()
    assert torch.equal(state, torch.random.get_rng_state())
    for made in (layer, back):
        assert not made.training
        assert all(p.dtype == dtype for p in made.parameters())
        assert (made.bias is not None) == bias
        assert made.bias is None or made.bias.requires_grad
    assert not layer.values.requires_grad
    assert not back.weight.requires_grad


def test_pruned_layer_is_read_through_its_mask():
    dense = nn.Linear(20, 12)
    nn.utils.prune.l1_unstructured(dense, "weight", amount=0.8)
    with torch.no_grad():  # trained since: the plain attribute `weight` is stale now
        dense.weight_orig.add_(1.0)
        kept = dense.weight_mask.nonzero()[0]
        dense.weight_orig[tuple(kept)] = 0.0
    layer = SparseLinear.from_dense(dense)
    assert torch.equal(layer.pattern.to_mask(), dense.weight_mask.bool())
    assert torch.equal(layer.weight, dense.weight_orig * dense.weight_mask)


def test_dtype_conversions_leave_the_indices_alone():
    layer = make()
    pattern, values = layer.pattern, layer.values
    original = values.detach().clone()
    for convert, dtype in (
        (layer.double, torch.float64),
        (layer.bfloat16, torch.bfloat16),
        (layer.half, torch.float16),
        (layer.float, torch.float32),
        (lambda: layer.type(torch.float64), torch.float64),
        (lambda: layer.to(torch.float32), torch.float32),
    ):
        convert()
        assert layer.values is values
        assert values.dtype == layer.bias.dtype == dtype
        assert layer.pattern is pattern
        assert pattern.crow_indices.dtype == pattern.col_indices.dtype == torch.int32
        if dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert layer(inputs(3, 20, dtype=dtype)).dtype == dtype
    torch.testing.assert_close(values.detach(), original, rtol=0.01, atol=0)


def test_meta_device():
    layer = make()
    with torch.device("meta"):
        empty = SparseLinear(20, 12, sparsity=0.5)
    assert empty.values.is_meta
    assert SparseLinear(20, 12, device="meta").values.is_meta
    filled = copy.deepcopy(empty).to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    x = inputs(3, 20)
    for other in (filled, assigned):
        assert other.pattern == layer.pattern
        assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match=r'"values".*to_empty\(device="cpu"\).*assign=True'):
        empty.load_state_dict(layer.state_dict())
    filled.reset_parameters()
    assert filled.values.isfinite().all()


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(duplicate):
    layer = make().eval()
    layer.note = "kept"
    other = duplicate(layer)
    x = inputs(4, 20)
    assert torch.equal(other(x), layer(x))
    assert other.pattern == layer.pattern
    assert other.note == "kept"
    assert not other.training
    with torch.no_grad():
        other.values.zero_()
    assert layer.values.abs().sum() > 0
    other.set_pattern(SparsePattern.random((12, 20), 0.5, seed=9), torch.ones(120))
    assert layer.pattern != other.pattern
    assert torch.equal(layer(x), make()(x))


def test_shallow_copy_computes_the_same():
    layer = make()
    x = inputs(4, 20)
    assert torch.equal(copy.copy(layer)(x), layer(x))


def test_hooks_run():
    layer = make()
    seen = []
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_hook(lambda m, a, o: seen.append("forward"))
    layer.register_full_backward_hook(lambda m, i, o: seen.append("backward"))
    layer.values.register_hook(lambda g: seen.append("values"))
    layer(inputs(3, 20).requires_grad_()).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "values"]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.001),
    ],
)
def test_training_is_that_of_masked_dense_layers(optimizer):
    torch.manual_seed(0)
    sparse = nn.Sequential(
        SparseLinear(20, 16, sparsity=0.6), nn.Tanh(), SparseLinear(16, 3, sparsity=0.5)
    ).double()
    dense = nn.Sequential(sparse[0].to_dense(), nn.Tanh(), sparse[2].to_dense())
    masks = [m.pattern.to_mask() for m in (sparse[0], sparse[2])]
    sparse_steps, dense_steps = optimizer(sparse.parameters()), optimizer(dense.parameters())
    x, y = inputs(32, 20, dtype=torch.float64), inputs(32, 3, seed=2, dtype=torch.float64)
    for _ in range(30):
        losses = []
        for model, steps in ((sparse, sparse_steps), (dense, dense_steps)):
            steps.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            if model is dense:
                for layer, mask in zip((dense[0], dense[2]), masks, strict=True):
                    layer.weight.grad.mul_(mask)
            steps.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    for sparse_layer, dense_layer in ((sparse[0], dense[0]), (sparse[2], dense[2])):
        torch.testing.assert_close(sparse_layer.weight, dense_layer.weight)
        torch.testing.assert_close(sparse_layer.bias, dense_layer.bias)


def test_set_pattern_keeps_the_parameter_and_the_optimizer():
    layer = make()
    values = layer.values
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    keep_alive = layer(inputs(3, 20)).sum()  # holds the old gradient accumulator
    keep_alive.backward(retain_graph=True)
    pattern = SparsePattern.random((12, 20), 0.2, seed=5)
    layer.set_pattern(pattern, torch.ones(pattern.nnz, dtype=torch.float64))
    assert layer.values is values
    assert layer.pattern is pattern
    assert values.grad is None
    assert (values.dtype, values.shape) == (torch.float32, (pattern.nnz,))
    layer(inputs(3, 20)).sum().backward()
    assert values.grad.shape == (pattern.nnz,)
    before = values.detach().clone()
    optimizer.step()
    assert not torch.equal(before, values)
    del keep_alive


def test_set_pattern_copies_and_keeps_a_frozen_layer_frozen():
    layer = make()
    layer.values.requires_grad_(False)
    given = torch.ones(120)
    layer.set_pattern(SparsePattern.random((12, 20), 0.5, seed=5), given)
    given.zero_()
    assert layer.values.sum() == 120
    assert not layer.values.requires_grad


def test_a_layer_without_any_weight():
    layer = SparseLinear(20, 12, pattern=SparsePattern.from_mask(torch.zeros(12, 20).bool()))
    out = layer(inputs(3, 20).requires_grad_())
    assert torch.equal(out, layer.bias.expand(3, 12))
    out.sum().backward()
    assert layer.values.grad.shape == (0,)


def test_inside_attention_layers_that_read_the_weight():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    expected = copy.deepcopy(block)
    block.linear1 = SparseLinear.from_dense(block.linear1)
    x = inputs(2, 5, 16)
    torch.testing.assert_close(block(x), expected(x))
    with torch.no_grad():  # the fused path takes linear1.weight
        torch.testing.assert_close(block(x), expected(x))


def test_more_rows_than_16_bits_count_in_several_blocks() -> None:
    """The transposed values of such a layer have no table of places: they are found by counting."""
    layer = SparseLinear(24, 70_000, bias=False, sparsity=0.9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (9, 24), generator=generator).float().requires_grad_()
    grad = torch.randint(-3, 4, (9, 70_000), generator=generator).float()
    with torch.no_grad():
        layer.values.copy_(torch.randint(-3, 4, (layer.nnz,), generator=generator))
    torch.use_deterministic_algorithms(True)  # the sparse kernels, whatever a plan would say
    try:
        layer(x).backward(grad)
    finally:
        torch.use_deterministic_algorithms(False)
    weight = layer.weight.detach()
    assert torch.equal(x.grad, grad @ weight)  # small integers: exact in any order
    expected = layer.pattern.gather(grad.t() @ x.detach())
    assert torch.equal(layer.values.grad, expected)
