"""Putting other layers in the place of a model's layers: all checked first, then all at once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from sparsetrain.nn._select import Place, places
from sparsetrain.nn._state import guard

# Hooks that see a layer's inputs, outputs and their gradients: they do not care about its weight.
_CARRIED = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# Hooks that see its state_dict, whose keys change.
_REFUSED = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# What belongs to the weight of the old layer, not to its place.
_OWN = ("weight", "_pattern", "_active", "_recorder")


@dataclass(frozen=True)
class Replacement:
    """`new` shall stand wherever `old` stands."""

    old: Place
    new: nn.Module


def check_replaceable(model: nn.Module, chosen: Sequence[Place], inplace: bool) -> None:
    """Raises ValueError, naming the layer, where replacing it would lose or break something."""
    for place in chosen:
        _check_layer(place)
    everything = places(model)
    _check_ties(everything, chosen)
    if inplace:
        ids = {id(p.module): p for p in chosen}
        if id(model) in ids:
            raise ValueError(
                "the model itself is the layer to convert, which cannot be done in place: "
                "use the returned layer (inplace=False)"
            )
        for place in everything:
            _check_references(place, ids)


def is_pruned(module: nn.Module) -> bool:
    """Whether torch.nn.utils.prune masks the layer's weight."""
    return "weight_orig" in module._parameters and "weight_mask" in module._buffers


def _is_weight_pruning(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight"


def _check_layer(place: Place) -> None:
    module, name = place.module, place.name
    expected = {"weight", "weight_orig", "weight_mask", "values", "bias"}
    extra = [k for k in (*module._parameters, *module._buffers) if k not in expected]
    extra += list(module._modules)
    reason = ""
    if extra:
        reason = f"it holds {', '.join(extra)} besides weight and bias"
        if "bias_orig" in extra:
            reason += " (make the pruning of the bias permanent: prune.remove(layer, 'bias'))"
    elif "forward" in vars(module):
        reason = "its forward has been overridden on the instance"
    elif getattr(module, "_compiled_call_impl", None) is not None:
        reason = "it has been compiled by itself (compile the model after converting it)"
    for attribute in _REFUSED:
        if getattr(module, attribute, None):
            reason = f"it has state_dict hooks ({attribute}), made for other keys"
    for key, tensor in module._parameters.items():
        post = getattr(tensor, "_post_accumulate_grad_hooks", None)
        if key != "bias" and tensor is not None and (tensor._backward_hooks or post):
            reason = f"its {key} has tensor hooks, made for another shape"
    if reason:
        raise ValueError(
            f"layer {name} cannot be converted: {reason}; remove that, or exclude={name!r}"
        )


def _location(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for Parameters that are the same object or the same memory."""
    if tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.numel())


def _check_ties(everything: Sequence[Place], chosen: Sequence[Place]) -> None:
    users: dict[tuple[Any, ...], list[str]] = {}
    for place in everything:
        for key, parameter in place.module._parameters.items():
            if parameter is not None and type(parameter).__name__ != "UninitializedParameter":
                full = f"{place.name} ({type(place.module).__name__}.{key})"
                users.setdefault(_location(parameter), []).append(full)
    for place in chosen:
        for key, parameter in place.module._parameters.items():
            if key == "bias" or parameter is None:
                continue  # a bias stays the same object, tied or not
            names = users[_location(parameter)]
            if len(names) > 1:
                raise ValueError(
                    f"layer {place.name} cannot be converted: its {key} is tied, one tensor used "
                    f"by {' and '.join(names)}; exclude={place.name!r}, or untie it"
                )


def _check_references(place: Place, ids: Mapping[int, Place]) -> None:
    """Refuses layers that a module also keeps outside its registered submodules."""
    for attribute, value in vars(place.module).items():
        if attribute in ("_modules", "_parameters", "_buffers") or "hook" in attribute:
            continue
        held = list(value.values()) if isinstance(value, Mapping) else value
        for item in held if isinstance(held, (list, tuple, set)) else (held,):
            if id(item) in ids:
                raise ValueError(
                    f"layer {ids[id(item)].name} cannot be converted in place: attribute "
                    f"{attribute!r} of {place.name} refers to it as well; use inplace=False"
                )


def replace(model: nn.Module, replacements: Sequence[Replacement], inplace: bool) -> nn.Module:
    """The model with the replacements made, or a deep copy of it with them made.

    A copy never copies the replaced layers' own weights. Biases, hooks and further attributes of a
    replaced layer go over to the new one: the same objects in place, copies in a copy.
    """
    if inplace:
        by_id = {id(r.old.module): r for r in replacements}
        for module in list(model.modules()):
            for key, child in module._modules.items():
                if id(child) in by_id:
                    module._modules[key] = by_id[id(child)].new
        for replacement in replacements:
            _carry(replacement, None)
        guard(model)
        return model
    memo: dict[int, Any] = {id(r.old.module): r.new for r in replacements}
    result = copy.deepcopy(model, memo)
    for replacement in replacements:
        _carry(replacement, memo)
    guard(result)
    return result


def _carry(replacement: Replacement, memo: dict[int, Any] | None) -> None:
    """Takes the old layer's bias, hooks and further attributes over into the new one."""
    old, new = replacement.old.module, replacement.new

    def own(value: Any) -> Any:
        return value if memo is None else copy.deepcopy(value, memo)

    if old._parameters.get("bias") is not None:
        new._parameters["bias"] = own(old._parameters["bias"])
    hooks = {name: getattr(old, name) for name in _CARRIED}
    if is_pruned(old):
        hooks["_forward_pre_hooks"] = OrderedDict(
            (key, hook)
            for key, hook in old._forward_pre_hooks.items()
            if not _is_weight_pruning(hook)
        )
    for name, value in hooks.items():
        object.__setattr__(new, name, own(value))
    for name, value in vars(old).items():
        if name not in vars(new) and name not in _OWN:
            object.__setattr__(new, name, own(value))
