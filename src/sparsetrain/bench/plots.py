"""Plots of benchmark results. Needs matplotlib; measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.bench.break_even import break_even, place
from sparsetrain.bench.tables import threads_name
from sparsetrain.bench.timing import Json
from sparsetrain.bench.verdicts import case_name, curve, kernel_name

STYLES = {
    "sparsetrain": ("C0", "o"),
    "sparseprop": ("C1", "s"),
    "sparselab": ("C2", "^"),
    "tuned": ("C3", "d"),
}
SPEEDUPS = (0.5, 1, 2, 5, 10, 20, 50)


def _panel(panel: Any, run: Json, case: str) -> None:
    """One layer at one thread count: every library, and where each passes dense."""
    for name, (colour, marker) in STYLES.items():
        points = curve(run, case, name)
        if points:
            places = [place(s) for s, _ in points]
            panel.plot(places, [r for _, r in points], color=colour, marker=marker, label=name)
        cross = break_even(points)
        if cross is not None:
            panel.axvline(place(cross), color=colour, linestyle=":", linewidth=1)
            text = f" {100 * cross:.0f} %"
            panel.annotate(text, (place(cross), 1), color=colour, fontsize=8, va="top")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_yscale("log")
    ticks = sorted({row["sparsity"] for row in run["rows"]})
    panel.set_xticks([place(s) for s in ticks], [f"{100 * s:g}" for s in ticks])
    panel.set_yticks(SPEEDUPS, [f"{s:g}" for s in SPEEDUPS])
    panel.minorticks_off()
    panel.set_xlabel("sparsity, %")
    panel.grid(alpha=0.3)


def plot_speedup(data: Json, path: Path) -> bool:
    """Speedup over dense against sparsity as PNG: a panel per layer and thread count.

    Layers measured at one sparsity only have no curve and are left out. Returns whether there was
    anything to draw.
    """
    panels = []
    for run in data["runs"]:
        seen: dict[str, set[float]] = {}
        for row in run["rows"]:
            seen.setdefault(case_name(row), set()).add(row["sparsity"])
        panels += [(run, case) for case, sparsities in seen.items() if len(sparsities) > 1]
    if not panels:
        return False
    figure, axes = _grid(len(panels), columns=4 if len(panels) > 8 else 3)
    for panel, (run, case) in zip(axes, panels, strict=False):
        _panel(panel, run, case)
        panel.set_title(f"{case}, {threads_name(run['threads'])}", fontsize=9)
    axes[0].set_ylabel("forward + backward, x dense")
    _legend(axes[0])
    _save(figure, path)
    return True


def plot_roofline(data: Json, path: Path) -> bool:
    """Each kernel's rate as a fraction of the L1 ceiling, as PNG: a bar per layer and sparsity."""
    rows = [row for run in data["runs"] for row in run["rows"] if row["kernels"]]
    if not rows:
        return False
    names = list(dict.fromkeys(kernel_name(k) for row in rows for k in row["kernels"]))
    figure, (axis,) = _grid(1, columns=1, size=(11, max(3, 0.32 * len(rows))))
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        entries = [{kernel_name(k): e for k, e in row["kernels"].items()} for row in rows]
        shares = [e[name]["fraction_of_l1"]["median"] if name in e else 0 for e in entries]
        places = [place + (number - len(names) / 2 + 0.5) * height for place in range(len(rows))]
        axis.barh(places, shares, height, label=name, color=f"C{number}")
    labels = [
        f"{case_name(row)}, {100 * row['sparsity']:g} %, {threads_name(row['threads'])}"
        for row in rows
    ]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.axvline(data["limits"]["roofline_fraction"], color="black", linestyle=":", linewidth=1)
    axis.set_xlabel("fraction of the L1 ceiling (dotted: required)")
    axis.grid(alpha=0.3, axis="x")
    _legend(axis)
    _save(figure, path)
    return True


def plot_breakdown(data: Json, path: Path) -> bool:
    """Where the time of a dense and a sparse step goes, as PNG: one stacked bar each."""
    profiles = [entry for run in data["runs"] for entry in run["profiles"]]
    if not profiles:
        return False
    totals: dict[str, float] = {}
    for entry in profiles:
        for kind, seconds in entry["kinds"].items():
            totals[kind] = totals.get(kind, 0) + seconds / entry["seconds"]
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    figure, (axis,) = _grid(1, columns=1, size=(10, 0.5 * len(profiles) + 2))
    longest: dict[str, float] = {}
    for entry in profiles:
        longest[entry["title"]] = max(longest.get(entry["title"], 0), entry["seconds"])
    starts = [0.0] * len(profiles)
    for number, kind in enumerate(kinds):
        widths = [e["kinds"].get(kind, 0) / longest[e["title"]] for e in profiles]
        hatch = "//" if number >= 10 else None
        axis.barh(
            range(len(profiles)), widths, left=starts, label=kind, color=f"C{number}", hatch=hatch
        )
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    labels = [f"{e['title']}, {e['step']}" for e in profiles]
    axis.set_yticks(range(len(profiles)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("CPU time of a step, as a share of the model's dense step")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)
    return True


Plot = Callable[[Json, Path], bool]
PLOTS: dict[str, tuple[str, Plot]] = {
    "speedup": ("Speedup over dense against sparsity", plot_speedup),
    "roofline": ("Kernels as a fraction of the L1 ceiling", plot_roofline),
    "breakdown": ("Where the time of a step goes", plot_breakdown),
}
# The results that each is drawn of.
SUITED = {
    "speedup": ("linear", "conv"),
    "roofline": ("linear", "conv"),
    "breakdown": ("models",),
}


def _grid(count: int, columns: int, size: tuple[float, float] | None = None) -> tuple[Any, Any]:
    """A figure with so many panels, those that are left over hidden."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(columns, count)
    lines = -(-count // columns)
    size = size or (4.2 * columns, 3.4 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=count > 1)
    flat = [axis for line in axes for axis in line]
    for axis in flat[count:]:
        axis.axis("off")
    return figure, flat


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
