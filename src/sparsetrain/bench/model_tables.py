"""From the JSON of the models benchmark to Markdown tables. Measures nothing."""

from __future__ import annotations

from sparsetrain.bench.tables import (
    environment_lines,
    goal_cell,
    markdown,
    median,
    percent,
    speed,
    table,
    threads_name,
    verdict_summary,
    with_spread,
)
from sparsetrain.bench.timing import Json
from sparsetrain.bench.verdicts import judge


def one_line(row: Json) -> str:
    """Progress of a run: the model and what each contestant reached."""
    parts = []
    for name, entry in row["contestants"].items():
        if name == "dense":
            shown = f"{median(entry.get('ms'))} ms"
        else:
            shown = f"{median(entry['x_dense'])}x" if "x_dense" in entry else entry["status"]
        parts.append(f"{name} {shown}")
    head = f"{row['title']} at {percent(row['sparsity'])}"
    return f"{head}: {', '.join(parts)}; {row['rounds']} rounds"


def _steps_table(run: Json) -> str:
    names = ["sparsetrain", "tuned", "sparseprop"]
    present = [n for n in names if any(n in row["contestants"] for row in run["rows"])]
    header = [
        "model",
        "sparsity",
        "dense ms",
        "sparsetrain ms",
        "x dense",
        "floor / aim",
        "verdict",
    ]
    header += [f"{name}: x dense" for name in present[1:]]
    peers = any("best_peer" in row for row in run["rows"])
    header += ["x sparseprop", "floor / aim", "verdict"] if peers else []
    rows = []
    for row in run["rows"]:
        entries, targets = row["contestants"], row["targets"]
        own = entries["sparsetrain"]
        cells = [row["title"], percent(row["sparsity"]), median(entries["dense"].get("ms"))]
        goal = targets.get("x_dense")
        cells += [median(own.get("ms")), speed(own), goal_cell(goal)]
        cells.append(judge(own.get("x_dense"), goal["floor"], goal["aim"]) if goal else "-")
        cells += [speed(entries.get(name)) for name in present[1:]]
        if peers:
            goal, measured = targets.get("x_best_peer"), row.get("x_best_peer")
            cells += [with_spread(measured), goal_cell(goal)]
            cells.append(judge(measured, goal["floor"], goal["aim"]) if goal else "-")
        rows.append(cells)
    return table(header, rows)


def _profile_table(run: Json) -> str:
    """One row per kind of operation, a dense and a sparse column per model."""
    pairs: dict[str, dict[str, Json]] = {}
    for entry in run["profiles"]:
        pairs.setdefault(entry["title"], {})[entry["step"]] = entry
    parts = []
    for title, steps in pairs.items():
        dense, sparse = steps.get("dense"), steps.get("sparsetrain")
        if not dense or not sparse:
            continue
        kinds = sorted(
            {*dense["kinds"], *sparse["kinds"]},
            key=lambda kind: -max(dense["kinds"].get(kind, 0), sparse["kinds"].get(kind, 0)),
        )
        rows = []
        for kind in [*kinds, "whole step"]:
            cells = [kind]
            for entry in (dense, sparse):
                seconds = entry["seconds"] if kind == "whole step" else entry["kinds"].get(kind, 0)
                share = seconds / max(entry["seconds"], 1e-12)
                cells += [f"{1e3 * seconds:.1f}", f"{100 * share:.1f} %"]
            rows.append(cells)
        header = [title, "dense ms", "share", f"{percent(sparse['sparsity'])} sparse ms", "share"]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def model_sections(data: Json) -> list[tuple[str, str]]:
    """(heading, Markdown) of everything a result of `bench models` holds."""
    if not data["runs"]:
        return [("Machine", "nothing measured")]
    sections = [("Machine", environment_lines(data["runs"][0]["environment"]))]
    sections.append(("Requirements", verdict_summary(data)))
    for run in data["runs"]:
        name = threads_name(run["threads"])
        title = f"Whole training steps (forward, loss, backward, SGD with momentum), {name}"
        sections.append((title, _steps_table(run)))
        profile = _profile_table(run)
        if profile:
            title = f"Where the time of a step goes, by kind of operation (CPU time), {name}"
            sections.append((title, profile))
    return sections


def model_report(data: Json) -> str:
    """The whole report as Markdown, with the command it came from."""
    return markdown(model_sections(data), data["command"])
