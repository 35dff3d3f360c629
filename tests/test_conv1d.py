"""The Conv1D of transformers as torch.nn.Linear, sparse, and back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import sparsetrain
from sparsetrain.nn import SparseLinear, to_conv1d, to_linear

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def conv1ds(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, Conv1D)]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gpt2_there_and_back(gpt2: GPT2LMHeadModel, inplace: bool) -> None:
    before, names = copy.deepcopy(gpt2.state_dict()), conv1ds(gpt2)
    expected, random = logits(gpt2), torch.get_rng_state()
    model = to_linear(gpt2, inplace=inplace)
    assert (model is gpt2) == inplace
    assert len(names) == 8
    assert not conv1ds(model)
    assert bool(conv1ds(gpt2)) == (not inplace)
    torch.testing.assert_close(logits(model), expected)
    square = model.get_submodule("transformer.h.0.attn.c_proj")
    assert type(square) is nn.Linear
    assert torch.equal(square.weight, before["transformer.h.0.attn.c_proj.weight"].t())
    back = to_conv1d(model, inplace=inplace)
    assert conv1ds(back) == names
    assert not back.training
    assert back.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in back.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_it_trains_sparse_and_comes_back_as_it_was_built(gpt2: GPT2LMHeadModel) -> None:
    model = sparsetrain.sparsify(to_linear(gpt2), 0.8, exclude="lm_head").train()
    layer = model.get_submodule("transformer.h.1.mlp.c_fc")
    assert isinstance(layer, SparseLinear)
    assert (layer.in_features, layer.out_features) == (32, 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(TOKENS, labels=TOKENS).loss
    first.backward()
    optimizer.step()
    model.eval()
    assert model(TOKENS, labels=TOKENS).loss < first
    with pytest.raises(ValueError, match=r"layer transformer.h.0.attn.c_attn is sparse.*to_dense"):
        to_conv1d(model)
    back = to_conv1d(sparsetrain.to_dense(model))
    assert len(conv1ds(back)) == 8
    torch.testing.assert_close(logits(back), logits(model))
    assert back.state_dict().keys() == gpt2.state_dict().keys()
    gpt2.load_state_dict(back.state_dict())
    torch.testing.assert_close(logits(gpt2), logits(model))


def test_conv1d_is_not_left_dense_in_silence(gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(ValueError, match=r"8 Conv1D.*sparsetrain\.to_linear"):
        sparsetrain.sparsify(gpt2, 0.9, exclude="lm_head")
    wrapped = nn.ModuleDict({"gpt": gpt2.transformer, "score": nn.Linear(32, 3)})
    with pytest.warns(UserWarning, match=r"8 layers stay dense.*Conv1D.*and 5 more") as seen:
        sparse = sparsetrain.sparsify(wrapped, 0.5)
    assert seen[0].filename == __file__
    assert "sparsetrain.to_linear(model)" in str(seen[0].message)
    assert isinstance(sparse["score"], SparseLinear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsetrain.sparsify(wrapped, 0.5, exclude=[Conv1D])
        sparsetrain.sparsify(wrapped, 0.5, include="score")


def test_hooks_and_flags_go_over(gpt2: GPT2LMHeadModel) -> None:
    seen: list[str] = []
    layer = gpt2.get_submodule("transformer.h.0.mlp.c_proj")
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.weight.requires_grad_(False)
    layer.train()
    model = to_linear(gpt2)
    logits(model)
    assert seen == ["forward"]
    new = model.get_submodule("transformer.h.0.mlp.c_proj")
    assert new.training
    assert not new.weight.requires_grad
    assert new.bias.requires_grad


def test_bad_input_is_refused(gpt2: GPT2LMHeadModel) -> None:
    for convert in (to_linear, to_conv1d):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got str"):
            convert("gpt2")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="Sequential has no Conv1D"):
        to_linear(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Sequential has no layer made by sparsetrain\.to_linear"):
        to_conv1d(nn.Sequential(nn.Linear(2, 2)))
    first, second = gpt2.transformer.h[0].mlp, gpt2.transformer.h[1].mlp
    kept = second.c_fc.weight
    second.c_fc.weight = first.c_fc.weight
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.c_fc cannot.*its weight is tied"):
        to_linear(gpt2, inplace=True)
    second.c_fc.weight = kept
    prune.l1_unstructured(second.c_fc, "weight", 0.5)
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc is pruned.*prune\.remove"):
        to_linear(gpt2, inplace=True)
    assert len(conv1ds(gpt2)) == 8
