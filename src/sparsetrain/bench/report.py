"""Writes docs/performance.md from the results in benchmarks/results.

The text between the two "hand-written" marks of the existing file is kept as it is; all else is
generated, with the command above every table, losses included. Edit neither table nor number.
"""

from __future__ import annotations

from pathlib import Path

from sparsetrain.bench.layer_tables import layer_sections
from sparsetrain.bench.memory_tables import memory_sections
from sparsetrain.bench.model_tables import model_sections
from sparsetrain.bench.processes import read_json, write_text
from sparsetrain.bench.timing import Json

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


# File in the results folder, what its "benchmark" may be, heading.
RESULTS = (
    ("linear", ("linear", "layers"), "Linear layers"),
    ("conv", ("layers",), "Convolutions"),
    ("models", ("models",), "Whole training steps"),
    ("models_kept", ("models",), "Whole training steps, memory kept"),
    ("layers", ("layers",), "Every layer of five networks"),
    ("layers_small_batches", ("layers",), "Every layer of five networks, batch 1 and 8"),
    (
        "layers_small_batches_tuned",
        ("layers",),
        "Every layer of five networks, batch 1 and 8, tuned",
    ),
    ("layers_peers", ("layers",), "Every layer of five networks, beside other libraries"),
    ("memory", ("memory",), "Memory"),
    ("linear_halves", ("linear", "layers"), "Linear layers, 512-bit vectors in two halves"),
    (
        "linear_halves_kept",
        ("layers",),
        "Linear layers, 512-bit vectors in two halves, memory kept",
    ),
    ("conv_halves", ("layers",), "Convolutions, 512-bit vectors in two halves"),
    (
        "layers_halves",
        ("layers",),
        "Every layer of five networks, batch 32, 512-bit vectors in two halves",
    ),
    (
        "layers_peers_halves",
        ("layers",),
        "Every layer of five networks, beside other libraries, 512-bit vectors in two halves",
    ),
    (
        "layers_small_batches_halves",
        ("layers",),
        "Every layer of five networks, batch 1 and 8, 512-bit vectors in two halves",
    ),
    (
        "layers_small_batches_tuned_halves",
        ("layers",),
        "Every layer of five networks, batch 1 and 8, tuned, 512-bit vectors in two halves",
    ),
    (
        "layers_no_zeros_halves",
        ("layers",),
        "Layers of five networks without zeros, in more rounds, 512-bit vectors in two halves",
    ),
    ("linear_intel", ("linear", "layers"), "Linear layers, on an Intel CPU"),
    ("conv_intel", ("layers",), "Convolutions, on an Intel CPU"),
    ("layers_intel", ("layers",), "Layers of four networks, on an Intel CPU, as far as time went"),
    ("linear_256bit", ("linear", "layers"), "Linear layers, on a CPU with 256-bit vectors"),
    ("conv_256bit", ("layers",), "Convolutions, on a CPU with 256-bit vectors"),
    ("layers_256bit", ("layers",), "Every layer of five networks, with 256-bit vectors"),
    ("models_256bit", ("models",), "Whole training steps, 256-bit vectors, as far as time went"),
)


def load_results(folder: Path) -> dict[str, Json]:
    """Every result file of RESULTS that is there, in that order."""
    found = {}
    for name, kinds, _ in RESULTS:
        path = folder / f"{name}.json"
        if path.exists():
            data = read_json(path)
            if data.get("benchmark") not in kinds:
                raise ValueError(
                    f"{path.name}: expected a result of `sparsetrain bench {kinds[-1]}`, got "
                    f"{data.get('benchmark')!r}"
                )
            found[name] = data
    if not found:
        names = ", ".join(f"{name}.json" for name, *_ in RESULTS)
        raise ValueError(
            f"nothing to report: {folder.name} holds none of {names}; make one with "
            "`python benchmarks/linear.py --peers --json benchmarks/results/linear.json`"
        )
    return found


def sections(name: str, data: Json) -> list[tuple[str, str]]:
    """(heading, Markdown) of one result."""
    if name == "memory":
        return memory_sections(data)
    return model_sections(data) if data["benchmark"] == "models" else layer_sections(data)


def generate(results: Path, output: Path) -> str:
    """The whole document. Draws the plots beside it."""
    found = load_results(results)
    parts = [HEAD, f"{BEGIN}\n{hand_written(output)}\n{END}"]
    headings = {name: heading for name, _, heading in RESULTS}
    for name, data in found.items():
        parts.append(f"## {headings[name]}")
        for title, file in draw(name, data, output.parent):
            parts.append(f"![{title}]({file})")
        for heading, text in sections(name, data):
            parts.append(f"### {heading}\n\n```\n{data['command']}\n```\n\n{text}")
    return "\n\n".join(parts) + "\n"


def draw(name: str, data: Json, folder: Path) -> list[tuple[str, str]]:
    """Draws the plots of one result into the folder: (title, file) of each."""
    from sparsetrain.bench import plots

    drawn = []
    for kind, (title, function) in plots.PLOTS.items():
        if name in plots.SUITED[kind]:
            file = f"{name}-{kind}.png"
            if function(data, folder / file):
                drawn.append((title, file))
    return drawn


def write_page(results: Path, output: Path) -> None:
    """Everything in one HTML file that loads nothing."""
    from sparsetrain.bench import page

    write_text(output, page.render(load_results(results)))


def write(results: Path, output: Path) -> None:
    """The document and its plots. Raises ValueError, and changes no text, if something is amiss."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, generate(results, output))
