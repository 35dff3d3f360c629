"""sparsify, to_sparse, to_dense: what is converted, what is kept, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsetrain import SparsePattern, sparsify, to_dense, to_sparse
from sparsetrain.nn import SparseLayer, SparseLinear
from sparsetrain.nn.convert import SPARSE_TYPES
from sparsetrain.sparsify.criteria import keep_top
from sparsetrain.sparsify.distributions import erk, uniform


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.encoder = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.encoder:
            x = torch.relu(layer(x))
        return self.head(self.norm(x))


TOKENS = torch.arange(24).view(4, 6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def picture(model: nn.Module):
    """Identity and content of everything that a failed conversion must not change."""
    modules = {
        name: (id(m), m.training, {k: list(v) for k, v in vars(m).items() if "hooks" in k and v})
        for name, m in model.named_modules(remove_duplicate=False)
    }
    tensors = {
        name: (id(p), p.requires_grad, p.detach().clone() if not p.is_meta else torch.empty(0))
        for name, p in model.named_parameters(remove_duplicate=False)
        if not isinstance(p, nn.UninitializedParameter)
    }
    return modules, tensors


def assert_refuses(call, model, message, error=ValueError):
    """Raises for a copy and in place, and the model is as it was."""
    modules, tensors = picture(model)
    for inplace in (False, True):
        with pytest.raises(error, match=message):
            call(model, inplace)
        now_modules, now_tensors = picture(model)
        assert now_modules == modules
        assert now_tensors.keys() == tensors.keys()
        for name, (identity, learns, content) in tensors.items():
            assert now_tensors[name][:2] == (identity, learns)
            torch.testing.assert_close(
                now_tensors[name][2], content, rtol=0, atol=0, equal_nan=True
            )


def refuses_all(model, message, error=ValueError, **kwargs):
    assert_refuses(
        lambda m, inplace: sparsify(m, 0.5, inplace=inplace, **kwargs), model, message, error
    )
    assert_refuses(
        lambda m, inplace: to_sparse(m, min_sparsity=0.0, inplace=inplace, **kwargs),
        model,
        message,
        error,
    )


def nnz(model):
    return {name: m.nnz for name, m in model.named_modules() if isinstance(m, SparseLinear)}


# ------------------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("inplace", [False, True])
def test_sparsify_keeps_the_largest_of_each_layer(model, inplace):
    original = copy.deepcopy(model)
    result = sparsify(model, 0.75, inplace=inplace)
    assert (result is model) == inplace
    assert type(result) is Net
    assert nnz(result) == {"encoder.0": 64, "encoder.1": 64, "head": 20}
    for name in nnz(result):
        weight, kept = original.get_submodule(name).weight, result.get_submodule(name).weight
        mask = kept != 0
        assert torch.equal(kept[mask], weight[mask])
        assert weight[mask].abs().min() >= weight[~mask].abs().max()
    torch.testing.assert_close(result(TOKENS), to_dense(result)(TOKENS))
    if not inplace:
        assert picture(model)[1].keys() == picture(original)[1].keys()
        assert torch.equal(model(TOKENS), original(TOKENS))


def test_a_copy_shares_nothing(model):
    result = sparsify(model, 0.5)
    addresses = {p.data_ptr() for p in model.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in result.parameters())
    dense = to_dense(result)
    addresses = {p.data_ptr() for p in result.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in dense.parameters())


def test_in_place_keeps_the_other_parameters_and_the_biases(model):
    kept = {n: p for n, p in model.named_parameters() if not n.endswith(".weight")}
    kept |= {n: p for n, p in model.named_parameters() if n.startswith(("embed", "norm"))}
    sparsify(model, 0.5, inplace=True)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in kept.items())


@pytest.mark.parametrize("inplace", [False, True])
def test_flags_dtype_and_order_are_kept(model, inplace):
    model.double().eval()
    model.encoder[1].train()
    model.encoder[0].weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    names = [n for n, _ in model.named_parameters()]
    dense_flags = [p.requires_grad for p in model.parameters()]
    sparse = sparsify(model, 0.5, inplace=inplace)
    assert [n for n, _ in sparse.named_parameters()] == [
        n.replace("weight", "values") if n.startswith(("encoder", "head")) else n for n in names
    ]
    for result in (sparse, to_dense(sparse)):
        assert [p.requires_grad for p in result.parameters()] == dense_flags
        assert all(p.dtype == torch.float64 for p in result.parameters())
        assert not result.training
        assert result.encoder[1].training
    assert [n for n, _ in to_dense(sparse).named_parameters()] == names


def test_the_result_can_be_trained_copied_and_pickled(model):
    sparse = sparsify(model, 0.5)
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = sparse(TOKENS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = sparse(TOKENS)
    assert torch.equal(copy.deepcopy(sparse)(TOKENS), expected)
    assert torch.equal(pickle.loads(pickle.dumps(sparse))(TOKENS), expected)


models = st.tuples(
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.floats(0, 1),
    st.integers(0, 2**32),
)


@settings(max_examples=40, deadline=None)
@given(models, st.booleans())
def test_to_dense_of_to_sparse_is_the_model(recipe, inplace):
    sizes, bias, dtype, zeros, seed = recipe
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias, dtype=dtype) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers:
            layer.weight[torch.rand(layer.weight.shape) < zeros] = 0
    state = copy.deepcopy(model.state_dict())
    counts = [int((layer.weight != 0).sum()) for layer in layers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = to_sparse(model, min_sparsity=0.0, inplace=inplace)
    assert [layer.nnz for layer in sparse] == counts
    back = to_dense(sparse, inplace=inplace)
    assert list(back.state_dict()) == list(state)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in state.items())


def test_to_sparse_takes_what_is_sparse_enough(model):
    with torch.no_grad():
        model.encoder[0].weight[:8] = 0  # exactly a half
        model.encoder[1].weight[:7] = 0
    sparse = to_sparse(model)
    assert nnz(sparse) == {"encoder.0": 128}
    assert torch.equal(sparse.encoder[0].weight, model.encoder[0].weight)
    assert nnz(to_sparse(model, min_sparsity=0.4)) == {"encoder.0": 128, "encoder.1": 144}


def test_layers_that_already_are_sparse_are_left_alone(model):
    once = sparsify(model, 0.5, include="head")
    twice = sparsify(once, 0.75)
    assert nnz(twice) == {"encoder.0": 64, "encoder.1": 64, "head": 40}


@pytest.mark.parametrize("inplace", [False, True])
def test_to_sparse_reads_pruned_layers(model, inplace):
    prune.random_unstructured(model.encoder[0], "weight", amount=0.6)
    prune.l1_unstructured(model.encoder[1], "weight", amount=0.5)
    prune.random_unstructured(model.encoder[1], "weight", amount=0.5)  # a container of two
    model.encoder[0].register_forward_pre_hook(lambda m, a: None)
    with torch.no_grad():
        zero = tuple(model.encoder[0].weight_mask.nonzero()[0])
        model.encoder[0].weight_orig[zero] = 0
    expected = model(TOKENS)
    masks = [layer.weight_mask.bool().clone() for layer in model.encoder]
    sparse = to_sparse(model, inplace=inplace)
    assert [n for n, _ in sparse.encoder.named_parameters()] == [
        "0.values", "0.bias", "1.values", "1.bias",
    ]  # fmt: skip
    for layer, mask in zip(sparse.encoder, masks, strict=True):
        assert torch.equal(layer.pattern.to_mask(), mask)
        assert list(layer.buffers()) == []
    assert len(sparse.encoder[0]._forward_pre_hooks) == 1
    assert len(sparse.encoder[1]._forward_pre_hooks) == 0
    torch.testing.assert_close(sparse(TOKENS), expected)
    if not inplace:
        assert torch.equal(model(TOKENS), expected)
        prune.remove(model.encoder[0], "weight")


def test_a_layer_of_zeros_is_converted_with_a_warning(model):
    nn.init.zeros_(model.head.weight)
    with pytest.warns(UserWarning, match=r"head has no nonzero weight.*exclude='head'") as record:
        sparse = to_sparse(model)
    assert record[0].filename == __file__
    assert nnz(sparse) == {"head": 0}
    assert torch.equal(to_dense(sparse).head.weight, model.head.weight)


def test_a_layer_used_in_two_places_is_converted_once(model):
    model.again = model.encoder[0]
    model.others = nn.ModuleList([model.encoder[0]])
    for inplace in (False, True):
        sparse = sparsify(model, 0.5, inplace=inplace)
        assert isinstance(sparse.again, SparseLinear)
        assert sparse.again is sparse.encoder[0] is sparse.others[0]
        dense = to_dense(sparse)
        assert dense.again is dense.encoder[0] is dense.others[0]


def test_the_model_itself_may_be_the_layer():
    layer = nn.Linear(8, 4)
    sparse = sparsify(layer, 0.5)
    assert isinstance(sparse, SparseLinear)
    assert type(to_dense(sparse)) is nn.Linear
    with pytest.raises(ValueError, match="cannot be done in place"):
        sparsify(layer, 0.5, inplace=True)


def test_shared_biases_stay_shared(model):
    model.bias = model.head.bias
    for inplace in (False, True):
        sparse = sparsify(model, 0.5, inplace=inplace)
        assert sparse.bias is sparse.head.bias
        dense = to_dense(sparse)
        assert dense.bias is dense.head.bias


def test_further_attributes_are_kept(model):
    model.head.note = {"owner": "me"}
    sparse = sparsify(model, 0.5)
    assert sparse.head.note == {"owner": "me"}
    assert to_dense(sparse).head.note == {"owner": "me"}
    assert not hasattr(to_dense(sparse).head, "_pattern")


# ------------------------------------------------------------------- criteria and distributions


def test_ties_go_to_the_first_weights():
    layer = nn.Linear(6, 4)
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        layer.weight[3, 5] = -2
    mask = sparsify(layer, 0.75).pattern.to_mask().flatten()
    assert mask.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 23]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=30), st.data())
def test_keep_top_is_a_stable_sort(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = keep_top(torch.tensor(scores, dtype=torch.float32), count)
    assert sorted(order[:count]) == mask.nonzero().flatten().tolist()


def test_keep_top_refuses_other_counts():
    with pytest.raises(ValueError, match=r"between 0 and 3.*got 4"):
        keep_top(torch.ones(3), 4)


def test_random_criterion_is_seeded_exact_and_not_magnitude(model):
    def run(seed):
        return sparsify(
            model, 0.75, criterion="random", generator=torch.Generator().manual_seed(seed)
        )

    one, two, other = run(1), run(1), run(2)
    assert one.head.pattern == two.head.pattern
    assert one.head.pattern != other.head.pattern
    assert nnz(one) == nnz(sparsify(model, 0.75))
    assert one.head.pattern != sparsify(model, 0.75).head.pattern


def test_global_takes_the_largest_of_all(model):
    with torch.no_grad():
        model.encoder[0].weight.mul_(3)
    sparse = sparsify(model, 0.6, distribution="global")
    together = torch.cat([model.get_submodule(n).weight.flatten() for n in nnz(sparse)])
    kept = torch.cat([sparse.get_submodule(n).weight.flatten() for n in nnz(sparse)])
    assert int((kept != 0).sum()) == len(together) - round(0.6 * len(together))
    assert together[kept != 0].abs().min() >= together[kept == 0].abs().max()
    assert nnz(sparse)["encoder.0"] > nnz(sparse)["encoder.1"]


def test_distribution_by_name(model):
    sparse = sparsify(model, 0.5, distribution={"encoder.1": 0.0, "encoder.*": 0.75, "*": 0.25})
    assert nnz(sparse) == {"encoder.0": 64, "encoder.1": 256, "head": 60}
    assert nnz(sparsify(model, 0.5, distribution={"head": 0.75})) == {
        "encoder.0": 128, "encoder.1": 128, "head": 20,
    }  # fmt: skip


def test_erk_follows_the_papers_rule():
    shapes = [(512, 512), (512, 2048), (100, 1000)]
    sizes = [512 * 512, 512 * 2048, 100 * 1000]
    counts = erk(shapes, 0.9)
    total = sum(sizes)
    assert sum(counts) == total - round(0.9 * total)
    ratios = [count / (a + b) for count, (a, b) in zip(counts, shapes, strict=True)]
    assert max(ratios) - min(ratios) < 1e-2 * max(ratios)
    conv = erk([(64, 64, 3, 3), (128, 64, 3, 3)], 0.9)
    assert conv[0] / (64 + 64 + 3 + 3) == pytest.approx(conv[1] / (128 + 64 + 3 + 3), rel=1e-3)


def test_erk_leaves_small_layers_dense():
    counts = erk([(4, 4), (200, 200)], 0.5)
    assert counts == [16, 20008 - 16]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
)
def test_distributions_are_exact_and_within_bounds(shapes, sparsity):
    sizes = [a * b for a, b in shapes]
    for rule in (uniform, erk):
        counts = rule(shapes, sparsity)
        assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    total = sum(sizes)
    assert sum(erk(shapes, sparsity)) == max(len(sizes), max(1, total - round(sparsity * total)))
    assert uniform(shapes, sparsity) == [max(1, s - round(sparsity * s)) for s in sizes]


def test_sparsify_with_erk_and_in_bfloat16(model):
    sparse = sparsify(model.bfloat16(), 0.8, distribution="erk")
    assert sum(nnz(sparse).values()) == 592 - round(0.8 * 592)
    assert sparse.head.density > sparse.encoder[0].density


# -------------------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        (None, None, ["encoder.0", "encoder.1", "head"]),
        ("head", None, ["head"]),
        (["head", "encoder.1"], None, ["encoder.1", "head"]),
        ("encoder", None, ["encoder.0", "encoder.1"]),
        ("encoder.*", None, ["encoder.0", "encoder.1"]),
        ("*.1", None, ["encoder.1"]),
        ("encoder.[0]", None, ["encoder.0"]),
        (None, "head", ["encoder.0", "encoder.1"]),
        (None, ["head", "encoder.0"], ["encoder.1"]),
        (None, "encoder", ["head"]),
        (None, ("embed", nn.LayerNorm), ["encoder.0", "encoder.1", "head"]),
        ("encoder", "*.0", ["encoder.1"]),
        (nn.Linear, "head", ["encoder.0", "encoder.1"]),
        (nn.Linear, lambda name, module: module.out_features == 5, ["encoder.0", "encoder.1"]),
        (lambda name, module: name.endswith("1"), None, ["encoder.1"]),
        ([], "head", None),
    ],
)
def test_include_and_exclude(model, include, exclude, names):
    if names is None:
        with pytest.raises(ValueError, match="no layer to convert"):
            sparsify(model, 0.5, include=include, exclude=exclude)
        return
    sparse = sparsify(model, 0.5, include=include, exclude=exclude)
    assert list(nnz(sparse)) == names
    assert list(nnz(to_sparse(model, min_sparsity=0, include=include, exclude=exclude))) == names


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"exclude": "heads"}, r"exclude names 'heads', which matches nothing.*encoder\.0, .*head"),
        ({"exclude": ["head", "layer.*"]}, r"exclude names 'layer\.\*'"),
        ({"exclude": nn.Conv2d}, "exclude names Conv2d"),
        ({"include": "decoder"}, r"include names 'decoder'.*the layers are: encoder\.0, enc"),
        ({"include": "embed"}, "include names 'embed', which matches nothing"),
        ({"include": nn.Embedding}, "include names Embedding"),
        ({"include": ""}, "include names ''"),
        (
            {"exclude": ["encoder", "head"]},
            r"Net has no layer to convert.*Linear.*1 Embedding, 1 LayerNorm, 3 Linear; left out.*"
            r"encoder\.0, encoder\.1, head",
        ),
        ({"include": lambda n, m: False}, "no layer to convert"),
    ],
)
def test_selections_that_match_nothing(model, kwargs, message):
    refuses_all(model, message, **kwargs)


@pytest.mark.parametrize("selector", [3, [None], int, nn.Linear(2, 2), b"head", [["head"]]])
def test_selectors_of_a_wrong_kind(model, selector):
    for argument in ("include", "exclude"):
        refuses_all(model, f"{argument} takes names", TypeError, **{argument: selector})


def test_a_predicate_that_fails_changes_nothing(model):
    def predicate(name, module):
        if name == "head":
            raise KeyError("mine")
        return True

    refuses_all(model, "mine", KeyError, include=predicate)


def test_attention_projections_stay_dense_silently():
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = sparsify(block, 0.5)
    assert set(nnz(sparse)) == {"linear1", "linear2"}
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(sparse(x), to_dense(sparse)(x))
    refuses_all(block, "self_attn.out_proj is a NonDynamicallyQ", include="self_attn.out_proj")


class Special(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_subclasses_stay_dense_with_a_warning_and_are_refused_by_name(model):
    model.encoder[1] = Special(16, 16)
    with pytest.warns(UserWarning, match=r"encoder\.1 stays dense: it is a Special") as record:
        sparse = sparsify(model, 0.5)
    assert record[0].filename == __file__
    assert list(nnz(sparse)) == ["encoder.0", "head"]
    assert type(sparse.encoder[1]) is Special
    refuses_all(model, r"encoder\.1 is a Special, whose own behaviour", include="encoder.1")
    refuses_all(model, "is a Special", include=Special)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(model, 0.5, exclude="encoder.1")


def test_every_kind_has_what_conversion_needs():
    for dense, sparse in SPARSE_TYPES.items():
        assert issubclass(dense, nn.Module)
        for needed in ("from_dense", "to_dense", "weight_shape", "forward"):
            own = next(c for c in sparse.__mro__ if needed in vars(c))
            assert issubclass(own, SparseLayer)
            assert own is not SparseLayer


# ---------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_a_layer_are_carried(model, inplace):
    calls = []
    handles = [
        model.head.register_forward_pre_hook(lambda m, a: calls.append("pre")),
        model.head.register_forward_hook(
            lambda m, a, k, o: calls.append(type(m).__name__), with_kwargs=True
        ),
        model.head.register_full_backward_hook(lambda m, i, o: calls.append("backward")),
        model.head.register_full_backward_pre_hook(lambda m, o: calls.append("backward pre")),
    ]
    sparse = sparsify(model, 0.5, inplace=inplace)
    sparse(TOKENS).sum().backward()
    assert calls == ["pre", "SparseLinear", "backward pre", "backward"]
    calls.clear()
    dense = to_dense(sparse, inplace=inplace)
    dense(TOKENS).sum().backward()
    assert calls == ["pre", "Linear", "backward pre", "backward"]
    if inplace:  # the user's handles still work
        for handle in handles:
            handle.remove()
        calls.clear()
        dense(TOKENS).sum().backward()
        assert calls == []


def test_a_hook_that_is_a_method_of_the_model_follows_the_copy(model):
    class Watching(Net):
        seen = 0

        def watch(self, *_):
            self.seen += 1

    watching = Watching()
    watching.head.register_forward_hook(watching.watch)
    sparse = sparsify(watching, 0.5)
    sparse(TOKENS)
    assert (watching.seen, sparse.seen) == (0, 1)


def test_what_cannot_be_carried_is_refused(model):
    def broken(change, message):
        changed = copy.deepcopy(model)
        change(changed.head)
        refuses_all(changed, message)
        assert list(nnz(sparsify(changed, 0.5, exclude="head", inplace=True))) == [
            "encoder.0",
            "encoder.1",
        ]

    broken(lambda m: m.weight.register_hook(lambda g: g), "head cannot.*weight has tensor hooks")
    broken(
        lambda m: m.weight.register_post_accumulate_grad_hook(lambda p: None), "has tensor hooks"
    )
    broken(lambda m: m.register_state_dict_pre_hook(lambda *a: None), "state_dict hooks")
    broken(lambda m: m.register_state_dict_post_hook(lambda *a: None), "state_dict hooks")
    broken(lambda m: m.register_load_state_dict_pre_hook(lambda *a: None), "state_dict hooks")
    broken(lambda m: m.register_load_state_dict_post_hook(lambda *a: None), "state_dict hooks")
    broken(lambda m: setattr(m, "forward", m.forward), "forward has been overridden")
    broken(lambda m: m.compile(backend="eager"), "has been compiled by itself")
    broken(lambda m: m.register_parameter("lora", nn.Parameter(torch.ones(1))), "holds lora")
    broken(lambda m: m.register_buffer("scale", torch.ones(1)), "holds scale besides weight")
    broken(lambda m: m.add_module("inner", nn.ReLU()), "holds inner")
    broken(parametrizations.orthogonal, r"head has parametrizations.*remove_parametrizations")
    broken(lambda m: prune.l1_unstructured(m, "bias", 0.5), r"bias_orig.*prune\.remove\(layer, 'b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken(nn.utils.weight_norm, "head cannot be converted: it holds weight_g, weight_v")
    broken(nn.utils.spectral_norm, "head cannot be converted")


def test_sparsify_refuses_pruned_layers(model):
    prune.l1_unstructured(model.head, "weight", 0.5)
    assert_refuses(
        lambda m, inplace: sparsify(m, 0.5, inplace=inplace),
        model,
        r"head is already pruned.*to_sparse.*prune\.remove",
    )


def test_layers_without_weights_yet_are_refused(model):
    model.lazy = nn.LazyLinear(3)
    refuses_all(model, "lazy .* has no weights yet: run a forward")


# ---------------------------------------------------------------------------------- ties


def test_tied_weights_are_refused_naming_both(model):
    tied = copy.deepcopy(model)
    tied.encoder[1].weight = tied.encoder[0].weight
    refuses_all(tied, r"weight is tied.*encoder\.0 \(Linear\.weight\) and encoder\.1 \(Linear")

    tied = copy.deepcopy(model)
    tied.out = nn.Linear(16, 30, bias=False)
    tied.out.weight = tied.embed.weight
    refuses_all(tied, r"out cannot.*embed \(Embedding\.weight\) and out \(Linear\.weight\)")
    sparse = sparsify(tied, 0.5, exclude="out")
    assert sparse.out.weight is sparse.embed.weight

    tied = copy.deepcopy(model)
    tied.out = nn.Linear(16, 30, bias=False)
    tied.out.weight = nn.Parameter(tied.embed.weight.detach())  # another object, the same memory
    refuses_all(tied, "out cannot.*tied")

    tied = copy.deepcopy(model)
    tied.mine = tied.head.weight
    refuses_all(tied, r"head \(Linear\.weight\)")


def test_tied_values_are_refused_by_to_dense(model):
    sparse = sparsify(model, 0.5)
    sparse.encoder[1] = SparseLinear(16, 16, pattern=sparse.encoder[0].pattern)
    sparse.encoder[1].values = sparse.encoder[0].values
    assert_refuses(lambda m, inplace: to_dense(m, inplace=inplace), sparse, "values is tied")


def test_unregistered_references_are_refused_in_place_only(model):
    model.path = [model.encoder[0], model.head]
    with pytest.raises(ValueError, match=r"encoder\.0 cannot.*'path'.*inplace=False"):
        sparsify(model, 0.5, inplace=True)
    assert type(model.head) is nn.Linear
    sparse = sparsify(model, 0.5)
    assert sparse.path[0] is sparse.encoder[0]
    assert sparse.path[1] is sparse.head


# ------------------------------------------------------------------------------ bad arguments


def test_models_with_nothing_to_convert():
    model = nn.Sequential(nn.ReLU(), nn.Embedding(3, 3), nn.ReLU())
    message = r"Sequential has no layer to convert.*Linear.*what it holds: 1 Embedding, 2 ReLU"
    refuses_all(model, message)
    refuses_all(nn.Sequential(), "no layer to convert.*1 Sequential")
    assert_refuses(
        lambda m, inplace: to_dense(m, inplace=inplace),
        nn.Sequential(nn.Linear(2, 2)),
        "no layer to convert; what can be converted: SparseLayer; what it holds: 1 Linear",
    )


def test_to_sparse_with_nothing_sparse_enough(model):
    with torch.no_grad():
        model.head.weight[0] = 0
    assert_refuses(
        lambda m, inplace: to_sparse(m, inplace=inplace),
        model,
        r"min_sparsity = 0.5; found: encoder\.0 0\.000, encoder\.1 0\.000, head 0\.200",
    )


def test_wrong_arguments(model):
    def refuses(message, error=ValueError, **kwargs):
        assert_refuses(
            lambda m, inplace: sparsify(m, 0.5, inplace=inplace, **kwargs), model, message, error
        )

    refuses("criterion must be one of 'magnitude', 'random' or a dict", criterion="size")
    refuses("distribution must be one of 'uniform', 'erk', 'global'", distribution="even")
    refuses("distribution must be one of", distribution=None)
    refuses(r"distribution names 'heads', which matches no", distribution={"heads": 0.5})
    refuses(r"distribution\['head'\] must be in", distribution={"head": 1.0})
    refuses("keys must be layer names", TypeError, distribution={1: 0.5})
    for call in (lambda m: sparsify(m, 0.5), to_sparse, to_dense):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got list"):
            call([model])


def test_layers_of_other_dtypes_or_devices(model):
    half = copy.deepcopy(model)
    half.head.half()
    refuses_all(half, r"head is torch.float16.*\.float\(\)", TypeError)
    meta = copy.deepcopy(model)
    meta.head.to("meta")
    assert_refuses(
        lambda m, inplace: sparsify(m, 0.5, inplace=inplace), meta, "head is on device 'meta'"
    )


def test_nan_weights_have_no_magnitude(model):
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    assert_refuses(lambda m, inplace: sparsify(m, 0.5, inplace=inplace), model, "layer head: .*NaN")
    assert nnz(sparsify(model, 0.5, criterion="random"))["head"] == 40


def test_global_refuses_to_empty_a_layer(model):
    with torch.no_grad():
        model.head.weight.mul_(1e-6)
    assert_refuses(
        lambda m, inplace: sparsify(m, 0.9, distribution="global", inplace=inplace),
        model,
        "would leave layer head without any weight",
    )


def test_a_model_that_cannot_be_copied_is_left_alone(model):
    model.buffer = torch.ones(3, requires_grad=True) * 2  # not a leaf: deepcopy refuses
    modules, _ = picture(model)
    with pytest.raises(RuntimeError, match="deepcopy"):
        sparsify(model, 0.5)
    assert picture(model)[0] == modules
    sparsify(model, 0.5, inplace=True)
    assert isinstance(model.head, SparseLinear)


def test_the_function_is_not_hidden_by_the_package_of_the_same_name():
    import importlib

    import sparsetrain

    importlib.import_module("sparsetrain.sparsify.criteria")
    assert callable(sparsetrain.sparsify)
    assert sparsetrain.sparsify is sparsify
    assert sparsetrain.SparsePattern is SparsePattern
