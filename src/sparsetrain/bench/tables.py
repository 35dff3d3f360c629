"""Markdown tables, numbers and verdicts as text. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsetrain.bench.timing import Json


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; first column left, the others right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 2
    return f"{value:.{min(digits, 4)}f}"


def with_spread(entry: Json | None) -> str:
    """`median (p25-p75)`, or a dash where nothing was measured."""
    if not entry:
        return "-"
    return f"{number(entry['median'])} ({number(entry['p25'])}-{number(entry['p75'])})"


def median(entry: Json | None) -> str:
    """The median alone, or a dash."""
    return number(entry["median"]) if entry else "-"


def percent(fraction: float) -> str:
    """0.95 -> `95 %`."""
    return f"{round(100 * fraction, 2):g} %"


def verdict_summary(data: Json) -> str:
    """How many requirements were met, and every one that was not."""
    found = data["verdicts"]
    count = {kind: sum(v["verdict"] == kind for v in found) for kind in ("aim", "floor", "MISSED")}
    lines = [
        f"{len(found)} requirements: {count['aim']} reach the aim, {count['floor']} the floor, "
        f"{count['MISSED']} missed, {len(found) - sum(count.values())} not measured."
    ]
    missed = [v for v in found if v["verdict"] == "MISSED"]
    if missed:
        rows = []
        for v in missed:
            sense = "at most" if v["at_most"] else "at least"
            sparsity = "-" if v["sparsity"] is None else percent(v["sparsity"])
            cells = [v["what"], v["case"], sparsity, str(v["threads"])]
            rows.append([*cells, with_spread(v["measured"]), f"{sense} {v['floor']:g}"])
        header = ["missed", "where", "sparsity", "threads", "measured", "required"]
        lines += ["", table(header, rows)]
    return "\n".join(lines)


def environment_lines(environment: Json) -> str:
    """The machine and the versions, as a list."""
    cache = ", ".join(f"{k} {v >> 10} KiB" for k, v in sorted(environment["caches"].items()))
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    return "\n".join(
        [
            f"- CPU: {environment['cpu']}, {environment['cpus']} used; {cache}; "
            f"{' '.join(environment['flags'])}",
            f"- {environment['system']}, Python {environment['python']}, {versions}",
            f"- {environment['mkl']}; sparsetrain kernels: {environment['isa']}",
            f"- measured {environment['date']}, commit {environment['commit']}",
        ]
    )


def threads_name(count: int) -> str:
    """`1 thread`, `2 threads`"""
    return f"{count} thread" + ("s" if count > 1 else "")


def speed(entry: Json | None) -> str:
    """A contestant's speed over dense, or why it has none."""
    if not entry:
        return "-"
    return with_spread(entry["x_dense"]) if "x_dense" in entry else str(entry["status"])


def goal_cell(goal: Json | None) -> str:
    """`floor / aim`"""
    if not goal:
        return "-"
    return f"{goal['floor']:g}" + (f" / {goal['aim']:g}" if goal.get("aim") else "")


def markdown(sections: Sequence[tuple[str, str]], command: str, level: str = "##") -> str:
    """(heading, text) pairs as one document that starts with its command."""
    parts = [f"`{command}`", *(f"{level} {heading}\n\n{text}" for heading, text in sections)]
    return "\n\n".join(parts)
