"""state_dict: complete, portable, and never a way for a bad topology to get in."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import sparsetrain
from sparsetrain import SparsePattern
from sparsetrain.nn import SparseLinear


def make(sparsity=0.6, seed=0, bias=True) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(20, 12, bias=bias, sparsity=sparsity)


def net(sparsity=0.6, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        SparseLinear(20, 12, sparsity=sparsity),
        nn.LayerNorm(12),
        SparseLinear(12, 5, bias=False, sparsity=sparsity),
        nn.Linear(5, 2),
    )


def frozen_state(model: nn.Module):
    """All that a failed load must not change: objects, contents, gradients, patterns."""
    return [
        (name, id(p), p.data_ptr(), p.detach().clone(), p.grad, p.requires_grad)
        for name, p in model.named_parameters()
    ] + [
        (name, id(m.pattern), m.pattern.to_mask())
        for name, m in model.named_modules()
        if isinstance(m, SparseLinear)
    ]


def assert_unchanged(model: nn.Module, before) -> None:
    now = frozen_state(model)
    assert len(now) == len(before)
    for one, two in zip(now, before, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_keys_and_dtypes():
    state = make().state_dict()
    assert list(state) == ["values", "crow_indices", "col_indices", "bias"]
    assert state["crow_indices"].dtype == state["col_indices"].dtype == torch.int32
    assert list(make(bias=False).state_dict()) == ["values", "crow_indices", "col_indices"]
    assert list(net().state_dict())[:6] == [
        "0.values", "0.crow_indices", "0.col_indices", "0.bias", "1.weight", "1.bias",
    ]  # fmt: skip
    double = make().double().state_dict()
    assert double["values"].dtype == torch.float64
    assert double["crow_indices"].dtype == torch.int32


def test_saved_indices_are_copies():
    layer = make()
    state = layer.state_dict()
    state["col_indices"].fill_(10**6)
    assert layer.pattern.col_indices.max() < 20
    state["values"].zero_()  # values alias, as torch's do
    assert layer.values.abs().sum() == 0


def test_keep_vars():
    layer = make()
    assert layer.state_dict(keep_vars=True)["values"] is layer.values


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("sparsity", [0.6, 0.9, 0.0])
def test_loads_into_another_pattern(sparsity, assign):
    source, target = net(seed=1), net(sparsity, seed=2)
    result = target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(source, target)
    x = torch.randn(3, 20)
    assert torch.equal(source(x), target(x))


def test_the_parameter_stays_the_same_object_and_the_optimizer_works():
    source, target = make(0.3, seed=1), make(0.8, seed=2)
    values, x = target.values, torch.randn(3, 20)
    optimizer = torch.optim.Adam(target.parameters(), lr=0.1)
    target(x).sum().backward()
    target.load_state_dict(source.state_dict())
    assert target.values is values
    assert values.grad is None
    target(x).sum().backward()
    optimizer.step()
    source_step = torch.optim.Adam(source.parameters(), lr=0.1)
    source(x).sum().backward()
    source_step.step()
    assert torch.equal(source.values, target.values)


def test_an_equal_pattern_is_loaded_in_place():
    source = make()
    target = copy.deepcopy(source)
    with torch.no_grad():
        source.values.mul_(2)
    pattern, address = target.pattern, target.values.data_ptr()
    target(torch.randn(3, 20)).sum().backward()
    target.load_state_dict(pickled(source.state_dict()))
    assert target.pattern is pattern
    assert target.values.data_ptr() == address
    assert target.values.grad is not None
    assert torch.equal(source.values, target.values)


def test_requires_grad_of_the_target_is_kept():
    target = make(seed=2)
    target.values.requires_grad_(False)
    for assign in (False, True):
        target.load_state_dict(make(0.2, seed=1).state_dict(), assign=assign)
        assert not target.values.requires_grad
        assert target.bias.requires_grad


def test_another_dtype_is_converted_unless_assigned():
    source = make(0.2, seed=1).double()
    target = make(seed=2)
    target.load_state_dict(source.state_dict())
    assert target.values.dtype == torch.float32
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.values.dtype == torch.float64


def pickled(state, **kwargs):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **kwargs)


def test_torch_save_with_weights_only(tmp_path):
    source, target = net(seed=1), net(0.9, seed=2)
    target.load_state_dict(pickled(source.state_dict()))
    assert same(source, target)
    torch.save(source.state_dict(), tmp_path / "state.pt")
    mapped = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    target = net(0.9, seed=2)
    target.load_state_dict(mapped, assign=True)
    assert same(source, target)


def test_safetensors(tmp_path):
    source, target = net(seed=1), net(0.9, seed=2)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    target.load_state_dict(load_file(tmp_path / "a.safetensors"), strict=True)
    assert same(source, target)
    target = net(0.9, seed=2)
    save_model(source, str(tmp_path / "b.safetensors"))
    load_model(target, tmp_path / "b.safetensors")
    assert same(source, target)


def test_safetensors_of_layers_that_share_a_pattern(tmp_path):
    layer = make()
    model = nn.Sequential(layer, copy.deepcopy(layer))
    assert model[0].pattern is model[1].pattern
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()


def test_int64_indices_are_narrowed_on_load():
    source, target = make(seed=1), make(seed=2)
    state = source.state_dict()
    state["crow_indices"], state["col_indices"] = (
        state["crow_indices"].long(),
        state["col_indices"].long(),
    )
    target.load_state_dict(state)
    assert same(source, target)


def test_nan_values_load_as_in_torch():
    state = make(seed=1).state_dict()
    state["values"] = torch.full_like(state["values"], float("nan"))
    target = make(seed=2)
    target.load_state_dict(state)
    assert target.values.isnan().all()


def test_load_hooks_run_before_the_check():
    layer = make(seed=2)

    def rename(state, prefix, *_):
        state[prefix + "values"] = state.pop(prefix + "old_values")

    layer._register_load_state_dict_pre_hook(rename)
    state = make(seed=1).state_dict()
    state["old_values"] = state.pop("values")
    layer.load_state_dict(state)
    assert same(layer, make(seed=1))


def swap(name, change):
    """A damage: the entry `name` replaced by change(entry)."""

    def damage(state, prefix):
        state[prefix + name] = change(state[prefix + name].clone())

    return damage


def at(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def drop(*names):
    def damage(state, prefix):
        for name in names:
            del state[prefix + name]

    return damage


def shorten_both(state, prefix):
    state[prefix + "values"] = state[prefix + "values"][:-1]
    state[prefix + "col_indices"] = state[prefix + "col_indices"][:-1]


DAMAGES = {
    "column_out_of_range": (swap("col_indices", at(-1, 20)), "col_indices.*20, out of range"),
    "column_huge": (swap("col_indices", at(3, 2**31 - 1)), "col_indices.*out of range"),
    "column_negative": (swap("col_indices", at(0, -1)), "col_indices.*-1, out of range"),
    "columns_unsorted": (swap("col_indices", lambda t: t.flip(0)), "col_indices.*sorted"),
    "column_duplicated": (swap("col_indices", lambda t: at(1, int(t[0]))(t)), "duplicate"),
    "columns_too_few": (swap("col_indices", lambda t: t[:-1]), "crow_indices.*must end"),
    "columns_too_many": (swap("col_indices", lambda t: torch.cat([t, t[:1]])), "must end"),
    "columns_empty": (swap("col_indices", lambda t: t[:0]), "crow_indices"),
    "columns_and_values_short": (shorten_both, "crow_indices.*must end"),
    "columns_float": (swap("col_indices", lambda t: t.float()), "col_indices must be int32"),
    "columns_nan": (swap("col_indices", lambda t: t * float("nan")), "col_indices must be int32"),
    "columns_2d": (swap("col_indices", lambda t: t[None]), "one dimension"),
    "columns_list": (swap("col_indices", lambda t: t.tolist()), "col_indices must be an int32 ten"),
    "columns_beyond_int32": (
        swap("col_indices", lambda t: at(0, 2**40)(t.long())),
        "holds 1099511627776",
    ),
    "crow_start": (swap("crow_indices", at(0, 1)), "crow_indices.*start with 0"),
    "crow_decreasing": (swap("crow_indices", at(3, 10**6)), "crow_indices.*not decrease"),
    "crow_negative": (swap("crow_indices", at(1, -4)), "crow_indices.*not decrease"),
    "crow_end": (swap("crow_indices", at(-1, 10**6)), "crow_indices.*must end"),
    "crow_short": (swap("crow_indices", lambda t: t[:-1]), "crow_indices.*13 entries"),
    "crow_long": (swap("crow_indices", lambda t: torch.cat([t, t[-1:]])), "crow_indices.*got 14"),
    "crow_nan": (swap("crow_indices", lambda t: t * float("nan")), "crow_indices must be int32"),
    "crow_meta": (swap("crow_indices", lambda t: t.to("meta")), "meta"),
    "values_short": (swap("values", lambda t: t[:-1]), r"size mismatch for {p}values"),
    "values_long": (swap("values", lambda t: torch.cat([t, t[:1]])), "size mismatch for {p}values"),
    "values_empty": (swap("values", lambda t: t[:0]), "size mismatch for {p}values"),
    "values_scalar": (swap("values", lambda t: t[0]), "size mismatch for {p}values"),
    "values_nan_scalar": (swap("values", lambda t: t[0] * float("nan")), "size mismatch"),
    "values_2d": (swap("values", lambda t: t[None]), "size mismatch for {p}values"),
    "values_integer": (swap("values", lambda t: t.int()), '"{p}values" must be floating-point'),
    "values_complex": (swap("values", lambda t: t + 1j), '"{p}values" must be floating-point'),
    "values_none": (swap("values", lambda t: None), '"{p}values" must be a tensor; got NoneType'),
    "values_meta": (swap("values", lambda t: t.to("meta")), '"{p}values" must be an ordinary'),
    "values_sparse": (swap("values", lambda t: t.to_sparse()), '"{p}values" must be an ordinary'),
    "bias_short": (swap("bias", lambda t: t[:-1]), "size mismatch for {p}bias"),
    "bias_integer": (swap("bias", lambda t: t.int()), '"{p}bias" must be floating-point'),
    "no_values": (drop("values"), '"{p}values" missing'),
    "no_crow": (drop("crow_indices"), '"{p}crow_indices" missing'),
    "no_col": (drop("col_indices"), '"{p}col_indices" missing'),
    "no_indices": (drop("crow_indices", "col_indices"), "crow_indices.*col_indices.*missing"),
    "no_bias": (drop("bias"), '"{p}bias" missing'),
    "nothing": (drop("values", "crow_indices", "col_indices", "bias"), "Missing key.*{p}values"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_raises_and_changes_nothing(name, assign):
    damage, message = DAMAGES[name]
    layer = make(0.8, seed=2)
    layer(torch.randn(3, 20)).sum().backward()
    before = frozen_state(layer)
    state = make(seed=1).state_dict()
    damage(state, "")
    with pytest.raises(RuntimeError, match="(?s)" + message.format(p="")):
        layer.load_state_dict(state, assign=assign)
    assert_unchanged(layer, before)

    # In a model: this layer as it was by torch's own method, all of it by ours.
    model = net(0.8, seed=2)
    before, before_layer = frozen_state(model), frozen_state(model[0])
    state = net(seed=1).state_dict()
    damage(state, "0.")
    with pytest.raises(RuntimeError, match="(?s)" + message.format(p="0.")):
        sparsetrain.load_state_dict(model, state, assign=assign)
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="(?s)" + message.format(p="0.")):
        model.load_state_dict(state, assign=assign)
    assert_unchanged(model[0], before_layer)


@pytest.mark.parametrize("name", [n for n in DAMAGES if n != "nothing"])
def test_a_damaged_checkpoint_raises_without_strict_too(name):
    damage, _ = DAMAGES[name]
    layer = make(0.8, seed=2)
    before = frozen_state(layer)
    state = make(seed=1).state_dict()
    damage(state, "")
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state, strict=False)
    assert_unchanged(layer, before)


def test_without_strict_an_absent_layer_is_reported():
    layer = make()
    before = frozen_state(layer)
    result = layer.load_state_dict({}, strict=False)
    assert result.missing_keys == ["values", "crow_indices", "col_indices", "bias"]
    assert_unchanged(layer, before)


def test_a_damaged_last_layer_takes_back_the_first_ones():
    model = net(0.8, seed=2)
    model(torch.randn(3, 20)).sum().backward()
    before = frozen_state(model)
    for key, entry in (("2.col_indices", torch.tensor([5])), ("3.weight", torch.ones(9, 9))):
        state = net(seed=1).state_dict()
        state[key] = entry
        for assign in (False, True):
            with pytest.raises(RuntimeError):
                sparsetrain.load_state_dict(model, state, assign=assign)
            assert_unchanged(model, before)
    model(torch.randn(3, 20)).sum().backward()
    sparsetrain.load_state_dict(model, net(seed=1).state_dict())
    assert same(model, net(seed=1))
    result = sparsetrain.load_state_dict(model, {}, strict=False)
    assert len(result.missing_keys) == len(model.state_dict())


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nn.Sequential],
    ids=["itself", "deepcopy", "pickle", "wrapped"],
)
def test_a_converted_model_is_guarded_by_its_own_load_state_dict(duplicate):
    def converted(seed):
        torch.manual_seed(seed)
        dense = nn.Sequential(nn.Linear(20, 12), nn.LayerNorm(12), nn.Linear(12, 5))
        once = sparsetrain.sparsify(dense, 0.5, include="0")
        return sparsetrain.sparsify(once, 0.5, include="2", inplace=True)

    model, source = duplicate(converted(1)), duplicate(converted(2))
    assert len(converted(1)._load_state_dict_pre_hooks) == 1
    before = frozen_state(model)
    state = source.state_dict()
    name = next(key for key in state if key.endswith("2.col_indices"))
    for damaged in (state[name].flip(0), state[name][:-1], state[name] + 9, state[name].float()):
        for assign in (False, True):
            with pytest.raises(
                RuntimeError, match=rf'Error.*loading state_dict.*\n\t"{name[:-11]}'
            ):
                model.load_state_dict({**state, name: damaged}, assign=assign)
            assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match=r"size mismatch.*values.*the checkpoint holds a weight"):
        model.load_state_dict(shaped(state, name))
    if duplicate is not nn.Sequential:  # torch shows a nested hook no metadata
        assert_unchanged(model, before)
    model.load_state_dict(state)
    assert same(model, source)


def shaped(state, name):
    """The same entries, said to be those of a layer of another shape."""
    state = copy.copy(state)
    state._metadata = copy.deepcopy(state._metadata)
    state._metadata[name.removesuffix(".col_indices")]["weight_shape"] = (5, 13)
    return state


def test_the_guard_goes_with_the_last_sparse_layer():
    model = sparsetrain.sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5)
    assert len(model._load_state_dict_pre_hooks) == 1
    assert len(sparsetrain.to_dense(model)._load_state_dict_pre_hooks) == 0
    assert len(model._load_state_dict_pre_hooks) == 1


def test_another_weight_shape_raises_even_where_the_indices_fit():
    torch.manual_seed(0)
    wider, layer = SparseLinear(30, 12, pattern=None, sparsity=0.9), make(seed=2)
    state = SparseLinear(
        30, 12, pattern=SparsePattern.from_mask(torch.ones(12, 30).bool().tril())
    ).state_dict()
    before = frozen_state(layer)
    for checkpoint in (state, pickled(state), wider.state_dict()):
        with pytest.raises(RuntimeError, match=r"size mismatch for values.*\(12, 30\).*\(12, 20\)"):
            layer.load_state_dict(checkpoint)
    assert_unchanged(layer, before)


def test_a_dense_checkpoint_says_what_to_do():
    layer = make()
    before = frozen_state(layer)
    with pytest.raises(RuntimeError, match=r"dense layer.*sparsetrain\.to_sparse"):
        layer.load_state_dict(nn.Linear(20, 12).state_dict())
    assert_unchanged(layer, before)


def test_a_bias_too_many_raises():
    layer = make(bias=False)
    before = frozen_state(layer)
    with pytest.raises(RuntimeError, match='"bias" is in the checkpoint, but the layer has no bia'):
        layer.load_state_dict(make(seed=1).state_dict())
    assert_unchanged(layer, before)


def test_unknown_keys_are_unexpected():
    state = make(seed=1).state_dict()
    state["other"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        make().load_state_dict(state)
    assert make().load_state_dict(state, strict=False).unexpected_keys == ["other"]


def test_further_parameters_of_a_layer_travel_along():
    layer, other = make(seed=1), make(seed=2)
    for one in (layer, other):
        one.register_buffer("count", torch.zeros(1))
        one.lora = nn.Parameter(torch.zeros(2))
        one.add_module("child", nn.Linear(2, 2))
    layer.count += 3
    state = layer.state_dict()
    other.load_state_dict(state)
    assert other.count.item() == 3
    del state["lora"]
    assert other.load_state_dict(state, strict=False).missing_keys == ["lora"]
