"""SparseConv1d, 2d, 3d as modules: construction, conversion, state, training."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsetrain
from conv_cases import SETTINGS
from helpers import generator, random_mask
from sparsetrain import SparsePattern, sparsify, to_dense, to_sparse
from sparsetrain.nn import SparseConv1d, SparseConv2d, SparseConv3d
from sparsetrain.sparsify.distributions import erk

KINDS = {1: (SparseConv1d, nn.Conv1d), 2: (SparseConv2d, nn.Conv2d), 3: (SparseConv3d, nn.Conv3d)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def inputs(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    return SparseConv2d(8, 12, 3, padding=1, **{"sparsity": 0.7} | kwargs)


class Net(nn.Module):
    """A small residual network: a first convolution, a block with a shortcut, a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding="same", padding_mode="reflect"),
        )
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.fc = nn.Linear(32, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.block(x) + self.shortcut(x))
        return self.fc(self.depthwise(x).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


# --------------------------------------------------------------------------------------------------
# The layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own layer
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_converts_to_the_dense_layer_and_back(name):
    what = SETTINGS[name]
    sparse_type, dense_type = KINDS[len(what.kernel_size)]
    torch.manual_seed(0)
    dense = dense_type(what.channels, what.out, **what.window).double()
    mask = random_mask(*what.mask_shape, 0.4, seed=1).view(dense.weight.shape)
    with torch.no_grad():
        dense.weight.mul_(mask)
    layer = sparse_type.from_dense(dense)
    assert type(layer) is sparse_type
    assert layer.weight_shape == what.weight_shape
    assert torch.equal(layer.weight, dense.weight)
    back = layer.to_dense()
    assert type(back) is dense_type
    assert torch.equal(back.weight, dense.weight)
    assert torch.equal(back.bias, dense.bias)
    assert repr(back) == repr(dense)
    assert repr(layer).startswith(f"Sparse{repr(dense)[:-1]}, sparsity=")
    assert set(vars(back)) == set(vars(dense))
    x = inputs(2, what.channels, *what.size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(x[0]), dense(x[0]))


def test_constructor_defaults_and_attributes():
    layer = SparseConv2d(10, 20, 3)
    assert layer.nnz == layer.values.numel() == 180
    assert layer.sparsity == pytest.approx(0.9)
    assert layer.pattern.shape == (20, 90)
    assert layer.weight.shape == (20, 10, 3, 3)
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (0, 0))
    assert (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert list(layer.buffers()) == []
    assert repr(layer) == (
        "SparseConv2d(10, 20, kernel_size=(3, 3), stride=(1, 1), sparsity=0.9000, nnz=180)"
    )
    assert SparseConv2d(4, 4, 1, 1, 0, 1, 1, False).bias is None
    pattern = SparsePattern.random((20, 5, 7), 0.5, seed=0)
    assert SparseConv1d(10, 20, 7, groups=2, pattern=pattern).pattern is pattern


def test_geometry_changed_after_construction_counts():
    layer = make()
    x = inputs(2, 8, 9, 9)
    expected = layer.to_dense()
    for changed in (layer, expected):
        changed.stride, changed.dilation, changed.padding = (2, 2), (2, 2), (2, 2)
    torch.testing.assert_close(layer(x), expected(x))


def test_initialisation_follows_the_fan_in_of_each_row():
    counts = [1, 0, 72, 40, 4]
    mask = torch.arange(72) < torch.tensor(counts)[:, None]
    torch.manual_seed(0)
    layer = SparseConv2d(8, 5, 3, pattern=SparsePattern.from_mask(mask))
    largest, biases = torch.zeros(5), torch.zeros(5)
    for _ in range(20):
        layer.reset_parameters()
        largest = torch.maximum(largest, layer.weight.detach().abs().amax((1, 2, 3)))
        biases = torch.maximum(biases, layer.bias.detach().abs())
    for row, count in enumerate(counts):
        bound = 1 / math.sqrt(count) if count else 0.0
        assert 0.6 * bound <= largest[row] <= bound
        assert 0.6 * bound <= biases[row] <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_flags_go_over_both_ways(dtype, bias):
    dense = nn.Conv2d(4, 6, 3, bias=bias, dtype=dtype).eval()
    dense.weight.requires_grad_(False)
    state = torch.random.get_rng_state()
    layer = SparseConv2d.from_dense(dense)
    back = layer.to_dense()
    assert torch.equal(state, torch.random.get_rng_state())
    for made in (layer, back):
        assert not made.training
        assert all(p.dtype == dtype for p in made.parameters())
        assert (made.bias is not None) == bias
    assert not layer.values.requires_grad
    assert not back.weight.requires_grad


def test_pruned_layer_is_read_through_its_mask():
    dense = nn.Conv2d(4, 6, 3)
    nn.utils.prune.l1_unstructured(dense, "weight", amount=0.8)
    with torch.no_grad():
        dense.weight_orig.add_(1.0)
    layer = SparseConv2d.from_dense(dense)
    assert torch.equal(layer.weight, dense.weight_orig * dense.weight_mask)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(duplicate):
    layer = make()
    other = duplicate(layer)
    x = inputs(2, 8, 5, 6)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.values.zero_()
    assert layer.values.abs().sum() > 0
    assert torch.equal(layer(x), make()(x))


def test_state_dict_loads_into_a_layer_with_another_pattern(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    one, two = make(seed=1), make(seed=2, sparsity=0.4)
    values = two.values
    assert sorted(one.state_dict()) == ["bias", "col_indices", "crow_indices", "values"]
    safetensors.save_file(one.state_dict(), str(tmp_path / "layer.safetensors"))
    two.load_state_dict(safetensors.load_file(str(tmp_path / "layer.safetensors")))
    assert two.values is values
    assert two.pattern == one.pattern
    x = inputs(2, 8, 5, 6)
    assert torch.equal(one(x), two(x))
    other = SparseConv2d(8, 12, 1)
    before = other.values.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        other.load_state_dict(one.state_dict())
    assert torch.equal(before, other.values)


def test_channels_last_models_and_inputs():
    layer = make().to(memory_format=torch.channels_last)
    x = inputs(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_meta_device():
    layer = make()
    empty = SparseConv2d(8, 12, 3, padding=1, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = inputs(3, 8, 5, 5)
    assert torch.equal(empty(x), layer(x))


def test_a_layer_without_any_weight():
    pattern = SparsePattern.from_mask(torch.zeros(12, 72).bool())
    layer = SparseConv2d(8, 12, 3, pattern=pattern)
    x = inputs(2, 8, 5, 6).requires_grad_()
    out = layer(x)
    assert torch.equal(out, layer.bias.view(1, 12, 1, 1).expand(2, 12, 3, 4))
    out.sum().backward()
    assert layer.values.grad.shape == (0,)
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_compiled_module_trains_like_the_eager_one(sparsity):
    torch._dynamo.reset()
    layer = make(sparsity=sparsity)
    x = inputs(3, 8, 7, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (layer, compiled):
        layer.zero_grad()
        f(x).pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*gradients)


# --------------------------------------------------------------------------------------------------
# Whole models


def test_sparsify_and_to_dense_on_a_network(net):
    net.eval()
    model = sparsify(net, 0.8, exclude=["conv1", "fc"])
    converted = [name for name, m in model.named_modules() if hasattr(m, "pattern")]
    assert converted == ["block.0", "block.3", "shortcut", "depthwise"]
    for name in converted:
        layer = model.get_submodule(name)
        assert layer.nnz == round(0.2 * net.get_submodule(name).weight.numel())
    x = inputs(3, 3, 11, 14)
    dense = to_dense(model)
    assert type(dense.block[3]) is nn.Conv2d
    torch.testing.assert_close(model(x), dense(x))
    again = to_sparse(dense, exclude=["conv1", "fc"])
    assert again.block[3].pattern == model.block[3].pattern
    torch.testing.assert_close(again(x), dense(x))


@pytest.mark.parametrize(
    "exclude",
    [
        ["conv1", nn.Linear],
        lambda name, layer: (
            getattr(layer, "in_channels", None) == 3 or isinstance(layer, nn.Linear)
        ),
    ],
)
def test_the_first_convolution_is_left_out_by_name_or_by_what_it_is(net, exclude):
    model = sparsify(net, 0.8, exclude=exclude)
    assert type(model.conv1) is nn.Conv2d
    assert type(model.fc) is nn.Linear
    assert type(model.shortcut) is SparseConv2d


def test_only_convolutions_or_only_one_dimension(net):
    model = sparsify(nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv3d(2, 2, 2), nn.Linear(5, 5)), 0.5)
    assert [type(m).__name__ for m in model] == ["SparseConv1d", "SparseConv3d", "SparseLinear"]
    model = sparsify(net, 0.5, include=nn.Conv2d)
    assert type(model.fc) is nn.Linear


def test_layers_that_are_no_plain_convolution_stay_dense():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].__class__ = type("ScaledConv2d", (nn.Conv2d,), {})
    with pytest.warns(UserWarning, match="layer 2 stays dense: it is a ScaledConv2d"):
        converted = sparsify(model, 0.5)
    assert [type(m).__name__ for m in converted] == [
        "ConvTranspose2d",
        "SparseConv2d",
        "ScaledConv2d",
    ]
    lazy = nn.Sequential(nn.LazyConv2d(4, 3))
    with pytest.raises(ValueError, match="has no weights yet"):
        sparsify(lazy, 0.5)


def test_erk_shares_by_the_sizes_of_the_kernel(net):
    model = sparsify(net, 0.8, distribution="erk", exclude=["conv1", "fc"])
    layers = [model.block[0], model.block[3], model.shortcut, model.depthwise]
    shapes = [layer.weight_shape for layer in layers]
    assert [layer.nnz for layer in layers] == erk(shapes, 0.8)
    # Evci et al. 2020: density proportional to 1 - (in + out + kw + kh) / (in * out * kw * kh)
    # taken from one, that is to (in + out + kw + kh) / (in * out * kw * kh); small layers are full.
    assert layers[3].density == 1.0
    ratio = [
        layer.density / (sum(s) / math.prod(s)) for layer, s in zip(layers, shapes, strict=True)
    ]
    assert ratio[0] == pytest.approx(ratio[1], rel=1e-2)


def test_training_is_that_of_a_masked_dense_network(net):
    # Evaluation mode of the batch norms keeps the comparison exact to many digits.
    sparse = sparsify(net.double().eval(), 0.7)
    dense = to_dense(sparse)
    masks = {
        name: layer.pattern.to_mask()
        for name, layer in sparse.named_modules()
        if hasattr(layer, "pattern")
    }
    steps = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (sparse, dense)]
    x, y = inputs(6, 3, 9, 10, dtype=torch.float64), torch.arange(6) % 5
    for _ in range(12):
        losses = []
        for model, step in zip((sparse, dense), steps, strict=True):
            step.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            if model is dense:
                for name, mask in masks.items():
                    weight = dense.get_submodule(name).weight
                    weight.grad.mul_(mask.view(weight.shape))
            step.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(sparse.block[0].weight, dense.block[0].weight)


def test_damaged_state_leaves_the_whole_network_as_it_was(net):
    model = sparsify(net, 0.8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = sparsify(net, 0.6)
    state["block.3.col_indices"][0] = 10**6
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"block\.3\.c"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_explain_names_what_computes_each_product():
    from sparsetrain._conv_choice import Problem, explain

    window = ((3, 3), (1, 1), (1, 1), (1, 1), 1, torch.float32)
    text = explain(Problem((32, 64, 56, 56), 64, 1843, *window))
    assert "(32, 64, 56, 56) -> (32, 64, 56, 56), 1843 of 36864 weights" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "forward",
        "grad_input",
        "grad_values",
    ]
    assert sparsetrain.sparse_conv is not None
