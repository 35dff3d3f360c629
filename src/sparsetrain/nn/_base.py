"""What all sparse layers share: a pattern, the `values` on it, and their life cycle."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sparsetrain.nn import _state
from sparsetrain.pattern import SparsePattern, flat_shape

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class Recorder(Protocol):
    """What is told of a layer's inputs and outputs."""

    def saw(self, input: Tensor, output: Tensor) -> None: ...


_Layer = TypeVar("_Layer", bound="SparseLayer")
_Module = TypeVar("_Module", bound=nn.Module)


class SparseLayer(nn.Module):
    """A layer whose weight is `values` on a `SparsePattern`.

    `values` is an ordinary one-dimensional Parameter of length nnz in CSR order, so optimizers,
    clipping and averaging work on the nonzeros alone. The pattern is no buffer: dtype conversions
    cannot reach the indices, and it lives on the CPU. A state_dict holds `values`, `crow_indices`,
    `col_indices` and `bias`; it loads into a layer of the same shape with any other pattern.

    A subclass sets its own attributes, calls `_create_state`, and provides `weight_shape`,
    `from_dense`, `to_dense` and `forward`.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    _pattern: SparsePattern
    # Set on an instance by sparse-training algorithms, for as long as they need it:
    _active: Tensor | None = None  # bool (nnz,): the forward pass sees zero for the others
    _recorder: Recorder | None = None  # sees each input, and later the gradient of its output

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight, (out, ...)."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls: type[_Layer], dense: Any, mask: Tensor | None = None) -> _Layer:
        """An independent sparse copy of a dense layer; see the subclass."""
        raise NotImplementedError

    def to_dense(self) -> nn.Module:
        """An independent dense copy of this layer; see the subclass."""
        raise NotImplementedError

    def _create_state(
        self,
        pattern: SparsePattern | None,
        sparsity: float,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Creates and initialises pattern (random where None), values (nnz,) and bias (out,)."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(
                f"dtype must be torch.float32, torch.float64 or torch.bfloat16; got {dtype}"
            )
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            raise ValueError(f"device must be 'cpu' (or 'meta'), all that kernels run on: {device}")
        if pattern is None:
            pattern = SparsePattern.random(self.weight_shape, sparsity)
        self._check_pattern(pattern)
        self._pattern = pattern
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _take_tensors(self, values: Tensor, bias: Tensor | None, like: nn.Module) -> None:
        """Replaces the Parameters by `values` and a copy of `bias`, flags as those of `like`."""
        weight = like._parameters.get("weight_orig", like._parameters.get("weight"))
        learns = True if weight is None else weight.requires_grad
        self.values = nn.Parameter(values.detach(), requires_grad=learns)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.train(like.training)

    def _fill_dense(self, dense: _Module) -> _Module:
        """Gives a dense layer copies of this one's weight and bias, and the same flags."""
        with torch.no_grad():
            weight = self.weight
        dense.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().clone()
            dense.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def reset_parameters(self) -> None:
        """Draws values and bias anew from U(-1/sqrt(n), 1/sqrt(n)), n the row's real fan-in.

        The rule of torch.nn.Linear with the number of weights that a row really has, so that
        activations keep their scale at any sparsity (Evci et al. 2022, "Gradient Flow in Sparse
        Neural Networks"). The bias of a row without weights starts at zero.
        """
        with torch.no_grad():
            counts = self._pattern.row_counts()
            bound = torch.where(counts > 0, counts.clamp(min=1).double().rsqrt(), 0.0)
            spread = torch.repeat_interleave(bound, counts, output_size=self.nnz)
            self.values.uniform_(-1, 1).mul_(spread.to(self.values))
            if self.bias is not None:
                self.bias.uniform_(-1, 1).mul_(bound.to(self.bias))

    @property
    def pattern(self) -> SparsePattern:
        """Where the weights are; `set_pattern` replaces it."""
        return self._pattern

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, ...) with zeros written out: a fresh tensor on each access.

        Gradients flow back into `values`; writing into it changes nothing.
        """
        return self._pattern.dense(self._forward_values()).view(self.weight_shape)

    def _forward_values(self) -> Tensor:
        """The values (nnz,) that the forward pass uses; gradients reach all of `values`."""
        values = self.values
        if self._active is None:
            return values
        return values + (torch.where(self._active, values, 0.0) - values).detach()

    def _recorded(self, input: Tensor, output: Tensor) -> Tensor:
        """`output`, shown to the recorder if there is one."""
        if self._recorder is not None:
            self._recorder.saw(input, output)
        return output

    @property
    def nnz(self) -> int:
        """How many weights exist."""
        return self._pattern.nnz

    @property
    def density(self) -> float:
        """nnz / number of weights of the dense layer."""
        return self._pattern.density

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return self._pattern.sparsity

    def set_pattern(self, pattern: SparsePattern, values: Tensor) -> None:
        """Replaces the topology; `values` stays the same Parameter object, its gradient is dropped.

        Optimizer state of the Parameter is not touched: where the number of nonzeros changes, carry
        it along or reset it before the next step.

        Args:
            pattern: of the same shape as the present one.
            values: (nnz,) of the new pattern, floating-point; copied, in the layer's dtype.

        Raises:
            TypeError: not a SparsePattern or not a floating-point tensor.
            ValueError: another shape or length. The layer is as it was.
        """
        self._check_pattern(pattern)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            got = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"values must be a floating-point tensor; got {got}")
        if values.shape != (pattern.nnz,):
            raise ValueError(
                f"values must have shape ({pattern.nnz},), one for each nonzero of the pattern; "
                f"got {tuple(values.shape)}"
            )
        _state.replace_data(self.values, values)
        self._pattern = pattern

    def _check_pattern(self, pattern: Any) -> None:
        if not isinstance(pattern, SparsePattern):
            raise TypeError(
                f"pattern must be a SparsePattern, for example SparsePattern.from_mask(mask); "
                f"got {type(pattern).__name__}"
            )
        expected = flat_shape(self.weight_shape)
        if pattern.shape != expected:
            raise ValueError(
                f"pattern must have the layer's weight shape {expected} (out, in); "
                f"got {pattern.shape}"
            )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        _state.save(self, destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        _state.load(
            self, state_dict, prefix, local_metadata, missing_keys, unexpected_keys, error_msgs
        )

    def _state_repr(self) -> str:
        return f"sparsity={self.sparsity:.4f}, nnz={self.nnz}"


def dense_weight(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight of a dense layer (out, ...), detached, and its pruning mask if it has one.

    Reads the `weight_orig` and `weight_mask` of `torch.nn.utils.prune`, whose `weight` attribute is
    only as fresh as the last forward pass.
    """
    with torch.no_grad():
        if "weight_orig" in layer._parameters and "weight_mask" in layer._buffers:
            original, mask = layer._parameters["weight_orig"], layer._buffers["weight_mask"]
            assert original is not None  # prune registers tensors
            assert mask is not None
            return original.detach() * mask.to(original.dtype), mask != 0
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach(), None


def sparse_parts(layer: nn.Module, mask: Tensor | None) -> tuple[SparsePattern, Tensor]:
    """Pattern and values (nnz,) of a dense layer.

    `mask`, bool of the weight's shape, says what to keep. Without it: what a pruning mask keeps
    (zeros that it keeps stay part of the pattern), else the nonzeros.
    """
    weight, pruning_mask = dense_weight(layer)
    if weight.dtype not in DTYPES:
        raise TypeError(
            f"the weight is {weight.dtype}; sparse layers take torch.float32, torch.float64 or "
            "torch.bfloat16: convert the layer first, for example with .float()"
        )
    if weight.device.type != "cpu":
        raise ValueError(
            f"the weight is on device '{weight.device}'; sparse layers run on the CPU: "
            "move the layer there first, with .cpu()"
        )
    if mask is None:
        mask = weight != 0 if pruning_mask is None else pruning_mask
    elif isinstance(mask, Tensor) and mask.shape != weight.shape:
        raise ValueError(
            f"mask must have the weight's shape {tuple(weight.shape)}; got {tuple(mask.shape)}"
        )
    pattern = SparsePattern.from_mask(mask)
    return pattern, pattern.gather(weight)
