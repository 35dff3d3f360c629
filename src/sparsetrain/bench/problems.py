"""One layer on one input: what every contestant computes, and the float64 reference for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.bench.timing import Json

ERROR_BOUND = 4.0  # times eps |a| |b|; the worst seen is 1.8 (MKL, batch 128, dense gradient)


@dataclass(frozen=True)
class Layer:
    """A layer and its batch, as a table of a shapes file describes it.

    kind "linear" has `inputs`, `outputs` and (batch * tokens) rows; "conv2d" has input channels
    `inputs`, output channels `outputs`, and images of `size` x `size` pixels.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    batch: int
    tokens: int = 1
    size: int = 1
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = True
    targets: str | None = None  # a table of the shapes file; None: measured without a target

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.kind == "linear":
            return (self.outputs, self.inputs)
        return (self.outputs, self.inputs // self.groups, self.kernel, self.kernel)

    @property
    def input_shape(self) -> tuple[int, ...]:
        if self.kind == "linear":
            return (self.batch * self.tokens, self.inputs)
        return (self.batch, self.inputs, self.size, self.size)

    @property
    def positions(self) -> int:
        """Samples, or output pixels of all samples: what every weight is multiplied with."""
        if self.kind == "linear":
            return self.batch * self.tokens
        side = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        return self.batch * side * side

    def flops(self, sparsity: float) -> float:
        """Useful flops of one of the three products: 2 per nonzero and position."""
        weights = math.prod(self.weight_shape)
        return 2.0 * self.positions * max(1, round((1 - sparsity) * weights))

    def dense(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The torch.nn layer with copies of these tensors, in their dtype."""
        layer: Any
        if self.kind == "linear":
            layer = nn.Linear(self.inputs, self.outputs, bias is not None, device="meta")
        else:
            layer = nn.Conv2d(
                self.inputs,
                self.outputs,
                self.kernel,
                self.stride,
                self.padding,
                groups=self.groups,
                bias=bias is not None,
                device="meta",
            )
        layer.weight = nn.Parameter(weight.clone())
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        return layer  # type: ignore[no-any-return]

    def describe(self) -> Json:
        """The fields that say what was measured, for the result file."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "batch", "targets")}


def layer_from(table: Json) -> Layer:
    """A Layer from a [[layer]] table. Raises ValueError with the name of a wrong key."""
    fields = dict(table, kind=table.get("kind", "linear"))
    for old, new in (("in_features", "inputs"), ("out_features", "outputs")):
        if old in fields:
            fields[new] = fields.pop(old)
    if fields["kind"] not in ("linear", "conv2d"):
        raise ValueError(f"[[layer]] kind: got {fields['kind']!r}, takes 'linear' or 'conv2d'")
    unknown = set(fields) - set(Layer.__dataclass_fields__)
    missing = {"name", "inputs", "outputs", "batch"} - set(fields)
    if unknown or missing:
        raise ValueError(
            f"[[layer]] {fields.get('name', '')!r}: unknown keys {sorted(unknown)}, missing keys "
            f"{sorted(missing)}; it takes {', '.join(Layer.__dataclass_fields__)}"
        )
    return Layer(**fields)


def sparse_weight(shape: tuple[int, ...], sparsity: float, seed: int = 0) -> Tensor:
    """float32 of this shape with exactly round((1 - sparsity) numel) nonzeros at random places."""
    generator = torch.Generator().manual_seed(seed)
    total = math.prod(shape)
    nnz = max(1, round((1 - sparsity) * total))
    weight = torch.zeros(total)
    places = torch.randperm(total, generator=generator)[:nnz]
    values = torch.randn(nnz, generator=generator)
    values[values == 0] = 1.0
    weight[places] = values * (shape[0] / nnz) ** 0.5
    return weight.view(shape)


class Problem:
    """Input, upstream gradient and bias of a layer, and what is expected of any weight on them.

    The reference is the masked dense layer in float64. A sum of products a.b done in float32 in
    any order is off by a small multiple of eps |a| |b|: that, times ERROR_BOUND, is the bound for
    each element of each result. The result and the gradient of the input of a linear layer are
    compared row by row. Those of a convolution, which would take seconds each, by linear
    combinations of the samples: the first, the last, and all of them with random signs, which shows
    an error in any one (Freivalds 1977). Gradients of weight and bias are always compared whole.
    """

    def __init__(self, layer: Layer, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.layer = layer
        self.bias = draw(layer.outputs) if layer.bias else None
        self.x = draw(*layer.input_shape).requires_grad_()
        module = layer.dense(torch.empty(layer.weight_shape, device="meta"), None)
        shape = module(torch.empty(layer.input_shape, device="meta")).shape
        self.grad = draw(*shape)
        self._mix: Tensor | None = None
        if layer.kind != "linear":
            signs = torch.randint(2, (layer.batch,), generator=generator) * 2.0 - 1
            one = torch.eye(layer.batch)
            self._mix = torch.stack([one[0], one[-1], signs]).double()
        self._whole: dict[str, Tensor] = {}  # dw, db and their bounds: the same for every weight

    def mixed(self, tensor: Tensor) -> Tensor:
        """The compared combinations of the samples, in float64."""
        tensor = tensor.detach().double()
        if self._mix is None:
            return tensor
        mixed: Tensor = torch.tensordot(self._mix, tensor, dims=1)
        return mixed

    def _mixed_norm(self, bound: Tensor) -> Tensor:
        """Bound of a combination, from the bounds of its samples, whose errors are independent."""
        if self._mix is None:
            return bound
        squares: Tensor = torch.tensordot(self._mix.square(), bound.square(), dims=1)
        return squares.sqrt()

    def _run(self, weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor) -> Tensor:
        """Forward and backward of the float64 layer on (x, grad); y, with gradients left in place.

        `x` and `weight` get a gradient where they require one.
        """
        layer, functional = self.layer, nn.functional
        if layer.kind == "linear":
            y = functional.linear(x, weight, bias)
        else:
            window = (layer.stride, layer.padding, 1, layer.groups)
            y = functional.conv2d(x, weight, bias, *window)
        torch.autograd.backward(y, grad)
        return y.detach()

    def _weight_gradient(self) -> dict[str, Tensor]:
        """dw, db and their bounds, computed once."""
        if not self._whole:
            x, grad = self.x.detach().double(), self.grad.double()
            weight = torch.zeros(self.layer.weight_shape, dtype=torch.float64, requires_grad=True)
            self._run(weight, None, x, grad)
            unit = ERROR_BOUND * torch.finfo(torch.float32).eps
            rest = [d for d in range(x.dim()) if d != 1]
            g_norm, x_norm = grad.square().sum(rest).sqrt(), x.square().sum(rest).sqrt()
            groups, outputs = self.layer.groups, self.layer.outputs
            inputs = x_norm.view(groups, -1).repeat_interleave(outputs // groups, dim=0)
            bound = (unit * g_norm[:, None] * inputs).reshape(
                *inputs.shape, *[1] * (weight.dim() - 2)
            )
            count = grad.numel() / outputs
            self._whole = {
                "dw": _gradient(weight),
                "dw_bound": bound.expand(weight.shape),
                "db": grad.sum(rest),
                "db_bound": unit * g_norm * count**0.5,
            }
        return self._whole

    def reference(self, weight: Tensor) -> Reference:
        """What a contestant with this float32 weight must give."""
        mask, w = weight != 0, weight.detach().double()
        bias = None if self.bias is None else self.bias.double()
        x, grad = self.mixed(self.x).requires_grad_(), self.mixed(self.grad)
        y = self._run(w, None, x, grad)
        if bias is not None:
            count = 1.0 if self._mix is None else self._mix.sum(1).view(-1, 1, 1, 1)
            y = y + bias.view(1, -1, *[1] * (y.dim() - 2)) * count
        # Norms of what is summed up: of the patch of the input and of the row of the weight; of the
        # patch of the gradient and of the column of the weight.
        ones = torch.ones_like(w[:, :1]) if self.layer.groups == 1 else torch.ones_like(w)
        many = self.layer.groups > 1
        x2, g2 = self.x.detach().double().square(), self.grad.double().square()
        x2 = (x2 if many else x2.sum(1, keepdim=True)).requires_grad_()
        patches = self._patches(x2, ones, g2)
        rows = w.flatten(1).norm(dim=1).view(1, -1, *[1] * (y.dim() - 2))
        columns = w.square().sum([0, *range(2, w.dim())]).sqrt()
        if many:  # the largest column of any group, for all
            columns = columns.max().expand(self.layer.inputs)
        unit = ERROR_BOUND * torch.finfo(torch.float32).eps
        y_bound = unit * (patches * rows + (0 if bias is None else bias.abs().view_as(rows)))
        dx_bound = unit * _gradient(x2).sqrt() * columns.view(1, -1, *[1] * (y.dim() - 2))
        whole = self._weight_gradient()
        expected = {
            "y": (y, self._mixed_norm(y_bound)),
            "dx": (_gradient(x), self._mixed_norm(dx_bound)),
            "dw": (whole["dw"][mask], whole["dw_bound"][mask]),
        }
        if self.bias is not None:
            expected["db"] = (whole["db"], whole["db_bound"])
        return Reference(self, expected)

    def _patches(self, x2: Tensor, ones: Tensor, g2: Tensor) -> Tensor:
        """sqrt of the sum of squares under each position; leaves the same of g2 in x2.grad."""
        if self.layer.kind == "linear":
            y = x2 * 1.0
            torch.autograd.backward(y, g2.sum(1, keepdim=True))
            return y.detach().sqrt()
        window = (self.layer.stride, self.layer.padding, 1, self.layer.groups)
        if self.layer.groups == 1:
            ones, g2 = ones[:1], g2.sum(1, keepdim=True)
        y = nn.functional.conv2d(x2, ones, None, *window)
        torch.autograd.backward(y, g2)
        return y.detach().sqrt()


def _gradient(tensor: Any) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("backward gave a tensor no gradient")
    gradient: Tensor = tensor.grad
    return gradient


class Reference:
    """Expected results with their bounds: y and dx of the compared samples, dw, db whole."""

    def __init__(self, problem: Problem, expected: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._problem, self._expected = problem, expected

    def _worst(self, name: str, got: Tensor) -> float:
        """Largest error, as a fraction of what is allowed; infinite for NaN or a wrong shape."""
        expected, bound = self._expected[name]
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        got = self._problem.mixed(got) if name in ("y", "dx") else got.detach().double()
        if got.shape != expected.shape:
            return float("inf")
        return float(((got - expected).abs() / bound.clamp_min(1e-300)).max())

    def verdict(self, results: Callable[[], dict[str, Tensor]]) -> Json:
        """{"status": ok, wrong or crashed} for y, and dx, dw, db where a contestant has them."""
        try:
            got = results()
            errors = {name: self._worst(name, got[name]) for name in self._expected if name in got}
        except Exception as error:
            return {"status": "crashed", "detail": f"{type(error).__name__}: {error}"}
        wrong = [name for name, error in errors.items() if not error <= 1]
        rounded = {name: float(f"{error:.3g}") for name, error in errors.items()}
        if wrong:
            detail = f"wrong {', '.join(wrong)}: error / bound {rounded}"
            return {"status": "wrong", "detail": detail}
        return {"status": "ok", "error_over_bound": rounded}
