"""Sparse layers inside what PyTorch wraps around them: compile, autocast, func, threads, fork."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from helpers import (
    DTYPES,
    Case,
    CountOps,
    assert_within_rounding,
    deterministic,
    exact_grad_bias,
    make_case,
    random_mask,
    threads,
)
from sparsetrain.ops import (
    linear,
    linear_backward,
    linear_grad_input,
    linear_grad_values,
    sparse_linear,
)
from sparsetrain.pattern import SparsePattern
from sparsetrain.reference import masked_linear

DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
Layer = Callable[[Tensor, Tensor, Tensor | None, SparsePattern], Tensor]


def small_case(dtype: torch.dtype = torch.float64) -> Case:
    return make_case(random_mask(5, 7, 0.5, seed=0), 3, dtype)


def same_for_both(run: Callable[[Layer], Any]) -> None:
    """`run` gives the same with the sparse layer as with the masked-dense one."""
    torch.testing.assert_close(run(sparse_linear), run(masked_linear))


# --------------------------------------------------------------------------------------------------
# torch.func and forward mode

_CASE = small_case()
x, v, b, pattern = _CASE.x, _CASE.values, _CASE.bias, _CASE.pattern


def loss_of(layer: Layer) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, v, b: layer(x, v, b, pattern).pow(3).sum()


FUNC: dict[str, Callable[[Layer], Any]] = {
    "grad": lambda f: torch.func.grad(loss_of(f), argnums=(0, 1, 2))(x, v, b),
    "grad_without_bias": lambda f: torch.func.grad(lambda v: f(x, v, None, pattern).sum())(v),
    "grad_of_grad": lambda f: torch.func.grad(
        lambda v: torch.func.grad(loss_of(f))(x, v, b).pow(2).sum()
    )(v),
    "vmap_over_samples": lambda f: torch.vmap(lambda x: f(x, v, b, pattern))(x),
    "vmap_over_second_dim": lambda f: torch.vmap(
        lambda x: f(x, v, b, pattern), in_dims=1, out_dims=1
    )(x.expand(4, 3, 7)),
    "vmap_over_values": lambda f: torch.vmap(lambda v: f(x, v, b, pattern))(torch.stack([v, -v])),
    "vmap_over_bias": lambda f: torch.vmap(lambda b: f(x, v, b, pattern))(torch.stack([b, -b])),
    "vmap_over_an_ensemble": lambda f: torch.vmap(lambda x, v, b: f(x, v, b, pattern))(
        torch.stack([x, x + 1]), torch.stack([v, -v]), torch.stack([b, -b])
    ),
    "vmap_of_vmap": lambda f: torch.vmap(lambda v: torch.vmap(lambda x: f(x, v, b, pattern))(x))(
        torch.stack([v, -v])
    ),
    "per_sample_gradients": lambda f: torch.vmap(
        torch.func.grad(loss_of(f), argnums=(0, 1, 2)), in_dims=(0, None, None)
    )(x, v, b),
    "grad_of_vmap": lambda f: torch.func.grad(
        lambda v: torch.vmap(lambda x: f(x, v, b, pattern))(x).pow(2).sum()
    )(v),
    "jvp": lambda f: torch.func.jvp(
        lambda x, v, b: f(x, v, b, pattern), (x, v, b), (x + 1, v + 1, b + 1)
    ),
    "jvp_of_bias": lambda f: torch.func.jvp(lambda b: f(x, v, b, pattern), (b,), (b + 1,)),
    "jacrev": lambda f: torch.func.jacrev(lambda v: f(x, v, b, pattern))(v),
    "jacfwd": lambda f: torch.func.jacfwd(lambda v: f(x, v, b, pattern))(v),
    "hessian_of_values": lambda f: torch.func.hessian(lambda v: loss_of(f)(x, v, b))(v),
    "hessian_of_input": lambda f: torch.func.hessian(lambda x: loss_of(f)(x, v, b))(x),
    "jacrev_of_jacfwd": lambda f: torch.func.jacrev(
        torch.func.jacfwd(lambda v: loss_of(f)(x, v, b))
    )(v),
}


@pytest.mark.parametrize("transform", FUNC)
def test_function_transforms(transform: str) -> None:
    same_for_both(FUNC[transform])


def test_vmap_inside_ordinary_autograd() -> None:
    def run(f: Layer) -> Any:
        leaf = v.clone().requires_grad_()
        y = torch.vmap(lambda x: f(x, leaf, b, pattern))(x)
        return torch.autograd.grad(y.pow(2).sum(), leaf)

    same_for_both(run)


def test_vmap_over_samples_is_one_product() -> None:
    with CountOps() as ops:
        torch.vmap(lambda x: sparse_linear(x, v, b, pattern))(x)
    assert ops.names == ["linear_planned"]


def test_vmap_over_the_registered_operations() -> None:
    case = small_case()
    grads, xs = torch.stack([case.grad, case.grad + 1]), torch.stack([case.x, case.x * 2])
    both = torch.ops.sparsetrain.linear_backward
    mapped = torch.vmap(lambda g, x: both(g, x, case.values, *case.topology, True))(grads, xs)
    each = [both(g, x, case.values, *case.topology, True) for g, x in zip(grads, xs, strict=True)]
    torch.testing.assert_close(
        mapped, tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    )


def test_vmap_over_nothing() -> None:
    none = torch.vmap(lambda v: sparse_linear(x, v, b, pattern))(v.new_empty(0, v.numel()))
    assert none.shape == (0, 3, 5)


def test_vmap_over_a_pattern_raises() -> None:
    case = small_case()
    crow, col, key = case.topology
    with pytest.raises(ValueError, match="a sparsity pattern cannot be mapped"):
        torch.vmap(lambda col: linear(case.x, case.values, None, crow, col, key))(
            torch.stack([col, col])
        )


def test_forward_mode_and_forward_over_reverse() -> None:
    def run(f: Layer) -> Any:
        leaf = x.clone().requires_grad_()
        with forward_ad.dual_level():
            y = loss_of(f)(leaf, forward_ad.make_dual(v, v + 1), b)
            tangent = forward_ad.unpack_dual(y).tangent
            return tangent, torch.autograd.grad(tangent, leaf)

    same_for_both(run)


def test_a_tensor_that_outlived_its_transform() -> None:
    kept: list[Tensor] = []

    def leaking(x: Tensor) -> Tensor:
        kept.append(x * 1)
        return x.sum()

    torch.func.grad(leaking)(x)
    leaf = v.clone().requires_grad_()
    y = sparse_linear(kept[0], leaf, b, pattern)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    clean = sparse_linear(x, leaf, b, pattern)
    torch.testing.assert_close(y, clean)
    torch.testing.assert_close(grad, torch.autograd.grad(clean.sum(), leaf)[0])


def test_functional_call_on_a_module_of_operations() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.bias = torch.nn.Parameter(v.clone()), torch.nn.Parameter(b.clone())

        def forward(self, x: Tensor) -> Tensor:
            return sparse_linear(x, self.values, self.bias, pattern).tanh()

    net = Net()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (sample,)).pow(2).sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    total = torch.autograd.grad(loss(dict(net.named_parameters()), x), net.values)[0]
    torch.testing.assert_close(per_sample["values"].sum(0), total)


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_matches_eager(backend: str) -> None:
    torch._dynamo.reset()
    case = small_case(torch.float32).require_grad()
    leaves = (case.x, case.values, case.bias)

    def step(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, values, bias, case.pattern).relu().pow(2).sum()

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected, actual = step(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)
    )


def test_compiled_forward_for_any_leading_dimensions_and_batch() -> None:
    torch._dynamo.reset()
    case = small_case()
    compiled = torch.compile(
        lambda x: sparse_linear(x, case.values, case.bias, case.pattern),
        fullgraph=True,
        backend="aot_eager",
    )
    for shape in ((3, 7), (5, 7), (9, 7), (2, 3, 7), (7,), (0, 7)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(x), sparse_linear(x, case.values, case.bias, case.pattern)
            )


def test_compiled_under_autocast() -> None:
    torch._dynamo.reset()
    case = small_case(torch.float32)
    compiled = torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = compiled(case.x, case.values, case.bias, case.pattern)
        expected = sparse_linear(case.x, case.values, case.bias, case.pattern)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_wrong_width_raises_when_compiled_too() -> None:
    torch._dynamo.reset()
    case = small_case()
    compiled = torch.compile(sparse_linear, backend="aot_eager")
    with pytest.raises(Exception, match=r"input has shape \(3, 6\)"):
        compiled(case.x[:, :6], case.values, case.bias, case.pattern)


# --------------------------------------------------------------------------------------------------
# Autocast, checkpoint, inference mode


def test_autocast_computes_in_bfloat16_and_gives_float32_gradients() -> None:
    case = make_case(random_mask(33, 41, 0.3, seed=1), 17).require_grad()
    leaves = (case.x, case.values, case.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(*leaves, case.pattern)
    assert y.dtype == torch.bfloat16
    low = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = sparse_linear(low[0], low[1], low[2], case.pattern)
    assert torch.equal(y, expected)
    grad = case.grad.bfloat16()
    for actual, reference in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, low, grad), strict=True
    ):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, reference.float())


def test_autocast_takes_mixed_dtypes_leaves_float64_alone_and_can_be_switched_off() -> None:
    case = small_case(torch.float32)
    args = (case.values, case.bias, case.pattern)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sparse_linear(case.x.bfloat16(), *args).dtype == torch.bfloat16
        double = (case.x.double(), case.values.double(), case.bias.double(), case.pattern)
        assert sparse_linear(*double).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert sparse_linear(case.x, *args).dtype == torch.float32
        with pytest.raises(TypeError, match=r"input is torch\.int64"):
            sparse_linear(case.x.long(), *args)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(TypeError, match=r"autocast asks for torch\.float16.*bfloat16"),
    ):
        sparse_linear(case.x, *args)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(use_reentrant: bool) -> None:
    case = small_case().require_grad()
    leaves = (case.x, case.values, case.bias)

    def block(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_linear(x, values, bias, case.pattern).tanh()

    plain = torch.autograd.grad(block(*leaves).pow(2).sum(), leaves)
    y = checkpoint(block, *leaves, use_reentrant=use_reentrant)
    assert isinstance(y, Tensor)
    y.pow(2).sum().backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def test_inference_mode() -> None:
    case = small_case().require_grad()
    expected = sparse_linear(case.x, case.values, case.bias, case.pattern)
    with torch.inference_mode():
        y = sparse_linear(case.x, case.values, case.bias, case.pattern)
        assert y.is_inference()
        assert torch.equal(sparse_linear(case.x * 1, case.values, case.bias, case.pattern), y)
    assert torch.equal(y, expected)
    assert not sparse_linear(y.new_ones(2, 7), case.values.detach(), None, pattern).requires_grad


# --------------------------------------------------------------------------------------------------
# Threads, repeated runs, forked processes


def all_products(case: Case) -> list[Tensor]:
    y = linear(case.x, case.values, case.bias, *case.topology)
    dx = linear_grad_input(case.grad, case.values, *case.topology, case.pattern.shape[1])
    grads = linear_grad_values(case.grad, case.x, *case.topology, True)
    both = linear_backward(case.grad, case.x, case.values, *case.topology, True)
    return [y, dx, *grads, *both]


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    "shape", [(192, 320, 0.1, 300), (512, 64, 0.5, 9), (3, 1000, 0.2, 257), (1, 40, 0.5, 2000)]
)
def test_every_bit_is_the_same_for_any_thread_count_and_run(
    shape: tuple[int, int, float, int], dtype: torch.dtype
) -> None:
    rows, cols, density, batch = shape
    case = make_case(random_mask(rows, cols, density, seed=2), batch, dtype)
    with deterministic():
        with threads(1):
            expected = all_products(case)
        for count in (1, 2, 4, 3):
            with threads(count):
                for _ in range(2):
                    for actual, first in zip(all_products(case), expected, strict=True):
                        assert torch.equal(actual, first)


def test_every_bit_is_the_same_by_default_at_the_usual_sparsities() -> None:
    case = make_case(random_mask(384, 384, 0.1, seed=3), 130)
    with threads(1):
        expected = all_products(case)
    for count in (2, 3):
        with threads(count), CountOps() as ops:
            for actual, first in zip(all_products(case), expected, strict=True):
                assert torch.equal(actual, first)
        assert not [name for name in ops.names if "dense" in name]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_every_bit_of_a_bias_gradient_alone_is_the_same_for_any_thread_count(
    rows: int, seed: int
) -> None:
    case = make_case(random_mask(rows, 3, 0.5, seed=3), 50_021, seed=seed)
    case.bias.requires_grad_()
    grads = []
    for count in (1, 2, 4):
        with threads(count):
            y = sparse_linear(case.x, case.values, case.bias, case.pattern)
            grads += torch.autograd.grad(y, case.bias, case.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert_within_rounding(grads[0], exact_grad_bias(case.grad))


def _run_in_two_threads(case: Case) -> list[tuple[Tensor, ...]]:
    """Forward and backward on one pattern, again and again, one thread dropping the plan."""
    leaves = [t.requires_grad_() for t in (case.values, case.bias)]
    barrier = threading.Barrier(2)

    def work(me: int) -> tuple[Tensor, ...]:
        barrier.wait(timeout=60)
        for _ in range(20):
            y = sparse_linear(case.x, case.values, case.bias, case.pattern)
            grads = torch.autograd.grad(y, leaves, case.grad)
            if me:
                torch.ops.sparsetrain.forget_plan(int(case.pattern.key))
        return y.detach(), *grads

    with ThreadPoolExecutor(2) as pool:
        return [future.result(timeout=120) for future in [pool.submit(work, i) for i in range(2)]]


def test_two_threads_share_a_layer() -> None:
    expected: tuple[Tensor, ...] | None = None
    for _ in range(5):
        case = make_case(random_mask(96, 128, 0.2, seed=4), 40)  # a new pattern: no plan yet
        for result in _run_in_two_threads(case):
            expected = expected or result
            assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


class _LayerInWorkers(Dataset[Tensor]):
    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        case = self.case
        values = case.values.detach().requires_grad_()
        y = sparse_linear(case.x, values, case.bias, case.pattern)
        (grad,) = torch.autograd.grad(y, values, case.grad)
        return torch.cat([y.detach().flatten(), grad])


def test_forked_workers_after_use() -> None:
    case = make_case(random_mask(64, 96, 0.2, seed=5), 70)
    dataset = _LayerInWorkers(case)
    with threads(2):
        expected = dataset[0]  # builds the plan and starts torch's threads before the fork
        loader = DataLoader(
            dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        batches = list(loader)
        assert torch.equal(dataset[0], expected)
    assert len(batches) == 2
    for sample in torch.cat(batches):
        assert torch.equal(sample, expected)
