"""Sparse convolutions inside what PyTorch wraps around them, and their registration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conv_cases import SETTINGS, SMALL, WAYS, Case, computed_by, make_case, setting
from helpers import CountOps, generator, threads


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


# --------------------------------------------------------------------------------------------------
# Registration


def _registered(
    name: str, dtype: torch.dtype, bias: bool = True
) -> tuple[Case, dict[str, Callable[..., Any]]]:
    """The four operations of a family as functions of their floating-point arguments."""
    case, arguments = _operation_arguments(name, dtype, bias)
    count = {"": 3, "_grad_input": 2, "_grad_values": 2, "_backward": 3}

    def bind(suffix: str) -> Callable[..., Any]:
        op, rest = arguments[suffix][0], arguments[suffix][1][count[suffix] :]

        def call(*tensors: Tensor) -> Any:
            results = op(*tensors, *rest)
            return results if bias or isinstance(results, Tensor) else results[:-1]

        return call

    return case, {suffix: bind(suffix) for suffix in arguments}


def _operation_arguments(name: str, dtype: torch.dtype, bias: bool) -> tuple[Case, dict[str, Any]]:
    what = setting(2, 4, (2, 1, 2), (3, 2, 3)) if name == "conv_unfolded" else SMALL
    case = make_case(what, 2, dtype, 0.6)
    n = len(what.kernel_size)
    options = {"stride": 1, "padding": 0, "dilation": 1} | what.window
    window = [
        (v,) * n if isinstance(v, int) else v
        for v in (options[k] for k in ("kernel_size", "stride", "padding", "dilation"))
    ]
    window.append(what.groups)
    topology = (case.pattern.crow_indices, case.pattern.col_indices, case.pattern.key)
    x, values, grad = case.x, case.values, case.grad
    ops = torch.ops.sparsetrain
    arguments = {
        "": (x, values, case.bias if bias else None, *topology, *window),
        "_grad_input": (grad, values, *topology, list(x.shape), *window),
        "_grad_values": (grad, x, *topology, *window, bias),
        "_backward": (grad, x, values, *topology, *window, bias),
    }
    return case, {s: (getattr(ops, name + s).default, args) for s, args in arguments.items()}


@pytest.mark.parametrize(
    ("name", "bias"),
    [("conv2d", True), ("conv2d", False), ("conv_dense", True), ("conv_unfolded", True)],
)
def test_gradients_of_the_backward_operations(name: str, bias: bool) -> None:
    case, call = _registered(name, torch.float64, bias)
    leaves = tuple(t.requires_grad_() for t in (case.grad, case.x, case.values))
    assert torch.autograd.gradcheck(call["_backward"], leaves)
    assert torch.autograd.gradgradcheck(call["_backward"], leaves)
    assert torch.autograd.gradcheck(call["_grad_input"], (case.grad, case.values))
    assert torch.autograd.gradcheck(call["_grad_values"], (case.grad, case.x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["conv2d", "conv_dense", "conv_unfolded"])
def test_opcheck(name: str, bias: bool) -> None:
    case, arguments = _operation_arguments(name, torch.bfloat16 if bias else torch.float32, bias)
    for tensor in (case.grad, *case.leaves):
        tensor.requires_grad_()
    for op, args in arguments.values():
        torch.library.opcheck(op, args)


def test_meta_tensors_give_shapes() -> None:
    for name, what in SETTINGS.items():
        case = make_case(what, 2)
        leaves = [leaf.to("meta").requires_grad_() for leaf in case.leaves]
        y = case.sparse(leaves[0], leaves[1], leaves[2])
        assert y.is_meta, name
        assert y.shape == case.grad.shape, name
        y.sum().backward()
        assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


def test_no_invalid_pattern_reaches_a_kernel_through_a_raw_operation() -> None:
    x, values = torch.ones(1, 4, 3, 3), torch.ones(2)
    window = ([1, 1], [1, 1], [0, 0], [1, 1], 1)
    for name, (crow, col) in itertools.product(
        ("conv2d", "conv_dense"),
        (([0, 1, 2], [0, 4]), ([0, 1, 2], [0, -1]), ([0, 2, 2], [1, 1]), ([0, 3, 2], [0, 1])),
    ):
        topology = torch.tensor(crow, dtype=torch.int32), torch.tensor(col, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="no valid pattern"):
            getattr(torch.ops.sparsetrain, name)(
                x, values, None, *topology, torch.tensor([2**41]), *window
            )


# --------------------------------------------------------------------------------------------------
# What PyTorch wraps around a layer

_CASE = make_case(SMALL, 3, torch.float64, 0.6)
x, v, b = _CASE.leaves
Layer = Callable[..., Tensor]


def _loss(layer: Layer) -> Layer:
    return lambda x, v, b: layer(x, v, b).pow(3).sum()


FUNC: dict[str, Callable[[Layer], Any]] = {
    "grad": lambda f: torch.func.grad(_loss(f), argnums=(0, 1, 2))(x, v, b),
    "grad_of_grad": lambda f: torch.func.grad(
        lambda v: torch.func.grad(_loss(f))(x, v, b).pow(2).sum()
    )(v),
    "vmap_over_unbatched": lambda f: torch.vmap(lambda x: f(x, v, b))(x),
    "vmap_over_batches": lambda f: torch.vmap(lambda x: f(x, v, b), in_dims=1, out_dims=2)(
        torch.stack([x, x + 1, -x], 1)
    ),
    "vmap_over_values": lambda f: torch.vmap(lambda v: f(x, v, b))(torch.stack([v, -v])),
    "vmap_over_an_ensemble": lambda f: torch.vmap(f)(
        torch.stack([x, x + 1]), torch.stack([v, -v]), torch.stack([b, -b])
    ),
    "per_sample_gradients": lambda f: torch.vmap(
        torch.func.grad(_loss(f), argnums=(0, 1, 2)), in_dims=(0, None, None)
    )(x, v, b),
    "jvp": lambda f: torch.func.jvp(f, (x, v, b), (x + 1, v + 1, b + 1)),
    "jvp_of_bias": lambda f: torch.func.jvp(lambda b: f(x, v, b), (b,), (b + 1,)),
    "jacrev": lambda f: torch.func.jacrev(lambda v: f(x, v, b))(v),
    "jacfwd": lambda f: torch.func.jacfwd(lambda v: f(x, v, b))(v),
    "hessian": lambda f: torch.func.hessian(lambda v: _loss(f)(x, v, b))(v),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", FUNC)
def test_function_transforms(transform: str, way: str) -> None:
    with computed_by(way):
        actual = FUNC[transform](_CASE.sparse)
    torch.testing.assert_close(actual, FUNC[transform](_CASE.masked))


def test_vmap_over_samples_is_one_convolution() -> None:
    with computed_by("sparse"), CountOps() as ops:
        torch.vmap(lambda x: _CASE.sparse(x, v, b))(x)
    assert ops.names == ["conv_planned"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_matches_eager(backend: str, way: str) -> None:
    torch._dynamo.reset()
    case = make_case(SETTINGS["3x3"], 3).require_grad()
    flat = make_case(SETTINGS["1d_same_circular"], 3).require_grad()
    leaves = (*case.leaves, *flat.leaves)

    def step(x: Tensor, v: Tensor, b: Tensor, x1: Tensor, v1: Tensor, b1: Tensor) -> Tensor:
        return case.sparse(x, v, b).relu().pow(2).sum() + flat.sparse(x1, v1, b1).pow(2).sum()

    with computed_by(way):
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        expected, actual = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, leaves),
            torch.autograd.grad(expected, leaves),
            rtol=1e-4,
            atol=1e-4,
        )


def test_compiled_with_the_documented_choice_for_any_batch_and_size() -> None:
    torch._dynamo.reset()
    case = make_case(SETTINGS["3x3"], 3, torch.float64)
    compiled = torch.compile(
        lambda x: case.sparse(x, case.values, case.bias), fullgraph=True, backend="aot_eager"
    )
    for shape in ((3, 6, 9, 11), (5, 6, 9, 11), (4, 6, 7, 8), (6, 9, 11), (0, 6, 5, 5)):
        image = torch.randn(shape, generator=generator(1), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(image), case.sparse(image, case.values, case.bias))


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    case = make_case(SETTINGS["3x3"], 3).require_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.sparse(*case.leaves)
    assert y.dtype == torch.bfloat16
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in case.leaves]
    expected = case.sparse(*low)
    assert torch.equal(y, expected)
    grad = case.grad.bfloat16()
    for actual, reference in zip(
        torch.autograd.grad(y, case.leaves, grad),
        torch.autograd.grad(expected, low, grad),
        strict=True,
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, reference.float())


def test_checkpoint_and_inference_mode() -> None:
    from torch.utils.checkpoint import checkpoint

    case = make_case(SETTINGS["3x3"], 3).require_grad()
    plain = torch.autograd.grad(case.sparse(*case.leaves).pow(2).sum(), case.leaves)
    y = checkpoint(case.sparse, *case.leaves, use_reentrant=False)
    assert isinstance(y, Tensor)
    for actual, expected in zip(
        torch.autograd.grad(y.pow(2).sum(), case.leaves), plain, strict=True
    ):
        assert torch.equal(actual, expected)
    with torch.inference_mode():
        assert torch.equal(case.sparse(*case.leaves), y)
