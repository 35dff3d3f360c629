"""Wrong arguments raise an error that names them, and leave everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsetrain
from sparsetrain import SparsePattern
from sparsetrain.nn import SparseConv2d, SparseLinear

BAD_SPARSITIES = [
    (1.0, ValueError, r"\[0, 1\).*got 1.0"),
    (1, ValueError, r"\[0, 1\).*got 1"),
    (-0.1, ValueError, r"got -0.1"),
    (90, ValueError, r"got 90; did you mean 0.9\?"),
    (float("nan"), ValueError, "got nan"),
    (float("inf"), ValueError, "got inf"),
    ("0.9", TypeError, "got '0.9' of type str"),
    (None, TypeError, "of type NoneType"),
    (True, TypeError, "of type bool"),
    (0.5j, TypeError, "of type complex"),
    ([0.9], TypeError, "of type list"),
    (torch.tensor(0.9), TypeError, "of type Tensor"),
]


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SparseLinear(20, 12, sparsity=0.5)


@pytest.mark.parametrize(("value", "error", "message"), BAD_SPARSITIES)
def test_sparsity(value, error, message):
    model = nn.Sequential(nn.Linear(4, 4))
    state = torch.random.get_rng_state()
    for call in (
        lambda: SparseLinear(4, 4, sparsity=value),
        lambda: SparsePattern.random((4, 4), value),
        lambda: sparsetrain.sparsify(model, value, inplace=True),
        lambda: sparsetrain.sparsify(model, 0.5, distribution={"0": value}, inplace=True),
        lambda: sparsetrain.to_sparse(model, min_sparsity=value, inplace=True),
    ):
        with pytest.raises(error, match=message):
            call()
    assert type(model[0]) is nn.Linear
    assert torch.equal(state, torch.random.get_rng_state())


def test_numpy_and_integer_zero_sparsities_are_fine():
    import numpy

    assert SparseLinear(4, 4, sparsity=0).nnz == 16
    assert SparseLinear(4, 4, sparsity=numpy.float32(0.5)).nnz == 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "in_features must be at least 1; got 0"),
        ((4, -1), ValueError, "out_features must be at least 1; got -1"),
        ((4.0, 4), TypeError, "in_features must be an integer"),
        ((4, "4"), TypeError, "out_features must be an integer"),
    ],
)
def test_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        SparseLinear(*arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64])
def test_layer_dtype(dtype):
    with pytest.raises(TypeError, match=f"dtype must be torch.float32.*got {dtype}"):
        SparseLinear(4, 4, dtype=dtype)


def test_layer_device():
    with pytest.raises(ValueError, match=r"device must be 'cpu'.*cuda"):
        SparseLinear(4, 4, device="cuda")


def test_pattern_of_another_shape_or_kind(layer):
    pattern = SparsePattern.random((20, 12), 0.5, seed=0)
    with pytest.raises(ValueError, match=r"shape \(12, 20\).*got \(20, 12\)"):
        SparseLinear(20, 12, pattern=pattern)
    with pytest.raises(TypeError, match=r"SparsePattern\.from_mask.*got Tensor"):
        SparseLinear(20, 12, pattern=torch.ones(12, 20, dtype=torch.bool))
    good = layer.pattern
    before = layer.values.detach().clone()
    for bad_pattern, values, error, message in (
        (pattern, torch.ones(pattern.nnz), ValueError, r"shape \(12, 20\).*got \(20, 12\)"),
        (None, torch.ones(120), TypeError, "SparsePattern"),
        (good, torch.ones(119), ValueError, r"shape \(120,\).*got \(119,\)"),
        (good, torch.ones(1, 120), ValueError, r"got \(1, 120\)"),
        (good, torch.ones(120).int(), TypeError, "floating-point tensor; got torch.int32"),
        (good, [1.0] * 120, TypeError, "got list"),
    ):
        with pytest.raises(error, match=message):
            layer.set_pattern(bad_pattern, values)
        assert layer.pattern is good
        assert torch.equal(layer.values, before)


def test_input_of_another_width_names_both(layer):
    for shape in ((3, 19), (21,), (2, 3, 12), ()):
        with pytest.raises(ValueError, match=r"(?s)(?=.*20)(?=.*input)"):
            layer(torch.ones(shape))
    with pytest.raises(ValueError, match=r"(?s)(?=.*20)(?=.*19)"):
        layer(torch.ones(3, 19))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_integer_or_complex_input(layer, dtype):
    with pytest.raises(TypeError, match=f"input.*{dtype}"):
        layer(torch.ones(3, 20).to(dtype))


def test_input_of_another_floating_dtype_or_no_tensor(layer):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=f"{dtype}"):
            layer(torch.ones(3, 20, dtype=dtype))
    with pytest.raises(TypeError, match="input"):
        layer([[1.0] * 20])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_input_of_another_layout(sparsity):
    for layer, x in (
        (SparseLinear(32, 24, sparsity=sparsity), torch.ones(2, 3, 32)),
        (SparseConv2d(8, 16, 3, sparsity=sparsity), torch.ones(2, 8, 5, 5)),
    ):
        for _ in range(2):
            layer(x)
            for other in (x.to_sparse(), x.to_mkldnn()):
                with pytest.raises(ValueError, match=r"input has the layout .*to_dense\(\)"):
                    layer(other)


def test_input_on_another_device(layer):
    with pytest.raises(ValueError, match="meta"):
        layer(torch.ones(3, 20, device="meta"))


def test_a_half_precision_layer_says_what_it_takes(layer):
    with pytest.raises(TypeError, match=r"float16; a sparse layer takes torch.float32"):
        layer.half()(torch.ones(3, 20).half())


def test_from_dense():
    dense = nn.Linear(20, 12)
    with pytest.raises(TypeError, match=r"torch\.nn\.Linear; got Conv2d"):
        SparseLinear.from_dense(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"mask must have.*\(12, 20\); got \(20, 12\)"):
        SparseLinear.from_dense(dense, torch.ones(20, 12, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        SparseLinear.from_dense(dense, torch.ones(12, 20))
    with pytest.raises(TypeError, match=r"float16.*\.float\(\)"):
        SparseLinear.from_dense(nn.Linear(20, 12, dtype=torch.float16))
    with pytest.raises(ValueError, match="device 'meta'"):
        SparseLinear.from_dense(nn.Linear(20, 12, device="meta"))
