"""Tables and plots of the examples on learning, from their result files."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from _learning import COST, RESULTS, Json

from sparsetrain.bench.processes import read_json, write_text
from sparsetrain.bench.tables import table

BLOCK = re.compile(r"(<!-- measured:begin (\w+) [^\n]*-->\n).*?(<!-- measured:end -->)", re.DOTALL)
FASHION = ("dense", "Static", "SET", "RigL", "GMP", "ACDC", "TopKAST", "MEST")
TEXT = ("dense", *(f"{n}-{p}" for p in (80, 90) for n in ("small", "Static", "RigL", "GMP")))
TITLES = {"masks": "masks over dense weights", "ACDC": "AC/DC", "TopKAST": "Top-KAST"}
OutOption = Annotated[Path, typer.Option("--out", help="folder of the result files")]


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


# ---- Fashion-MNIST -------------------------------------------------------------------------------


def fashion_runs(folder: Path) -> dict[str, list[Json]]:
    """Of each algorithm that has results, those of all seeds."""
    found = {
        name: [read_json(file) for file in sorted(folder.glob(f"fashion-{name}-*.json"))]
        for name in FASHION
    }
    return {name: runs for name, runs in found.items() if runs}


def fashion_table(folder: Path) -> str:
    runs = fashion_runs(folder)
    scores = {name: [100 * r["test_accuracy"] for r in found] for name, found in runs.items()}
    dense = statistics.fmean(scores["dense"]) if "dense" in scores else None
    rows = []
    for name, found in runs.items():
        mean, values = statistics.fmean(scores[name]), scores[name]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
        behind = "" if dense is None or name == "dense" else f"{mean - dense:+.2f}"
        tried = statistics.fmean(r.get("itop_rate", 1.0) for r in found)
        seconds = statistics.fmean(r["cpu_seconds"] for r in found)
        cells = [TITLES.get(name, name), str(len(found)), f"{mean:.2f} %", spread]
        cells += [f"{min(values):.2f} to {max(values):.2f}", behind]
        rows.append([*cells, f"{100 * tried:.0f} %", f"{seconds:.0f}"])
    header = ["algorithm", "seeds", "test accuracy", "standard deviation", "lowest to highest"]
    return table([*header, "points to dense", "weights ever tried", "seconds of training"], rows)


def draw_fashion(folder: Path, pyplot: Any) -> None:
    runs = fashion_runs(folder)
    scores = [[100 * r["test_accuracy"] for r in found] for found in runs.values()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(4, 5))
    _bars(left, [TITLES.get(name, name) for name in runs], scores)
    left.set_ylabel("test accuracy, %")
    for name, found in runs.items():
        losses = [
            statistics.fmean(step) for step in zip(*(r["losses"] for r in found), strict=True)
        ]
        smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
        every = found[0]["steps"] / len(losses)
        steps = [every * i for i in range(len(losses))]
        right.plot(steps[4:], smooth[4:], linewidth=1, label=TITLES.get(name, name))
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_ylabel("training loss, mean of all seeds")
    right.legend(fontsize=7, ncols=2)
    _save(figure, folder / "fashion.png")


# ---- King James ----------------------------------------------------------------------------------


def text_runs(folder: Path) -> dict[str, Json]:
    """The results by run; with several seeds those of the first."""
    files = {name: sorted(folder.glob(f"text-{name}-*.json")) for name in TEXT}
    return {name: read_json(found[0]) for name, found in files.items() if found}


def text_title(name: str, run: Json) -> str:
    kind, _, percent = name.partition("-")
    if kind == "small":
        return f"dense, narrower: {run['width']}"
    return f"{TITLES.get(kind, kind)}{f', {percent} %' if percent else ''}"


def text_table(folder: Path) -> str:
    runs = text_runs(folder)
    rows = []
    for name, run in runs.items():
        loss = run["validation_loss"]
        behind = f"{loss - runs['dense']['validation_loss']:+.3f}" if name != "dense" else ""
        cells = [text_title(name, run), f"{run['parameters']:,}", str(run["width"])]
        cells += [f"{loss:.3f}", behind if "dense" in runs else "", f"{run['train_loss']:.3f}"]
        rows.append([*cells, f"{run['cpu_seconds']:.0f}"])
    header = ["network", "parameters", "width", "validation loss", "to dense", "training loss"]
    return table([*header, "seconds of training"], rows)


def draw_text(folder: Path, pyplot: Any) -> None:
    runs = text_runs(folder)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), width_ratios=(4, 5))
    titles = [text_title(name, run) for name, run in runs.items()]
    _bars(left, titles, [[run["validation_loss"]] for run in runs.values()])
    left.set_ylabel("validation loss, nats per character")
    for title, run in zip(titles, runs.values(), strict=True):
        curve = [*run["validation"][1:], [run["steps"], run["validation_loss"]]]
        right.plot(*zip(*curve, strict=True), ".-", linewidth=1, markersize=3, label=title)
    right.set_xlabel("step")
    right.set_ylabel("validation loss")
    right.legend(fontsize=7)
    _save(figure, folder / "text.png")


# ---- cost ----------------------------------------------------------------------------------------


def cost_title(request: Json) -> str:
    if "size" in request:
        side, sparsity = request["size"], 100 * request["sparsity"]
        what = f"width {request['width']}, {request['batch']} images of {side}x{side}"
    else:
        sparsity = request["percent"]
        what = f"width {request['width']}, {request['layers']} layers, {request['batch']} windows"
    return f"{request['network']}, {what}, {sparsity:g} %"


def cost_table(folder: Path) -> str:
    """One table per workload: a row per contestant; then what follows from it."""
    return "\n\n".join(_one_cost(read_json(f)) for f in sorted(folder.glob("cost-*.json")))


def _one_cost(report: Json) -> str:
    times, peaks = report["times"], report["peaks"]
    sizes = times[0]["state_bytes"] if times else {}
    rows = []
    for name in COST:
        cells = [f"{run['milliseconds'][name]:.0f} ms" for run in times if name != "RigL"]
        if name == "RigL":
            cells = [f"{_with_updates(run['milliseconds']):.0f} ms" for run in times]
        state = megabytes(sizes["Static" if name == "RigL" else name]) if sizes else ""
        rows.append([TITLES.get(name, name), *cells, state, megabytes(peaks.get(name, 0))])
    threads = [f"step, {r['threads']} thread{'s' if r['threads'] > 1 else ''}" for r in times]
    said = [_in_words(run) for run in times]
    if sizes:
        said.append(f"State is {100 * sizes['Static'] / sizes['dense']:.1f} % of dense.")
    head = f"**{cost_title(report['request'])}**, {report['environment']['cpu']}\n\n"
    return head + table(["", *threads, "state", "peak memory"], rows) + "\n\n" + "\n".join(said)


def _in_words(run: Json) -> str:
    plain = run["milliseconds"]["Static"]
    threads = f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}"
    extra = 100 * (_with_updates(run["milliseconds"]) / plain - 1)
    return (
        f"With {threads} sparse steps are **{_ratio(run, 'masks', 'Static')} times** faster than "
        f"with masks and {_ratio(run, 'dense', 'Static')} times faster than dense; RigL's updates "
        f"every 100 steps cost {extra:.1f} % of the time."
    )


def _with_updates(milliseconds: dict[str, float]) -> float:
    """A step of RigL that updates every 100 steps."""
    plain = milliseconds["Static"]
    return plain + max(0.0, milliseconds["RigL update"] - plain) / 100


def _ratio(run: Json, slow: str, fast: str) -> str:
    return f"{run['milliseconds'][slow] / run['milliseconds'][fast]:.2f}"


def whole_table(folder: Path) -> str:
    """Whole trainings with masks over dense weights beside the same ones on sparse storage."""
    rows = []
    for file in sorted(folder.glob("*-masks*.json")):
        masked = read_json(file)
        for name in ("masks", "Static", "RigL"):
            path = file.with_name(file.name.replace("masks", name))
            if path.exists():
                rows.append(_whole_row(name, path.name, read_json(path), masked))
    header = ["whole training, 1 thread", "seconds", "times faster", "peak memory", "result"]
    return table(header, rows)


def _whole_row(name: str, file: str, run: Json, masked: Json) -> list[str]:
    task = "Fashion-MNIST" if file.startswith("fashion") else "King James"
    result = f"loss {run['validation_loss']:.3f}" if "validation_loss" in run else ""
    if "test_accuracy" in run:
        result = f"{100 * run['test_accuracy']:.2f} %"
    title = f"{task}, {100 * run['sparsity']:g} %: {TITLES.get(name, name)}"
    faster = f"{masked['cpu_seconds'] / run['cpu_seconds']:.2f}"
    return [title, f"{run['cpu_seconds']:.0f}", faster, megabytes(run["peak_bytes"]), result]


# ---- all of it -----------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Path], str]] = {
    "fashion": fashion_table,
    "longer": lambda folder: fashion_table(folder / "longer"),
    "longest": lambda folder: fashion_table(folder / "longest"),
    "text": text_table,
    "cost": cost_table,
    "whole": whole_table,
}


def generate(page: str, folder: Path) -> str:
    """The page with the tables between its marks."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{SECTIONS[m[2]](folder)}\n\n{m[3]}", page)


def report(
    page: Annotated[
        Path | None, typer.Option(help="Markdown page to write the tables into")
    ] = None,
    out: OutOption = RESULTS,
) -> None:
    """Print the tables of all results, as Markdown, and draw their plots beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print("\n\n".join(section(out) for section in SECTIONS.values()))
    if fashion_runs(out):
        draw_fashion(out, pyplot)
    if text_runs(out):
        draw_text(out, pyplot)
    if page is not None:
        write_text(page, generate(page.read_text(encoding="utf-8"), out))


def _bars(axes: Any, titles: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    """A bar per title, with a dot per value; the axis begins where differences can be seen."""
    for place, found in enumerate(values):
        axes.bar(place, statistics.fmean(found), color="tab:blue", alpha=0.5)
        axes.plot([place] * len(found), found, "k.", markersize=4)
    axes.set_xticks(range(len(titles)), titles, rotation=35, ha="right", fontsize=8)
    low, high = (pick(pick(found) for found in values) for pick in (min, max))
    margin = 0.3 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
