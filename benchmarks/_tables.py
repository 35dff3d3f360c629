"""From the JSON of a benchmark to verdicts, Markdown tables and plots. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from _harness import Json

PEERS = ("sparseprop", "sparselab")
KERNELS = {
    "linear": "forward",
    "linear_grad_input": "grad input",
    "linear_grad_values": "grad values",
    "linear_backward": "both grads",
}


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


def case_name(row: Json) -> str:
    """`768->3072, batch 2048`"""
    return f"{row['layer']}, batch {row['batch']}"


# ---------------------------------------------------------------- verdicts


def judge(measured: Json | None, floor: float, aim: float | None = None, most: bool = False) -> str:
    """`aim`, `floor`, `MISSED` or `not measured`, by the median. most: a limit from above."""
    if not measured:
        return "not measured"
    sign = -1 if most else 1
    if aim is not None and sign * measured["median"] >= sign * aim:
        return "aim"
    return "floor" if sign * measured["median"] >= sign * floor else "MISSED"


WHAT = {"x_dense": "forward + backward, x dense", "x_best_peer": "forward + backward, x best peer"}


def _verdict(what: str, row: Json, measured: Json | None, floor: float, aim: float | None) -> Json:
    most = what.startswith("tiny")
    return {
        "what": what,
        "case": case_name(row) if "layer" in row else f"{row['name']}, batch {row['batch']}",
        "sparsity": row["sparsity"],
        "threads": row["threads"],
        "measured": measured,
        "floor": floor,
        "aim": aim,
        "at_most": most,
        "verdict": judge(measured, floor, aim, most),
    }


def _row_verdicts(row: Json, limits: Json) -> list[Json]:
    found = []
    targets = row["targets"]
    ratio = {
        "x_dense": row["contestants"].get("sparsetrain", {}).get("x_dense"),
        "x_best_peer": row.get("x_best_peer"),
    }
    for what, goal in targets.items():
        found.append(_verdict(WHAT[what], row, ratio[what], goal["floor"], goal["aim"]))
    if row["sparsity"] in limits["roofline_sparsities"]:
        for kernel in KERNELS:
            fraction = row["kernels"].get(kernel, {}).get("fraction_of_l1")
            floor = limits["roofline_fraction"]
            found.append(
                _verdict(f"{KERNELS[kernel]} kernel / L1 ceiling", row, fraction, floor, None)
            )
    if row["threads"] == 2 and targets:
        scaling = row.get("scaling", {}).get("sparsetrain")
        found.append(
            _verdict("two threads / one", row, scaling, limits["scaling_two_threads"], None)
        )
    return found


def verdicts(data: Json) -> list[Json]:
    """Every requirement of the shapes file with what was measured for it."""
    found = []
    for run in data["runs"]:
        for row in run["rows"]:
            found += _row_verdicts(row, data["limits"])
        tiny = run["tiny"]
        for kind in ("training", "forward"):
            ratio = tiny.get(f"{kind}_x_dense_time")
            limit = data["limits"]["tiny_overhead"]
            found.append(_verdict(f"tiny {kind} time / dense", tiny, ratio, limit, None))
    return found


def wrong_results(data: Json) -> list[str]:
    """Where sparsetrain itself gave a wrong result or crashed: no time counts then."""
    lines = []
    for run in data["runs"]:
        for row in (*run["rows"], run["tiny"]):
            entry = row["contestants"].get("sparsetrain", {})
            if entry.get("status") in ("wrong", "crashed"):
                name = case_name(row) if "layer" in row else row["name"]
                lines.append(f"{name} at {percent(row['sparsity'])}: {entry.get('detail')}")
    return lines


# ---------------------------------------------------------------- text


def one_line(row: Json) -> str:
    """Progress of a run: the case and what each contestant reached."""
    parts = []
    for name, entry in row["contestants"].items():
        if "ms" not in entry:
            shown = entry["status"] if entry["status"] != "ok" or name != "torch.sparse" else "ok"
        elif name == "dense":
            shown = f"{median(entry['ms'])} ms"
        else:
            shown = f"{median(entry['x_dense'])}x"
        parts.append(f"{name} {shown}")
    head = f"{case_name(row)} at {percent(row['sparsity'])}"
    return f"{head}: {', '.join(parts)}; {row['rounds']} rounds"


def _result(entry: Json | None) -> str:
    """A contestant's speed over dense, or why it has none."""
    if not entry:
        return "-"
    return with_spread(entry["x_dense"]) if "x_dense" in entry else entry["status"]


def _goal(goal: Json | None) -> str:
    return f"{goal['floor']:g} / {goal['aim']:g}" if goal else "-"


def _main_table(run: Json) -> str:
    header = [
        "layer",
        "sparsity",
        "dense ms",
        "sparsetrain ms",
        "x dense",
        "floor / aim",
        "verdict",
    ]
    header += ["best peer", "x best peer", "floor / aim", "verdict"]
    if run["threads"] == 1:
        header += ["CPU time: x dense", "x best peer"]
    rows = []
    for row in run["rows"]:
        entries, targets = row["contestants"], row["targets"]
        own = entries.get("sparsetrain", {})
        cells = [case_name(row), percent(row["sparsity"]), median(entries["dense"].get("ms"))]
        cells += [median(own.get("ms")), _result(own), _goal(targets.get("x_dense"))]
        cells.append(_judged(own.get("x_dense"), targets.get("x_dense")))
        cells += [row.get("best_peer", "-"), with_spread(row.get("x_best_peer"))]
        cells += [_goal(targets.get("x_best_peer"))]
        cells.append(_judged(row.get("x_best_peer"), targets.get("x_best_peer")))
        if run["threads"] == 1:
            cells += [median(row["cpu_time"].get(what)) for what in ("x_dense", "x_best_peer")]
        rows.append(cells)
    return table(header, rows)


def _judged(measured: Json | None, goal: Json | None) -> str:
    return judge(measured, goal["floor"], goal["aim"]) if goal else "-"


def _peer_table(run: Json) -> str:
    rows = []
    for row in run["rows"]:
        entries = row["contestants"]
        if not any(name in entries for name in PEERS):
            continue
        cells = [case_name(row), percent(row["sparsity"])]
        cells += [_result(entries.get(name)) for name in ("sparsetrain", *PEERS)]
        rows.append(cells)
    header = ["layer", "sparsity", "sparsetrain", *PEERS]
    return table(header, rows) if rows else ""


def _forward_table(run: Json) -> str:
    rows = []
    for row in run["rows"]:
        forward, entry = row["forward"], row["contestants"].get("torch.sparse")
        if not row["targets"]:
            continue
        cells = [
            case_name(row),
            percent(row["sparsity"]),
            median(forward.get("dense", {}).get("ms")),
        ]
        cells.append(with_spread(forward.get("sparsetrain", {}).get("x_dense")))
        measured = forward.get("torch.sparse", {}).get("x_dense")
        cells.append(with_spread(measured) if measured else (entry or {}).get("status", "-"))
        rows.append(cells)
    return table(["layer", "sparsity", "dense ms", "sparsetrain", "torch.sparse CSR"], rows)


def _kernel_table(run: Json) -> str:
    rows = []
    for row in run["rows"]:
        if not row["kernels"]:
            continue
        cells = [case_name(row), percent(row["sparsity"]), median(row["ceilings"]["L1"])]
        for kernel in KERNELS:
            entry = row["kernels"].get(kernel)
            cells.append(median(entry and entry["gflops"]))
            cells.append(with_spread(entry and entry["fraction_of_l1"]))
        rows.append(cells)
    header = ["layer", "sparsity", "L1 ceiling GF/s"]
    for shown in KERNELS.values():
        header += [f"{shown} GF/s", "of L1"]
    return table(header, rows) if rows else ""


def _scaling_table(run: Json, limit: float) -> str:
    rows = []
    for row in run["rows"]:
        if "scaling" in row:
            scaling = row["scaling"]
            cells = [case_name(row), percent(row["sparsity"])]
            cells.append(with_spread(scaling.get("sparsetrain")))
            cells.append(judge(scaling.get("sparsetrain"), limit) if row["targets"] else "-")
            cells += [with_spread(scaling.get("dense")), with_spread(scaling["l1_ceiling"])]
            rows.append(cells)
    header = ["layer", "sparsity", f"sparsetrain (at least {limit:g})", "verdict", "dense"]
    return table([*header, "L1 ceiling"], rows) if rows else ""


def _tiny_table(data: Json) -> str:
    rows = []
    limit = data["limits"]["tiny_overhead"]
    for run in data["runs"]:
        tiny = run["tiny"]
        for kind in ("training", "forward"):
            ratio = tiny.get(f"{kind}_x_dense_time")
            cells = [f"{tiny['name']}, batch {tiny['batch']}, {kind}", str(run["threads"])]
            cells += [median(tiny.get(f"{kind}_dense_us")), median(tiny.get(f"{kind}_us"))]
            cells += [with_spread(ratio), judge(ratio, limit, most=True)]
            rows.append(cells)
    header = ["layer", "threads", "dense us", "sparsetrain us", f"x dense time (at most {limit:g})"]
    return table([*header, "verdict"], rows)


def _ceiling_table(data: Json) -> str:
    rows = []
    for run in data["runs"]:
        for level, size in run["ceiling_bytes"].items():
            seen = [row["ceilings"][level]["median"] for row in run["rows"]]
            entry = {"median": sorted(seen)[len(seen) // 2], "p25": min(seen), "p75": max(seen)}
            shown = f"{size >> 10} KiB" if size else "-"
            rows.append([level, str(run["threads"]), shown, with_spread(entry)])
    return table(["ceiling", "threads", "buffer per thread", "GF/s: median (least-most)"], rows)


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
            cells = [v["what"], v["case"], percent(v["sparsity"]), str(v["threads"])]
            rows.append([*cells, with_spread(v["measured"]), f"{sense} {v['floor']:g}"])
        header = ["missed", "layer", "sparsity", "threads", "measured", "required"]
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


def linear_sections(data: Json) -> list[tuple[str, str]]:
    """(heading, Markdown) of everything a linear.py result holds."""
    loads = sorted(row["other_load_cpus"] for run in data["runs"] for row in run["rows"])
    neighbours = (
        f"- CPUs kept busy by other processes meanwhile: {loads[len(loads) // 2]:g} "
        f"({loads[0]:g}-{loads[-1]:g}); {sum(run['seconds'] for run in data['runs']):.0f} s in all"
    )
    machine = environment_lines(data["runs"][0]["environment"])
    sections = [("Machine", f"{machine}\n{neighbours}")]
    sections.append(("Requirements", verdict_summary(data)))
    for run in data["runs"]:
        name = f"{run['threads']} thread" + ("s" if run["threads"] > 1 else "")
        parts = [
            (f"Forward + backward, {name}", _main_table(run)),
            (f"Every library, x dense, forward + backward, {name}", _peer_table(run)),
            (f"Forward only, x dense, {name}", _forward_table(run)),
            (f"Kernels alone against the L1 ceiling, {name}", _kernel_table(run)),
            (
                f"Time on one thread / time on {name}",
                _scaling_table(run, data["limits"]["scaling_two_threads"]),
            ),
        ]
        sections += [(heading, text) for heading, text in parts if text]
    sections.append(("Tiny layers", _tiny_table(data)))
    sections.append(("Ceilings", _ceiling_table(data)))
    return sections


def linear_report(data: Json, level: str = "##") -> str:
    """The whole report as Markdown, with the command it came from."""
    parts = [f"`{data['command']}`"]
    parts += [f"{level} {heading}\n\n{text}" for heading, text in linear_sections(data)]
    return "\n\n".join(parts)


# ---------------------------------------------------------------- memory


def memory_missed(data: Json) -> bool:
    """Whether any limit of memory.py was exceeded."""
    limits = [row["verdict"] for row in (*data["layers"], *data["peaks"]) if _is_own(row)]
    saved = any(row["extra_bytes_saved"] for row in data["saved"])
    return saved or "MISSED" in limits or data["resident"]["per_nonzero"] > data["limit"]


def _is_own(row: Json) -> bool:
    return row.get("kind") != "dense"


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
        rows.append([*cells, row["verdict"] if _is_own(row) else "-"])
    header = ["layer", "input MiB", "outputs and gradients MiB", "peak of the step MiB"]
    peaks = table([*header, "beyond them MiB", "verdict"], rows)
    return [
        ("Machine", environment_lines(data["environment"])),
        ("Resident bytes per nonzero, added up", exact),
        ("Resident bytes per nonzero, of a process", measured),
        ("What backward keeps", saved),
        ("Peak of a training step", peaks),
    ]


def memory_report(data: Json, level: str = "##") -> str:
    """The whole report as Markdown, with the command it came from."""
    parts = [f"`{data['command']}`"]
    parts += [f"{level} {heading}\n\n{text}" for heading, text in memory_sections(data)]
    return "\n\n".join(parts)
