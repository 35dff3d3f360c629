"""The layers that are measured, all built from one dense weight with zeros in it.

Each class hides one library: how it is built, called, and where its weight gradient lies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.bench.problems import Layer, Problem, Reference
from sparsetrain.bench.timing import Json

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class Contestant:
    """A layer with this dense weight and bias. Subclasses build `module` in __init__."""

    name = ""
    kinds: tuple[str, ...] = ("linear", "conv2d")  # of layers that the library has
    module: nn.Module

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result for its input."""
        result: Tensor = self.module(x)
        return result

    def weight_grad(self) -> Tensor:
        """(nnz,): the gradient at the nonzeros of the weight, row by row."""
        raise NotImplementedError

    def prepare(self, x: Tensor, grad: Tensor) -> None:
        """Untimed, once, before the check: what a user does once per model."""

    def train_step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward as in training: every gradient is allocated anew."""
        x.grad = None
        for parameter in self.module.parameters():
            parameter.grad = None
        torch.autograd.backward(self.forward(x), grad)

    def results(self, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """One training step: y, dx, dw and, with a bias, db."""
        x.grad = None
        self.module.zero_grad()
        y = self.forward(x)
        torch.autograd.backward(y, grad)
        found = {"y": y, "dx": _grad(x), "dw": self.weight_grad()}
        bias: Any = getattr(self.module, "bias", None)
        if bias is not None:
            found["db"] = _grad(bias)
        return found


def _grad(parameter: Any) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("backward gave a parameter no gradient")
    gradient: Tensor = parameter.grad
    return gradient


class Dense(Contestant):
    """What a user does today: the same layer with zeros in its weight."""

    name = "dense"

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        self.module = layer.dense(weight, bias)
        self.mask = weight != 0

    def weight_grad(self) -> Tensor:
        return _grad(self.module.weight)[self.mask]


class SparseTrain(Contestant):
    """This library, as it comes."""

    name = "sparsetrain"

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        from sparsetrain import nn as sparse

        kind: Any = sparse.SparseLinear if layer.kind == "linear" else sparse.SparseConv2d
        mask = weight != 0
        self.module = kind.from_dense(layer.dense(weight, bias), mask)

    def weight_grad(self) -> Tensor:
        return _grad(self.module.values)


class Tuned(SparseTrain):
    """This library after `sparsetrain.tune` on this very layer and input."""

    name = "tuned"
    budget_s = 2.0

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        if not can_tune():
            raise ImportError("this sparsetrain has no sparsetrain.tune")
        super().__init__(layer, weight, bias)

    def prepare(self, x: Tensor, grad: Tensor) -> None:
        import sparsetrain

        tune: Any = sparsetrain.tune  # type: ignore[attr-defined,unused-ignore]
        tune(self.module, x, budget_s=self.budget_s)


def can_tune() -> bool:
    """Whether this sparsetrain has a tuner."""
    import sparsetrain

    return callable(getattr(sparsetrain, "tune", None))


class SparseProp(Contestant):
    """The SparseProp authors' linear layer (arXiv 2302.04852)."""

    name = "sparseprop"
    kinds = ("linear",)

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        from sparseprop.modules import SparseLinear

        self.module = SparseLinear.from_dense(layer.dense(weight, bias))

    def weight_grad(self) -> Tensor:
        return _grad(self.module.W_val)


class SparsePropPixels(Contestant):
    """The SparseProp authors' convolution, vectorised over the pixels of a row."""

    name = "sparseprop pixels"
    kinds = ("conv2d",)
    over_pixels = True

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        from sparseprop.modules import SparseConv2d

        dense = layer.dense(weight, bias)
        self.module = SparseConv2d.from_dense(dense, vectorizing_over_on=self.over_pixels)
        self._weight = weight

    def weight_grad(self) -> Tensor:
        """Its nonzeros lie output by output and input by input, as ours do."""
        return _grad(self.module.W_val)


class SparsePropBatch(SparsePropPixels):
    """The same, vectorised over the samples: every activation is transposed there and back."""

    name = "sparseprop batch"
    over_pixels = False


class SparseLab(Contestant):
    """sparselab: rows padded by its default 20 % for later growth."""

    name = "sparselab"
    kinds = ("linear",)

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        import sparselab

        # Its cache of transposes is keyed by id(): a layer that was freed before may leave a
        # wrong entry for this one, which ends in an IndexError. One model alone never sees that.
        sparselab.ops._clear_transpose_cache()
        module = sparselab.SparseLinear(layer.inputs, layer.outputs, sparsity=0.5)
        module._csr = sparselab.PaddedCSR.from_dense(weight)
        module._values = nn.Parameter(torch.as_tensor(module._csr.values))
        with torch.no_grad():
            module.bias.zero_() if bias is None else module.bias.copy_(bias)
        self.module = module

    def weight_grad(self) -> Tensor:
        module: Any = self.module
        live = torch.tensor(module._csr.col_indices) >= 0  # padding slots hold -1
        return _grad(module._values)[live]


class TorchCsr(Contestant):
    """torch.sparse CSR times dense (MKL): forward only, it has no gradient for its values."""

    name = "torch.sparse"
    kinds = ("linear",)

    def __init__(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.to_sparse_csr()
        self.bias = None if bias is None else bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        y = (self.weight @ x.t()).t()
        return y if self.bias is None else y + self.bias


OWN: tuple[type[Contestant], ...] = (SparseTrain,)
PEERS: tuple[type[Contestant], ...] = (SparseProp, SparsePropPixels, SparsePropBatch, SparseLab)


def build(
    kind: type[Contestant], layer: Layer, weight: Tensor, bias: Tensor | None
) -> tuple[Contestant | None, Json]:
    """A contestant, or None with the reason: `absent` (not installed) or `crashed`."""
    try:
        return kind(layer, weight, bias), {"status": "ok"}
    except ImportError as error:
        return None, {"status": "absent", "detail": str(error)}
    except Exception as error:
        return None, {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}


def check(contestant: Contestant, reference: Reference, problem: Problem) -> Json:
    """One training step of the contestant against the reference."""
    x, grad = problem.x, problem.grad

    def results() -> dict[str, Tensor]:
        contestant.prepare(x, grad)
        return contestant.results(x, grad)

    return reference.verdict(results)


def check_forward(contestant: Contestant, reference: Reference, problem: Problem) -> Json:
    """The forward pass alone."""
    with torch.no_grad():
        return reference.verdict(lambda: {"y": contestant.forward(problem.x)})


Step = Callable[[], object]
