"""Memory of large results that was freed and is given to later ones."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsetrain
from sparsetrain.nn import SparseConv2d, SparseLinear

MIB = 1 << 20
ROWS = 8192  # x 128 float32 are 4 MiB, the least that is kept


def _memory() -> tuple[int, int]:
    """Bytes kept, and bytes in use."""
    kept, live, _ = torch.ops.sparsetrain.result_memory()
    return kept, live


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    sparsetrain.empty_cache()
    assert _memory() == (0, 0)
    yield
    sparsetrain.empty_cache()
    assert _memory() == (0, 0), "a result of the test is still alive"


@pytest.fixture(scope="module")
def layer() -> SparseLinear:
    torch.manual_seed(0)
    return SparseLinear(16, 128, sparsity=0.5).requires_grad_(False)


def test_a_freed_result_is_the_next_ones_memory(layer: SparseLinear) -> None:
    x = torch.randn(ROWS, 16)
    y = layer(x)
    assert _memory() == (0, 4 * MIB)
    address = y.data_ptr()
    del y
    assert _memory() == (4 * MIB, 0)
    y = layer(x)
    assert y.data_ptr() == address
    assert _memory() == (0, 4 * MIB)
    del y
    assert sparsetrain.empty_cache() >= 4 * MIB  # what the kernel worked in, too
    assert sparsetrain.empty_cache() == 0


def test_smaller_results_are_left_to_pytorch(layer: SparseLinear) -> None:
    y = layer(torch.randn(ROWS - 1, 16))
    assert _memory() == (0, 0)
    y.resize_(ROWS, 128)


def test_what_is_still_seen_is_not_given_away(layer: SparseLinear) -> None:
    x = torch.randn(ROWS, 16)
    y = layer(x)
    expected = y.clone()
    column, array = y[:, 3], y.numpy()
    pointer = y.data_ptr()
    del y
    other = layer(-x)
    assert other.data_ptr() != pointer
    assert torch.equal(column, expected[:, 3])
    assert (array == expected.numpy()).all()
    del column
    assert _memory()[0] == 0  # numpy holds it
    del array
    assert _memory()[0] == 4 * MIB
    del other


def test_results_in_used_memory_are_right() -> None:
    """Forward and backward, twice: the second time everything is written over old numbers."""
    conv = SparseConv2d(8, 16, 3, padding=1, sparsity=0.8)
    linear = SparseLinear(128, 256, sparsity=0.9)
    dense = (conv.to_dense(), linear.to_dense())
    for sparse_layer, dense_layer, shape in (
        (conv, dense[0], (64, 8, 48, 48)),
        (linear, dense[1], (8200, 128)),
    ):
        for _ in range(2):
            x = torch.randn(shape, requires_grad=True)
            x_dense = x.detach().clone().requires_grad_()
            y = sparse_layer(x)
            used = _memory()[1]
            assert used >= 4 * MIB
            grad = torch.randn_like(y)
            y.backward(grad)
            y_dense = dense_layer(x_dense)
            y_dense.backward(grad)
            assert _memory()[1] > used  # the input's gradient, too
            torch.testing.assert_close(y, y_dense, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-4, atol=1e-4)
            del x, y


def test_dtypes_share_it(layer: SparseLinear) -> None:
    y = layer(torch.randn(2 * ROWS, 16))
    address = y.data_ptr()
    del y
    wide = copy.deepcopy(layer).double()
    x = torch.randn(ROWS, 16, dtype=torch.float64)
    y = wide(x)
    assert y.data_ptr() == address
    assert torch.allclose(y, wide.to_dense()(x))
    del y


def test_a_block_may_be_an_eighth_too_large_but_not_more(layer: SparseLinear) -> None:
    y = layer(torch.randn(2 * ROWS, 16))
    address = y.data_ptr()
    del y
    y = layer(torch.randn(2 * ROWS * 8 // 9 + 1, 16))
    assert y.data_ptr() == address
    assert _memory() == (0, 8 * MIB)
    del y
    y = layer(torch.randn(2 * ROWS * 8 // 9 - 1, 16))
    assert _memory()[1] < 8 * MIB
    del y


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=24))
def test_results_and_what_is_kept_never_exceed_what_was_in_use(
    layer: SparseLinear, steps: list[tuple[int, int]]
) -> None:
    sparsetrain.empty_cache()
    alive: dict[int, torch.Tensor] = {}
    most = 0
    for size, place in steps:
        alive.pop(place, None)
        x = torch.full((ROWS * size, 16), float(size))
        alive[place] = layer(x)
        kept, live = _memory()
        assert live >= sum(t.nbytes for t in alive.values())
        most = max(most, live)
        assert kept + live <= most
    addresses = [t.data_ptr() for t in alive.values()]
    assert len(set(addresses)) == len(addresses)
    for y in alive.values():
        assert torch.equal(y[0], y[-1])


def test_what_no_result_uses_goes(layer: SparseLinear) -> None:
    y, other = layer(torch.randn(ROWS, 16)), layer(torch.randn(3 * ROWS, 16))
    del other
    assert _memory() == (12 * MIB, 4 * MIB)
    x = torch.randn(ROWS, 16)
    for _ in range(1025):
        y = layer(x)
    assert _memory() == (4 * MIB, 4 * MIB)  # two by turns
    del y


def test_results_are_tensors_like_any_other(layer: SparseLinear) -> None:
    x = torch.randn(ROWS, 16)
    y = layer(x)
    assert torch.equal(pickle.loads(pickle.dumps(y)), y)
    assert torch.equal(copy.deepcopy(y), y)
    assert torch.equal(torch.from_dlpack(y), y)
    shared = layer(x).share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, y)
    y.add_(1)
    assert torch.equal(y, shared + 1)
    with torch.inference_mode():
        assert layer(x).is_inference()
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(ROWS + 1, 128)
    del y, shared


def test_threads_never_share_a_result(layer: SparseLinear) -> None:
    wrong = []

    def work(number: int) -> None:
        x = torch.full((ROWS, 16), float(number))
        expected = layer(x).clone()
        for _ in range(30):
            y = layer(x)
            if not torch.equal(y, expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_its_own(layer: SparseLinear) -> None:
    x = torch.ones(ROWS, 16)
    address = layer(x).data_ptr()  # kept from here on
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        y = layer(-x)
        os._exit(0 if y.data_ptr() == address else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    y = layer(x)
    assert y.data_ptr() == address
    assert torch.allclose(y, layer.to_dense()(x), atol=1e-6)
    del y


LIMITED = """
import torch, sparsetrain
layer = sparsetrain.nn.SparseLinear(16, 128, sparsity=0.5).requires_grad_(False)
results = [layer(torch.ones(8192, 16)) for _ in range(5)]
del results
kept, live, limit = torch.ops.sparsetrain.result_memory()
print(kept >> 20, live >> 20, limit >> 20)
"""


def _limited(mib: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SPARSETRAIN_CACHE_MIB": mib}
    command = [sys.executable, "-c", LIMITED]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize(
    ("mib", "seen"),
    [("0", "0 0 0"), ("11", "8 0 11"), ("64", "20 0 64"), ("", "20 0 1024")],
)
def test_the_limit_is_obeyed(mib: str, seen: str) -> None:
    run = _limited(mib)
    assert run.stdout.strip() == seen, run.stderr


@pytest.mark.parametrize("mib", ["-1", "1.5", "1G", "no", "99999999999999999999", "5000000000000"])
def test_a_limit_that_is_no_size_is_refused(mib: str) -> None:
    run = _limited(mib)
    assert run.returncode != 0
    assert f"SPARSETRAIN_CACHE_MIB='{mib}' is not a whole number of MiB" in run.stderr
    assert "0 for none" in run.stderr
