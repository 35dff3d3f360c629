"""Wrong arguments of convolutions raise an error that names them, and leave all as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsetrain import SparsePattern, sparse_conv, sparsify
from sparsetrain.nn import SparseConv1d, SparseConv2d, SparseConv3d


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SparseConv2d(6, 8, 3, padding=1, sparsity=0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 4, 3), {}, ValueError, "in_channels must be at least 1.*got 0"),
        ((4, -1, 3), {}, ValueError, "out_channels must be at least 1.*got -1"),
        ((4.0, 4, 3), {}, TypeError, "in_channels must be an integer.*4.0.*float"),
        ((4, "4", 3), {}, TypeError, "out_channels must be an integer.*str"),
        ((4, 4, 0), {}, ValueError, "kernel_size must be at least 1.*got 0"),
        ((4, 4, (3, 3, 3)), {}, ValueError, r"kernel_size.*tuple of 2; got \(3, 3, 3\)"),
        ((4, 4, (3,)), {}, ValueError, "kernel_size.*tuple of 2"),
        ((4, 4, 2.5), {}, TypeError, "kernel_size.*2.5 of type float"),
        ((4, 4, True), {}, TypeError, "kernel_size.*True of type bool"),
        ((4, 4, None), {}, TypeError, "kernel_size.*NoneType"),
        ((4, 4, 3), {"stride": 0}, ValueError, "stride must be at least 1.*got 0"),
        ((4, 4, 3), {"stride": (1, 2, 3)}, ValueError, "stride must be.*tuple of 2"),
        ((4, 4, 3), {"padding": -1}, ValueError, "padding must be at least 0.*got -1"),
        ((4, 4, 3), {"padding": "full"}, ValueError, "'same' or 'valid'; got 'full'"),
        ((4, 4, 3), {"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
        ((4, 4, 3), {"dilation": 0}, ValueError, "dilation must be at least 1"),
        ((4, 4, 3), {"groups": 0}, ValueError, "groups must be at least 1.*got 0"),
        ((4, 4, 3), {"groups": 1.5}, TypeError, "groups must be an integer"),
        ((6, 4, 3), {"groups": 4}, ValueError, "groups = 4 does not divide in_channels = 6"),
        ((4, 6, 3), {"groups": 4}, ValueError, "groups = 4 does not divide out_channels = 6"),
        ((4, 4, 3), {"padding_mode": "mirror"}, ValueError, "padding_mode.*'zeros'.*got 'mirror'"),
        ((4, 4, 3), {"padding_mode": None}, ValueError, "padding_mode.*got None"),
        ((4, 4, 3), {"sparsity": float("nan")}, ValueError, r"sparsity.*\[0, 1\).*got nan"),
        ((4, 4, 3), {"sparsity": 1.0}, ValueError, r"sparsity.*\[0, 1\).*got 1.0"),
        ((4, 4, 3), {"sparsity": "0.9"}, TypeError, "sparsity.*of type str"),
        ((4, 4, 3), {"dtype": torch.float16}, TypeError, "dtype must be.*got torch.float16"),
        ((4, 4, 3), {"device": "cuda"}, ValueError, "device must be 'cpu'"),
    ],
)
def test_constructor(arguments, options, error, message):
    state = torch.random.get_rng_state()
    with pytest.raises(error, match=message):
        SparseConv2d(*arguments, **options)
    assert torch.equal(state, torch.random.get_rng_state())


def test_pattern_of_another_shape_or_kind(layer):
    for shape in ((8, 6), (6, 8, 3, 3), (8, 3, 3, 3)):
        pattern = SparsePattern.random(shape, 0.5, seed=0)
        with pytest.raises(ValueError, match=r"pattern must have.*\(8, 54\).*got \("):
            SparseConv2d(6, 8, 3, pattern=pattern)
        good, before = layer.pattern, layer.values.detach().clone()
        with pytest.raises(ValueError, match=r"pattern must have.*\(8, 54\)"):
            layer.set_pattern(pattern, torch.ones(pattern.nnz))
        assert layer.pattern is good
        assert torch.equal(layer.values, before)
    with pytest.raises(TypeError, match="got Tensor"):
        SparseConv2d(6, 8, 3, pattern=torch.ones(8, 54, dtype=torch.bool))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 9, 9), r"\(2, 5, 9, 9\), that is 5 channels, but.*takes 6: \(N, 6, H, W\)"),
        ((9, 9, 6), "9 channels, but.*takes 6"),
        ((9, 9), r"\(9, 9\), but the layer takes \(N, 6, H, W\), or \(6, H, W\) without a batch"),
        ((6,), "without a batch"),
        ((), "without a batch"),
        ((2, 6, 3, 9, 9), "without a batch"),
        ((2, 6, 0, 9), r"sizes \(0, 9\), padded \(2, 11\), which is smaller.*\(3, 3\)"),
        ((0, 6, 9, 0), "smaller than the kernel"),
    ],
)
def test_input_of_another_shape(layer, shape, message):
    before = layer.values.detach().clone()
    with pytest.raises(ValueError, match=message):
        layer(torch.ones(shape))
    assert layer.values.grad is None
    assert torch.equal(layer.values, before)


def test_kernel_larger_than_the_padded_input():
    x = torch.ones(2, 4, 5)
    with pytest.raises(
        ValueError, match=r"sizes \(5,\), padded \(5,\).*dilation, \(7,\): pad more"
    ):
        SparseConv1d(4, 4, 3, dilation=3)(x)
    with pytest.raises(ValueError, match=r"padded \(7, 4, 5\).*\(3, 5, 3\)"):
        SparseConv3d(4, 4, (3, 5, 3), padding=(1, 0, 0))(torch.ones(1, 4, 5, 4, 5))
    with pytest.raises(ValueError, match=r"padded \(7,\).*\(8,\)"):
        SparseConv1d(4, 4, 8, padding=1, padding_mode="circular")(x)


def test_padding_by_reflection_larger_than_the_input():
    with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
        SparseConv1d(4, 4, 3, padding=7, padding_mode="reflect")(torch.ones(2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float16])
def test_input_of_another_kind(layer, dtype):
    with pytest.raises(TypeError, match=f"input is {dtype}"):
        layer(torch.ones(2, 6, 5, 5).to(dtype))


def test_input_of_another_dtype_device_or_no_tensor(layer):
    with pytest.raises(
        TypeError, match=r"input is torch.float64 but the layer's values are.*layer"
    ):
        layer(torch.ones(2, 6, 5, 5).double())
    with pytest.raises(ValueError, match="input is on meta"):
        layer(torch.ones(2, 6, 5, 5, device="meta"))
    with pytest.raises(TypeError, match="input is a list"):
        layer([[1.0]])


def test_from_dense():
    dense = nn.Conv2d(6, 8, 3)
    for wrong in (nn.Linear(6, 8), nn.Conv1d(6, 8, 3), nn.ConvTranspose2d(6, 8, 3)):
        with pytest.raises(TypeError, match=r"torch\.nn\.Conv2d; got"):
            SparseConv2d.from_dense(wrong)
    with pytest.raises(ValueError, match=r"mask must have.*\(8, 6, 3, 3\); got \(8, 54\)"):
        SparseConv2d.from_dense(dense, torch.ones(8, 54, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        SparseConv2d.from_dense(dense, torch.ones(8, 6, 3, 3))
    with pytest.raises(TypeError, match=r"float16.*\.float\(\)"):
        SparseConv2d.from_dense(dense.half())


def test_arguments_of_the_function():
    pattern = SparsePattern.random((8, 54), 0.5, seed=0)
    values, x = torch.ones(pattern.nnz), torch.ones(2, 6, 5, 5)
    good = {"kernel_size": (3, 3)}

    def fails(error, message, values=values, bias=None, x=x, **options):
        with pytest.raises(error, match=message):
            sparse_conv(x, values, bias, pattern, **good | options)

    fails(ValueError, r"kernel_size must be a tuple of 1, 2 or 3.*got 3", kernel_size=3)
    fails(ValueError, "tuple of 1, 2 or 3", kernel_size=(1, 1, 1, 1))
    fails(ValueError, "54 columns.*no multiple of the 4 taps", kernel_size=(2, 2))
    fails(ValueError, "groups = 3 does not divide the 8 output channels", groups=3)
    fails(ValueError, "6 channels, but the layer takes 12", groups=2)
    fails(TypeError, "bias is torch.float64", bias=torch.ones(8).double())
    for sparsity_of_way in (values[:-1], torch.ones(pattern.nnz + 1)):
        fails(RuntimeError, r"values has \d+ entries, expected", values=sparsity_of_way)
    fails(RuntimeError, "bias", bias=torch.ones(7))


@pytest.mark.parametrize("value", [float("nan"), 1.5, -0.1, "half", None])
def test_sparsify_with_a_bad_sparsity_changes_nothing(value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(2, 2, 1))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match="sparsity"):
        sparsify(model, value, inplace=True)
    assert [type(m) for m in model] == [nn.Conv2d, nn.Conv1d]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_parametrized_and_tied_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.raises(ValueError, match="layer 1 has parametrizations"):
        sparsify(model, 0.5)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied"):
        sparsify(model, 0.5, inplace=True)
    assert type(model[0]) is nn.Conv2d
