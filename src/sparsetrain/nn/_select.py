"""Which layers of a model to convert: include and exclude, by name, type or predicate."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

Selector = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Selection = Selector | Iterable[Selector] | None


@dataclass(frozen=True)
class Place:
    """A module and all the names it has in the model (two, where it is used in two places)."""

    module: nn.Module
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[0] or "(the model itself)"


def check_model(model: nn.Module) -> nn.Module:
    """`model`, if it is a module; raises TypeError otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    return model


def places(model: nn.Module) -> list[Place]:
    """Every module of the model once, in the model's order."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [Place(module, tuple(names[key])) for key, module in modules.items()]


def select(
    model: nn.Module,
    kinds: Sequence[type[nn.Module]],
    include: Selection,
    exclude: Selection,
    *,
    exact: bool = True,
) -> list[Place]:
    """The layers of `kinds` that `include` names (all where None) and `exclude` does not.

    Args:
        model: where to look.
        kinds: types of layers that can be converted.
        include, exclude: a name, a glob over names, a module type, a predicate over (name, module),
            or several of these. A name also stands for everything below it.
        exact: whether a subclass of a kind is left out. It is left out with a warning, or with an
            error where it has parametrizations or was included by its own name or type.

    Raises:
        TypeError: a selector of another type, or a model that is no module.
        ValueError: a name or type that matches nothing, or nothing is left to convert.
    """
    everything = places(check_model(model))
    suited = [p for p in everything if isinstance(p.module, tuple(kinds))]
    included, excluded = _selectors(include, "include"), _selectors(exclude, "exclude")
    for selector in excluded:
        _check_matches(selector, "exclude", everything, suited)
    for selector in included or ():
        _check_matches(selector, "include", suited, suited)
    chosen = [
        p
        for p in suited
        if (include is None or any(_matches(s, p) for s in included))
        and not any(_matches(s, p) for s in excluded)
    ]
    plain = []
    for place in chosen:  # a loop, so that the warning's stacklevel is the caller of the caller
        if not exact or _is_plain(place, kinds, included):
            plain.append(place)
    if not plain:
        raise ValueError(_nothing(model, everything, suited, kinds))
    if exact and include is None and nn.Linear in kinds:
        _warn_of_conv1d([p for p in everything if not any(_matches(s, p) for s in excluded)])
    return plain


def _selectors(selection: Selection, argument: str) -> list[Selector]:
    if selection is None:
        return []
    if isinstance(selection, (str, type)) or not isinstance(selection, Iterable):
        selection = [selection]
    selectors = list(selection)
    for selector in selectors:
        is_module_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, (type, nn.Module))
        if not (isinstance(selector, str) or is_module_type or is_predicate):
            raise TypeError(
                f"{argument} takes names, globs, torch.nn.Module types or predicates over "
                f"(name, module); got {selector!r}"
            )
    return selectors


def _matches(selector: Selector, place: Place) -> bool:
    if isinstance(selector, str):
        return any(_name_matches(selector, name) for name in place.names)
    if isinstance(selector, type):
        return isinstance(place.module, selector)
    return any(bool(selector(name, place.module)) for name in place.names)


def _name_matches(pattern: str, name: str) -> bool:
    """Whether the glob matches the name or one of the modules around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _check_matches(
    selector: Selector, argument: str, among: Sequence[Place], suited: Sequence[Place]
) -> None:
    """A name or a type that matches nothing is a mistake; a predicate may well say no."""
    if not isinstance(selector, (str, type)) or any(_matches(selector, p) for p in among):
        return
    shown = repr(selector) if isinstance(selector, str) else selector.__name__
    raise ValueError(
        f"{argument} names {shown}, which matches nothing; the layers are: {_listed(suited)}"
    )


def _is_plain(place: Place, kinds: Sequence[type[nn.Module]], included: Sequence[Selector]) -> bool:
    """Whether the layer is exactly of a kind; what else it may be is refused or left dense."""
    module, name = place.module, place.name
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"layer {name} has parametrizations, which a sparse layer cannot carry: bake them in "
            f"with torch.nn.utils.parametrize.remove_parametrizations, or exclude={name!r}"
        )
    if any(p is not None and is_lazy(p) for p in module._parameters.values()):
        raise ValueError(
            f"layer {name} ({type(module).__name__}) has no weights yet: run a forward pass first"
        )
    if type(module) in kinds:
        return True
    asked = any(s in place.names if isinstance(s, str) else s is type(module) for s in included)
    if asked:
        raise ValueError(
            f"layer {name} is a {type(module).__name__}, whose own behaviour a sparse layer would "
            f"not keep; only these types themselves are converted: {_type_names(kinds)}"
        )
    if not isinstance(module, NonDynamicallyQuantizableLinear):
        warnings.warn(
            f"layer {name} stays dense: it is a {type(module).__name__}, and only these types "
            f"themselves are converted: {_type_names(kinds)}; exclude={name!r} silences this",
            stacklevel=4,
        )
    return False


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, told by its name: nothing here needs transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _warn_of_conv1d(left: Sequence[Place]) -> None:
    found = [p for p in left if is_conv1d(p.module)]
    if found:
        warnings.warn(
            f"{len(found)} layers stay dense: they are transformers' Conv1D ({_listed(found, 3)}); "
            "make them torch.nn.Linear first, with sparsetrain.to_linear(model), or exclude them",
            stacklevel=4,
        )


def _type_names(kinds: Sequence[type[nn.Module]]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


def _listed(found: Sequence[Place], limit: int = 40) -> str:
    names = [p.name for p in found]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _nothing(
    model: nn.Module,
    everything: Sequence[Place],
    suited: Sequence[Place],
    kinds: Sequence[type[nn.Module]],
) -> str:
    """What was seen in a model with nothing to convert."""
    leaves = Counter(type(p.module).__name__ for p in everything if not p.module._modules)
    seen = ", ".join(f"{count} {name}" for name, count in sorted(leaves.items()))
    message = (
        f"model {type(model).__name__} has no layer to convert; what can be converted: "
        f"{_type_names(kinds)}; what it holds: {seen or 'no layers'}"
    )
    if suited:
        message += f"; left out by include, exclude or their type: {_listed(suited)}"
    if any(is_conv1d(p.module) for p in everything):
        message += "; sparsetrain.to_linear makes torch.nn.Linear of transformers' Conv1D"
    return message
