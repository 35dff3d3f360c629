"""Writes the measured tables of README.md from benchmarks/results: demo, linear, conv and models.

    python tools/readme_tables.py [--demo demo-out/text/report.json]

With --demo the report of a run of `make demo` becomes benchmarks/results/demo.json first. A result
that is not there leaves its table out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from sparsetrain.bench.tables import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- measured:begin [^\n]*-->\n).*?(<!-- measured:end -->)", re.DOTALL)


def demo_section(report: dict[str, Any]) -> str:
    """The whole job: one row per quantity, dense beside sparse."""
    dense, sparse = report["lanes"]["dense"], report["lanes"]["sparse"]
    machine, run = report["machine"], report["run"]

    def row(title: str, key: str, show: Any) -> list[str]:
        return [title, show(dense[key]), show(sparse[key])]

    rows = [
        row("seconds per training step", "seconds_per_step", lambda x: f"{x:.3f}"),
        row("test accuracy", "accuracy", lambda x: f"{100 * x:.1f} %"),
        row("bytes of the pruned layers", "weight_bytes", lambda x: f"{x / 1e6:.1f} MB"),
        row("bytes of kernel plans", "plan_bytes", lambda x: f"{x / 1e6:.1f} MB"),
        row("bytes of optimizer state", "optimizer_bytes", lambda x: f"{x / 1e6:.1f} MB"),
    ]
    return (
        f"**{run['title']}** (`make demo`): whole steps (forward, backward, AdamW) of "
        f"{run['batch']} documents of {run['seq_length']} tokens, "
        f"**{report['speedup']:.1f} times faster** than dense with a mask, on {machine['cpu']}, "
        f"{machine['threads']} threads, torch {machine['torch']}.\n\n"
        + table(["", "dense, masked", "sparse"], rows)
    )


def layers_section(data: dict[str, Any]) -> str:
    """Forward + backward of single layers, x dense: one row per layer, one column per sparsity."""
    parts = []
    for run in data["runs"]:
        found: dict[str, dict[float, str]] = {}
        for row in run["rows"]:
            ratio = row["contestants"].get("sparsetrain", {}).get("x_dense")
            if row["targets"] and ratio and row["batch"] > 8:
                name = f"{row['layer']}, batch {row['batch']}"
                found.setdefault(name, {})[row["sparsity"]] = f"{ratio['median']:.1f}x"
        sparsities = sorted({s for cells in found.values() for s in cells})
        rows = [[name, *(cells.get(s, "-") for s in sparsities)] for name, cells in found.items()]
        environment = run["environment"]
        parts.append(
            f"One layer, forward and backward, float32, times dense, on {environment['cpu']}, "
            f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}:\n\n"
            + table(["layer", *(f"{100 * s:g} %" for s in sparsities)], rows)
        )
    return "\n\n".join(parts)


def models_section(data: dict[str, Any]) -> str:
    """Whole training steps, x dense: one row per network, one column per sparsity."""
    parts = []
    for run in data["runs"]:
        found: dict[str, dict[float, str]] = {}
        for row in run["rows"]:
            ratio = row["contestants"].get("sparsetrain", {}).get("x_dense")
            if ratio:
                cells = found.setdefault(row["title"], {})
                cells[row["sparsity"]] = f"{ratio['median']:.1f}x"
        sparsities = sorted({s for cells in found.values() for s in cells})
        rows = [[name, *(cells.get(s, "-") for s in sparsities)] for name, cells in found.items()]
        environment = run["environment"]
        parts.append(
            f"Whole training steps, SGD with momentum, times dense, on {environment['cpu']}, "
            f"{run['threads']} thread{'s' if run['threads'] > 1 else ''}:\n\n"
            + table(["network", *(f"{100 * s:g} %" for s in sparsities)], rows)
        )
    return "\n\n".join(parts)


def one_thread_section(data: dict[str, Any]) -> str:
    """layers_section of one thread alone, for further CPUs."""
    return layers_section({"runs": [run for run in data["runs"] if run["threads"] == 1]})


SECTIONS = (
    ("demo", demo_section),
    ("models", models_section),
    ("linear", layers_section),
    ("linear_halves", one_thread_section),
    ("linear_intel", one_thread_section),
    ("conv", layers_section),
)


def generate(readme: str, results: Path) -> str:
    """README with the tables of all results that are there."""
    sections = []
    for name, section in SECTIONS:
        path = results / f"{name}.json"
        if path.exists():
            sections.append(section(json.loads(path.read_text(encoding="utf-8"))))
    body = "".join(f"\n{section}\n" for section in sections) + ("\n" if sections else "")
    changed, count = BLOCK.subn(lambda match: match[1] + body + match[2], readme)
    if count != 1:
        raise ValueError("README.md: expected one pair of measured:begin and measured:end marks")
    return changed


def keep_demo(source: Path) -> None:
    """Copy the report of a demo run into the results, without what only its machine knows."""
    report = json.loads(source.read_text(encoding="utf-8"))
    for key in ("model", "data", "out"):
        report["run"].pop(key, None)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="report.json of a finished demo")
    arguments = parser.parse_args()
    if arguments.demo:
        keep_demo(arguments.demo)
    readme = ROOT / "README.md"
    readme.write_text(generate(readme.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
