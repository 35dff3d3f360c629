"""Writes the measured tables of docs/recipes.md from the reports in docs/recipes.

    python tools/recipe_tables.py [--keep fashion runs/fashion]

With --keep the report and the plot of a finished run become docs/recipes/NAME.json and NAME.png
first. The text around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from readme_tables import ROOT

from sparsetrain.bench.tables import table

PAGE = ROOT / "docs" / "recipes.md"
RESULTS = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"(<!-- measured:begin (\w+) [^\n]*-->\n).*?(<!-- measured:end -->)", re.DOTALL)
PRIVATE = ("model", "data", "out")  # paths of the machine that ran it


def section(report: dict[str, Any]) -> str:
    """One row per quantity, dense beside sparse, and what it was measured on."""
    dense, sparse = report["lanes"]["dense"], report["lanes"]["sparse"]

    def row(title: str, key: str, show: Any) -> list[str]:
        return [title, show(dense[key]), show(sparse[key])]

    rows = [
        row("test accuracy", "accuracy", lambda x: f"{100 * x:.2f} %"),
        row("seconds per step, at the final sparsity", "seconds_per_step", lambda x: f"{x:.3f}"),
        row("seconds of training, all steps", "training_seconds", lambda x: f"{x:.0f}"),
        row("bytes of the pruned layers", "weight_bytes", lambda x: f"{x / 1e6:.2f} MB"),
        row("bytes of kernel plans", "plan_bytes", lambda x: f"{x / 1e6:.2f} MB"),
        row("bytes of optimizer state", "optimizer_bytes", lambda x: f"{x / 1e6:.2f} MB"),
    ]
    timed = report.get("timing", report)["machine"]
    twin = "dense, masked" if dense["masked"] else "dense"
    return (
        table(["", twin, "sparse"], rows)
        + f"\n\nSparse steps are **{report['speedup']:.2f} times faster** at the final sparsity, "
        f"all of the training {report['training_speedup']:.2f} times; accuracy "
        f"{100 * report['accuracy_difference']:+.2f} points.\n{timed['cpu']}, "
        f"{timed['threads']} threads, torch {timed['torch']}, {report['run']['steps']} steps of "
        f"{report['run']['batch']} images."
    )


def generate(page: str, results: Path) -> str:
    """The page with the table of every report that is there."""

    def fill(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.exists():
            return match[1] + match[3]
        report = json.loads(path.read_text(encoding="utf-8"))
        plot = f"![Accuracy against training time](recipes/{match[2]}.png)"
        return f"{match[1]}\n{section(report)}\n\n{plot}\n\n{match[3]}"

    return BLOCK.sub(fill, page)


def keep(name: str, run: Path) -> None:
    """Copy report and plot of a run, without what only its machine knows."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for key in PRIVATE:
        report["run"].pop(key, None)
    for lane in report["lanes"].values():
        lane["losses"] = [round(loss, 4) for loss in lane["losses"]]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    shutil.copyfile(run / "accuracy.png", RESULTS / f"{name}.png")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", nargs=2, metavar=("NAME", "RUN"), help="a finished run")
    arguments = parser.parse_args()
    if arguments.keep:
        keep(arguments.keep[0], Path(arguments.keep[1]))
    PAGE.write_text(generate(PAGE.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
