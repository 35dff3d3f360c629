"""The linear layers that are measured, all built from one dense weight with zeros in it.

Each class hides one library: how it is built, called, and where its weight gradient lies.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from _harness import Json
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
ERROR_BOUND = 4.0  # times eps |a| |b|; the worst seen is 1.8 (MKL, batch 128, dense gradient)


class Contestant:
    """A layer with weight (out, in), bias (out,). Subclasses build `layer` in __init__."""

    name = ""
    layer: nn.Module

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in) -> (batch, out)"""
        result: Tensor = self.layer(x)
        return result

    def weight_grad(self) -> Tensor:
        """(nnz,): the gradient at the nonzeros of the weight, row by row."""
        raise NotImplementedError

    def bias_grad(self) -> Tensor:
        """(out,)"""
        return _grad(self.layer.bias)

    def train_step(self, x: Tensor, grad: Tensor) -> None:
        """Forward and backward as in training: every gradient is allocated anew."""
        x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        torch.autograd.backward(self.forward(x), grad)


def _grad(parameter: Any) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("backward gave a parameter no gradient")
    gradient: Tensor = parameter.grad
    return gradient


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class Dense(Contestant):
    """What a user does today: the same layer with zeros in its weight."""

    name = "dense"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.layer = _linear(weight, bias)
        self.mask = weight != 0

    def weight_grad(self) -> Tensor:
        return _grad(self.layer.weight)[self.mask]


class SparseTrain(Contestant):
    """This library."""

    name = "sparsetrain"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        from sparsetrain.nn import SparseLinear

        self.layer = SparseLinear.from_dense(_linear(weight, bias))

    def weight_grad(self) -> Tensor:
        return _grad(self.layer.values)


class SparseProp(Contestant):
    """The SparseProp authors' implementation (arXiv 2302.04852)."""

    name = "sparseprop"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        from sparseprop.modules import SparseLinear  # type: ignore[import-not-found]

        self.layer = SparseLinear.from_dense(_linear(weight, bias))

    def weight_grad(self) -> Tensor:
        return _grad(self.layer.W_val)


class SparseLab(Contestant):
    """sparselab: rows padded by its default 20 % for later growth."""

    name = "sparselab"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        import sparselab  # type: ignore[import-not-found]

        # Its cache of transposes is keyed by id(): a layer that was freed before may leave a
        # wrong entry for this one, which ends in an IndexError. One model alone never sees that.
        sparselab.ops._clear_transpose_cache()
        out, width = weight.shape
        layer = sparselab.SparseLinear(width, out, sparsity=0.5)
        layer._csr = sparselab.PaddedCSR.from_dense(weight)
        layer._values = nn.Parameter(torch.as_tensor(layer._csr.values))
        with torch.no_grad():
            layer.bias.copy_(bias)
        self.layer = layer

    def weight_grad(self) -> Tensor:
        live = torch.tensor(self.layer._csr.col_indices) >= 0  # padding slots hold -1
        return _grad(self.layer._values)[live]


class TorchCsr(Contestant):
    """torch.sparse CSR times dense (MKL): forward only, it has no gradient for its values."""

    name = "torch.sparse"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight = weight.to_sparse_csr()
        self.bias = bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.t()).t() + self.bias


OWN: tuple[type[Contestant], ...] = (Dense, SparseTrain)
PEERS: tuple[type[Contestant], ...] = (SparseProp, SparseLab)


def build(kind: type[Contestant], weight: Tensor, bias: Tensor) -> tuple[Contestant | None, Json]:
    """A contestant, or None with the reason: `absent` (not installed) or `crashed`."""
    try:
        return kind(weight, bias), {"status": "ok"}
    except ImportError as error:
        return None, {"status": "absent", "detail": str(error)}
    except Exception as error:
        return None, {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}


def sparse_weight(out: int, width: int, sparsity: float, seed: int = 0) -> Tensor:
    """(out, in) float32 with exactly round((1 - sparsity) out in) nonzeros at random places."""
    generator = torch.Generator().manual_seed(seed)
    nnz = max(1, round((1 - sparsity) * out * width))
    weight = torch.zeros(out * width)
    places = torch.randperm(out * width, generator=generator)[:nnz]
    values = torch.randn(nnz, generator=generator)
    values[values == 0] = 1.0
    weight[places] = values * (out / nnz) ** 0.5
    return weight.view(out, width)


class Reference:
    """The masked dense layer in float64, and the error each float32 result may have.

    A sum of products a.b done in float32 in any order is off by a small multiple of
    eps |a| |b|: that, times ERROR_BOUND, is the bound for each element of each result.
    """

    def __init__(self, weight: Tensor, bias: Tensor, x: Tensor, grad: Tensor) -> None:
        w, b, x, g = (t.detach().double() for t in (weight, bias, x, grad))
        self.mask = weight != 0
        unit = ERROR_BOUND * torch.finfo(torch.float32).eps
        self.y = x @ w.t() + b
        self.y_bound = unit * (x.norm(dim=1)[:, None] * w.norm(dim=1)[None, :] + b.abs())
        self.dx = g @ w
        self.dx_bound = unit * g.norm(dim=1)[:, None] * w.norm(dim=0)[None, :]
        self.dw = (g.t() @ x)[self.mask]
        self.dw_bound = unit * (g.norm(dim=0)[:, None] * x.norm(dim=0)[None, :])[self.mask]
        self.db = g.sum(dim=0)
        self.db_bound = unit * g.norm(dim=0) * len(g) ** 0.5

    def _worst(self, name: str, got: Tensor) -> float:
        """Largest error, as a fraction of what is allowed; infinite for NaN or a wrong shape."""
        expected: Tensor = getattr(self, name)
        bound: Tensor = getattr(self, f"{name}_bound")
        if got.shape != expected.shape or not bool(torch.isfinite(got).all()):
            return float("inf")
        return float(((got.detach().double() - expected).abs() / bound.clamp_min(1e-300)).max())

    def check(self, contestant: Contestant, x: Tensor, grad: Tensor) -> Json:
        """One training step of the contestant against the reference."""

        def results() -> dict[str, Tensor]:
            x.grad = None
            contestant.layer.zero_grad()
            y = contestant.forward(x)
            torch.autograd.backward(y, grad)
            return {
                "y": y,
                "dx": _grad(x),
                "dw": contestant.weight_grad(),
                "db": contestant.bias_grad(),
            }

        return self._verdict(results)

    def check_forward(self, contestant: Contestant, x: Tensor) -> Json:
        """The forward pass alone."""
        return self._verdict(lambda: {"y": contestant.forward(x)})

    def _verdict(self, results: Any) -> Json:
        try:
            errors = {name: self._worst(name, got) for name, got in results().items()}
        except Exception as error:
            return {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}
        wrong = [name for name, error in errors.items() if not error <= 1]
        rounded = {name: float(f"{error:.3g}") for name, error in errors.items()}
        if wrong:
            detail = f"wrong {', '.join(wrong)}: error / bound {rounded}"
            return {"status": "wrong", "detail": detail}
        return {"status": "ok", "error_over_bound": rounded}
