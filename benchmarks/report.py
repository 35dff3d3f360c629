"""Writes docs/performance.md from the results in benchmarks/results.

    python benchmarks/report.py [--results FOLDER] [--output FILE]

The text between the two "hand-written" marks of the existing file is kept as it is; all else is
generated, with the command above every table, losses included. Edit neither table nor number.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import _tables
from _harness import HERE, Json

BEGIN = "<!-- hand-written: begin -->"
END = "<!-- hand-written: end -->"
EMPTY = "## What was tried\n\nNothing recorded yet."
HEAD = """# Performance

Tables and plots are written by `python benchmarks/report.py` from the files in
`benchmarks/results`; the command above a table measures it again. Speeds are medians over rounds
of the ratio of two times of the same round, with the quartiles in brackets; below 1 a layer is
slower than dense. Every contestant's results are compared with the masked dense layer in float64
before it is timed: a wrong one shows `wrong` in place of a number, a crashed one `crashed`."""


def hand_written(path: Path) -> str:
    """The part of the existing file that people write. Raises ValueError if a mark is missing."""
    if not path.exists():
        return EMPTY
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"{path.name}: expected one {BEGIN!r} and after it one {END!r}; put them back around "
            "the hand-written part so that it is not lost"
        )
    return text.partition(BEGIN)[2].partition(END)[0].strip("\n")


def _load(folder: Path, name: str) -> Json | None:
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    data: Json = json.loads(path.read_text())
    if data.get("benchmark") != name:
        raise ValueError(f"{path.name}: expected a result of benchmarks/{name}.py")
    return data


def _sections(sections: list[tuple[str, str]], command: str) -> list[str]:
    return [f"### {heading}\n\n```\n{command}\n```\n\n{text}" for heading, text in sections]


def generate(results: Path, output: Path) -> str:
    """The whole document. Draws the plots beside it."""
    linear, memory = _load(results, "linear"), _load(results, "memory")
    if linear is None and memory is None:
        raise ValueError(
            f"nothing to report: {results.name} holds neither linear.json nor memory.json; make "
            "one with `python benchmarks/linear.py --peers --json benchmarks/results/linear.json`"
        )
    parts = [HEAD, f"{BEGIN}\n{hand_written(output)}\n{END}"]
    if linear is not None:
        from _plots import plot_speedup

        plot_speedup(linear, output.parent / "linear-speedup.png")
        parts += ["## Linear layers", "![Speedup against sparsity](linear-speedup.png)"]
        parts += _sections(_tables.linear_sections(linear), linear["command"])
    if memory is not None:
        parts += ["## Memory of linear layers"]
        parts += _sections(_tables.memory_sections(memory), memory["command"])
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=HERE.parent / "docs" / "performance.md")
    args = parser.parse_args()
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = generate(args.results, args.output)
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    unfinished = args.output.with_name(args.output.name + ".partial")
    unfinished.write_text(text)
    os.replace(unfinished, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
