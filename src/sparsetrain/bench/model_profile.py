"""Where the time of a training step goes, by kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KINDS: dict[str, tuple[str, ...]] = {
    "sparse convolution": ("sparsetrain::conv",),
    "sparse linear": ("sparsetrain::linear",),
    "dense convolution": ("convolution", "conv2d"),
    "attention": ("scaled_dot_product", "flash_attention", "aten::softmax", "_softmax", "bmm"),
    "dense matrix product": ("addmm", "aten::mm", "aten::matmul", "aten::linear"),
    "batch norm, layer norm": ("batch_norm", "layer_norm"),
    "activation": ("relu", "gelu", "threshold_backward", "tanh"),
    "pooling": ("pool", "aten::mean"),
    "dropout": ("dropout", "bernoulli"),
    "optimizer": ("Optimizer.", "_foreach"),
    "embedding": ("embedding",),
    "loss": ("cross_entropy", "nll_loss", "log_softmax"),
    "addition": ("aten::add",),
}


def kind_of(names: list[str]) -> str:
    """The kind of an operation, from its own name and those around it, innermost first.

    A sparse layer or the optimizer counts with everything that it calls.
    """
    for around in reversed(names):
        for kind in ("sparse convolution", "sparse linear", "optimizer", "dropout", "loss"):
            if any(part in around for part in KINDS[kind]):
                return kind
    for name in names:
        for kind, parts in KINDS.items():
            if any(part in name for part in parts):
                return kind
    return "other"


def profile_step(step: Callable[[], object]) -> tuple[dict[str, float], float]:
    """({kind: seconds of the CPU's own time}, their sum) of one call, after a warm one."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    kinds: dict[str, float] = {}
    events: Any = found.events()
    for event in events:
        names, around = [event.name], event.cpu_parent
        while around is not None:
            names.append(around.name)
            around = around.cpu_parent
        kind = kind_of(names)
        kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total * 1e-6
    total = sum(kinds.values())
    ordered = sorted(kinds.items(), key=lambda item: -item[1])
    return {kind: round(seconds, 6) for kind, seconds in ordered}, round(total, 6)
