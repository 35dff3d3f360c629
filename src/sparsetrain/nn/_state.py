"""Saving and loading sparse layers: whole or not at all, and never an invalid topology.

A layer's keys are `values`, `crow_indices`, `col_indices` and, if it has one, `bias`. They load
together or not at all: whatever is wrong with one of them is reported through the error list of
`load_state_dict`, naming the key, and the layer is as it was. Other layers may have loaded by then:

- A model that comes from `sparsify` or `to_sparse` has a `guard`, which looks at all sparse layers
  before any layer of the model is loaded. So damaged entries change nothing in the whole model.
- `sparsetrain.load_state_dict` takes back everything, for any model and whatever went wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsetrain.pattern import SparsePattern, flat_shape

if TYPE_CHECKING:
    from sparsetrain.nn._base import SparseLayer

_INDICES = ("crow_indices", "col_indices")


def load_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """`model.load_state_dict` that changes nothing at all if any part of it fails.

    Plain `model.load_state_dict` leaves a sparse layer as it was when something in the checkpoint
    is wrong for it, and a model made by `sparsify` or `to_sparse` as a whole when an entry of a
    sparse layer is damaged. But it may have loaded other layers when a key is missing or a dense
    layer does not fit. This function takes back those as well: every parameter, buffer, gradient
    and pattern of the model is as before. It needs a temporary copy of the model's tensors.

    Args:
        model: any module, with or without sparse layers.
        state_dict, strict, assign: as in torch.nn.Module.load_state_dict.

    Returns:
        The missing and unexpected keys, as torch does.

    Raises:
        RuntimeError: with all that is wrong, as torch does.
    """
    before = _Snapshot(model)
    try:
        return model.load_state_dict(state_dict, strict=strict, assign=assign)
    except BaseException:
        before.restore()
        raise


class _Snapshot:
    """Everything of a model that loading a state_dict may change."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [
            (m, dict(m._parameters), dict(m._buffers), m.__dict__.get("_pattern"))
            for m in model.modules()
        ]
        tensors = {
            id(t): t
            for _, parameters, buffers, _ in self.modules
            for t in (*parameters.values(), *buffers.values())
            if t is not None
        }
        self.tensors = [
            (t, t.data, t.data.clone(), t.grad if t.is_leaf else None) for t in tensors.values()
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, data, content, grad in self.tensors:
                data.copy_(content)
                if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
                    _set_data(tensor, data)
                    tensor.grad = grad
        for module, parameters, buffers, pattern in self.modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if pattern is not None:
                module._pattern = pattern


def save(layer: SparseLayer, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Writes the layer's state; the indices as copies, so that nobody can write into a pattern."""
    pattern = layer.pattern
    destination[prefix + "values"] = layer.values if keep_vars else layer.values.detach()
    destination[prefix + "crow_indices"] = pattern.crow_indices.clone()
    destination[prefix + "col_indices"] = pattern.col_indices.clone()
    for name, tensor in _other_state(layer).items():
        destination[prefix + name] = tensor if keep_vars else tensor.detach()
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:  # lost in safetensors, hence never required
        metadata.setdefault(prefix[:-1], {})["weight_shape"] = tuple(layer.weight_shape)


def load(
    layer: SparseLayer,
    state: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Loads the layer, or says in the three lists why not and leaves it as it was."""
    own = _own(state, prefix)
    others = _other_state(layer)
    core = _core(layer)
    known = {*core, *others, *layer._modules}
    missing_keys += [prefix + n for n in dict.fromkeys((*core, *others)) if n not in own]
    unexpected_keys += [prefix + n for n in own if n.split(".", 1)[0] not in known]
    if not any(name in own for name in core):
        return
    assign = bool(metadata.get("assign_to_params_buffers", False))
    pattern, faults = _inspect(layer, own, prefix, metadata, assign)
    if faults or pattern is None:
        error_msgs += faults
    else:
        _commit(layer, own, others, pattern, assign)


def guard(model: nn.Module) -> None:
    """Makes ``model.load_state_dict`` look at all sparse layers' entries before it loads any.

    Does nothing to a model that has this guard, and takes it away where no sparse layer is left.
    """
    hooks = model._load_state_dict_pre_hooks
    present = [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check_all]
    if "_pattern" in vars(model):  # a single layer is whole by itself
        return
    needed = any("_pattern" in vars(m) for m in model.modules())
    if needed and not present:
        model.register_load_state_dict_pre_hook(_check_all)  # type: ignore[no-untyped-call]
    elif not needed:
        for key in present:
            del hooks[key]


def _check_all(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    *_: Any,
) -> None:
    """Load hook of a whole model: raises if an entry of a sparse layer is damaged.

    Layers with missing entries are left to `load`, since a hook of theirs may yet provide them.
    """
    from sparsetrain.nn._base import SparseLayer

    metadata = getattr(state_dict, "_metadata", None) or {}
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    faults = []
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLayer):
            place = f"{prefix}{name}."
            own = _own(state_dict, place)
            if all(key in own for key in _core(layer)):
                faults += _inspect(layer, own, place, metadata.get(place[:-1], {}), assign)[1]
    if faults:
        raise RuntimeError(
            f"Error(s) in loading state_dict for {type(model).__name__}:\n\t" + "\n\t".join(faults)
        )


def _own(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _core(layer: SparseLayer) -> tuple[str, ...]:
    """The keys that load together or not at all."""
    return ("values", *_INDICES, *(() if layer.bias is None else ("bias",)))


def _inspect(
    layer: SparseLayer,
    own: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    assign: bool,
) -> tuple[SparsePattern | None, list[str]]:
    """The checkpoint's pattern, and all that is wrong with its entries for this layer."""
    missing = [name for name in _core(layer) if name not in own]
    faults = [_missing_fault(prefix, own, missing)] if missing else []
    if "bias" in own and layer.bias is None:
        faults.append(f'"{prefix}bias" is in the checkpoint, but the layer has no bias')
    pattern = _read_pattern(layer, own, prefix, metadata, faults)
    faults += _tensor_faults(layer, own, _other_state(layer), prefix, pattern, assign)
    return pattern, faults


def _other_state(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers besides `values`: the bias, and what a user registered."""
    named = (*layer._parameters.items(), *layer._buffers.items())
    skip = {"values", *layer._non_persistent_buffers_set}
    return {name: t for name, t in named if t is not None and name not in skip}


def _missing_fault(prefix: str, own: Mapping[str, Any], missing: list[str]) -> str:
    names = ", ".join(f'"{prefix}{name}"' for name in missing)
    message = f"{names} missing: a sparse layer loads whole or not at all"
    if "weight" in own:
        message += (
            f'. "{prefix}weight" is that of a dense layer: load it into the dense model and '
            "convert that with sparsetrain.to_sparse or sparsetrain.sparsify"
        )
    return message


def _read_pattern(
    layer: SparseLayer,
    own: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    faults: list[str],
) -> SparsePattern | None:
    """The checkpoint's validated pattern (the layer's own object if equal), or None and faults."""
    shape = metadata.get("weight_shape")
    if shape is not None and tuple(shape) != tuple(layer.weight_shape):
        faults.append(
            f"size mismatch for {prefix}values: the checkpoint holds a weight of shape "
            f"{tuple(shape)}, the layer's is {tuple(layer.weight_shape)}"
        )
        return None
    if any(name not in own for name in _INDICES):
        return None
    try:
        pattern = SparsePattern(
            own["crow_indices"], own["col_indices"], flat_shape(layer.weight_shape)
        )
    except (TypeError, ValueError) as error:
        faults.append(f'"{prefix}crow_indices" and "{prefix}col_indices": {error}')
        return None
    return layer.pattern if pattern == layer.pattern else pattern


def _tensor_faults(
    layer: SparseLayer,
    own: Mapping[str, Any],
    others: Mapping[str, Tensor],
    prefix: str,
    pattern: SparsePattern | None,
    assign: bool,
) -> list[str]:
    """What is wrong with the checkpoint's values, bias and further tensors."""
    faults = []
    shapes = {name: tuple(tensor.shape) for name, tensor in others.items()}
    if pattern is not None:
        shapes["values"] = (pattern.nnz,)
    for name in ("values", *others):
        if name not in own:
            continue
        key, tensor, mine = prefix + name, own[name], getattr(layer, name)
        if not isinstance(tensor, Tensor):
            faults.append(f'"{key}" must be a tensor; got {type(tensor).__name__}')
        elif tensor.layout != torch.strided or (tensor.is_meta and not mine.is_meta):
            faults.append(f'"{key}" must be an ordinary tensor with data')
        elif mine.is_meta and not tensor.is_meta and not assign:
            faults.append(
                f'"{key}" cannot be copied into a meta tensor: call layer.to_empty(device="cpu") '
                "first, or load with assign=True"
            )
        elif mine.is_floating_point() and not tensor.is_floating_point():
            faults.append(f'"{key}" must be floating-point; got {tensor.dtype}')
        elif name in shapes and tuple(tensor.shape) != shapes[name]:
            faults.append(
                f"size mismatch for {key}: the checkpoint holds shape {tuple(tensor.shape)}, "
                f"expected {shapes[name]}"
            )
    return faults


def _commit(
    layer: SparseLayer,
    own: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    pattern: SparsePattern,
    assign: bool,
) -> None:
    """Takes over what has been checked."""
    if assign:
        for name in ("values", *others):
            if name in own:
                setattr(layer, name, _assigned(getattr(layer, name), own[name]))
    else:
        if pattern is layer.pattern:
            with torch.no_grad():
                layer.values.copy_(own["values"])
        else:
            replace_data(layer.values, own["values"])
        with torch.no_grad():
            for name, tensor in others.items():
                if name in own:
                    tensor.copy_(own[name])
    layer._pattern = pattern


def _assigned(mine: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the role of `mine`: a Parameter with the same requires_grad, or a buffer."""
    if not isinstance(mine, nn.Parameter):
        return tensor
    if not isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=mine.requires_grad)
    return tensor.requires_grad_(mine.requires_grad)


def replace_data(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives a Parameter a copy of `values`, of any length, in its own dtype; drops its gradient."""
    with torch.inference_mode(False), torch.no_grad():
        data = values.detach().to(parameter.device, parameter.dtype, copy=True).contiguous()
        _set_data(parameter, data)
        parameter.grad = None


def _set_data(tensor: Tensor, data: Tensor) -> None:
    """``tensor.data = data`` where the length may differ.

    A gradient accumulator that something keeps alive (an old graph, a hook) remembers the length
    that its tensor had, and would refuse the next gradient. Torch renews it when the dtype changes
    on the way, but not for the length.
    """
    if tensor.grad is not None:
        tensor.grad = None
    if tensor.is_floating_point() and tensor.shape != data.shape:
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
