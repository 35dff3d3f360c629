"""From the JSON of the memory benchmark to Markdown tables. Measures nothing."""

from __future__ import annotations

from sparsetrain.bench.tables import environment_lines, markdown, number, percent, table
from sparsetrain.bench.timing import Json


def memory_missed(data: Json) -> bool:
    """Whether any limit of memory.py was exceeded."""
    limits = [row["verdict"] for row in (*data["layers"], *data["peaks"]) if _is_own(row)]
    saved = any(row["extra_bytes_saved"] for row in data["saved"])
    return saved or "MISSED" in limits or data["resident"]["per_nonzero"] > data["limit"]


def _is_own(row: Json) -> bool:
    return bool(row.get("kind", "sparse") == "sparse")


def memory_sections(data: Json) -> list[tuple[str, str]]:
    """(heading, Markdown) of everything a memory.py result holds."""
    limit = data["limit"]
    parts = list(data["layers"][0]["bytes_per_nonzero"])
    rows = []
    for row in data["layers"]:
        each = [number(row["bytes_per_nonzero"][part]) for part in parts]
        total = number(row["total_per_nonzero"])
        rows.append([row["layer"], percent(row["sparsity"]), *each, total, row["verdict"]])
    header = ["layer", "sparsity", *parts, f"bytes per nonzero (at most {limit:g})", "verdict"]
    exact = table(header, rows)
    big = data["resident"]
    measured = (
        f"A process that holds one {big['size']}x{big['size']} layer at {percent(big['sparsity'])} "
        f"({big['nnz']} nonzeros) after a training step has {big['bytes'] / 2**20:.1f} MiB more "
        f"resident than before it: {number(big['per_nonzero'])} bytes per nonzero."
    )
    rows = [
        [row["input"], str(row["input_bytes"]), str(row["extra_bytes_saved"])]
        for row in data["saved"]
    ]
    header = ["input", "bytes of the input", "bytes saved beyond input, parameters and pattern"]
    saved = table(header, rows)
    rows = []
    for row in data["peaks"]:
        cells = [f"{row['layer']}, {row['kind']}"]
        keys = ("input", "needed", "peak", "beyond_needed")
        cells += [f"{row[key] / 2**20:.1f}" for key in keys]
        cells.append(number(row["x_dense"]) if "x_dense" in row else "-")
        rows.append([*cells, row["verdict"] if _is_own(row) else "-"])
    header = ["layer", "input MiB", "outputs and gradients MiB", "peak of the step MiB"]
    peaks = table([*header, "beyond them MiB", "x dense", "verdict"], rows)
    return [
        ("Machine", environment_lines(data["environment"])),
        ("Resident bytes per nonzero, added up", exact),
        ("Resident bytes per nonzero, of a process", measured),
        ("What backward keeps", saved),
        ("Peak of a training step", peaks),
    ]


def memory_report(data: Json) -> str:
    """The whole report as Markdown, with the command it came from."""
    return markdown(memory_sections(data), data["command"])
