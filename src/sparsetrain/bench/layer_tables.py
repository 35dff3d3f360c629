"""From the JSON of the layers benchmark to Markdown tables. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.bench.break_even import break_even
from sparsetrain.bench.tables import (
    environment_lines,
    goal_cell,
    markdown,
    median,
    number,
    percent,
    speed,
    table,
    threads_name,
    verdict_summary,
    with_spread,
)
from sparsetrain.bench.timing import Json
from sparsetrain.bench.verdicts import (
    case_name,
    curve,
    geometric_mean,
    judge,
    kernel_name,
    peer_summary,
)

PEERS = ("sparseprop", "sparselab")
FEWEST_POINTS = 4  # of a layer, or no break-even is told


def one_line(row: Json) -> str:
    """Progress of a run: the case and what each contestant reached."""
    parts = []
    for name, entry in row["contestants"].items():
        if name == "dense" and "ms" in entry:
            shown = f"{median(entry['ms'])} ms"
        else:
            shown = f"{median(entry['x_dense'])}x" if "x_dense" in entry else entry["status"]
        parts.append(f"{name} {shown}")
    head = f"{case_name(row)} at {percent(row['sparsity'])}"
    return f"{head}: {', '.join(parts)}; {row['rounds']} rounds"


def _judged(measured: Json | None, goal: Json | None) -> str:
    return judge(measured, goal["floor"], goal["aim"]) if goal else "-"


def _has_peers(run: Json) -> bool:
    return any("best_peer" in row for row in run["rows"])


def _main_table(run: Json) -> str:
    peers = _has_peers(run)
    tuned = any("tuned" in row["contestants"] for row in run["rows"])
    header = ["layer", "sparsity", "dense ms", "sparsetrain ms", "x dense", "floor / aim"]
    header += ["verdict", *(["tuned: x dense", "x untuned"] if tuned else [])]
    header += ["best peer", "x best peer", "floor / aim", "verdict"] if peers else []
    header += ["CPU time: x dense"] if run["threads"] == 1 else []
    rows = []
    for row in run["rows"]:
        entries, targets = row["contestants"], row["targets"]
        own = entries.get("sparsetrain", {})
        dense = entries.get("dense", {}).get("ms")
        cells = [case_name(row), percent(row["sparsity"]), median(dense)]
        cells += [median(own.get("ms")), speed(own), goal_cell(targets.get("x_dense"))]
        cells.append(_judged(own.get("x_dense"), targets.get("x_dense")))
        if tuned:
            cells += [speed(entries.get("tuned")), with_spread(row.get("tuned_gain"))]
        if peers:
            goal = targets.get("x_best_peer") if "best_peer" in row else None
            cells += [row.get("best_peer", "-"), with_spread(row.get("x_best_peer"))]
            cells += [goal_cell(goal), _judged(row.get("x_best_peer"), goal)]
        if run["threads"] == 1:
            cells.append(median(row.get("cpu_time", {}).get("x_dense")))
        rows.append(cells)
    return table(header, rows)


def _wide_table(run: Json) -> str:
    """A row per layer, a column per sparsity: for results with more layers than can be read."""
    found: dict[str, dict[float, str]] = {}
    for row in run["rows"]:
        own = row["contestants"].get("sparsetrain", {})
        ratio, goal = own.get("x_dense"), row["targets"].get("x_dense")
        shown = median(ratio) if ratio else own.get("status", "-")
        missed = _judged(ratio, goal) == "MISSED"
        found.setdefault(case_name(row), {})[row["sparsity"]] = f"**{shown}**" if missed else shown
    sparsities = sorted({s for cells in found.values() for s in cells})
    rows = [[name, *(cells.get(s, "-") for s in sparsities)] for name, cells in found.items()]
    line = "Times dense; bold where the floor is missed."
    gains = [row["tuned_gain"]["median"] for row in run["rows"] if "tuned_gain" in row]
    mean = geometric_mean(gains)
    if mean is not None:
        line += f" Tuned, {len(gains)} of them are {mean:.3f} times as fast (geometric mean)."
    return f"{line}\n\n" + table(["layer", *map(percent, sparsities)], rows)


def _peer_table(run: Json) -> str:
    rows, present = [], [p for p in PEERS if any(p in row["contestants"] for row in run["rows"])]
    for row in run["rows"]:
        entries = row["contestants"]
        if not any(name in entries for name in present):
            continue
        cells = [case_name(row), percent(row["sparsity"])]
        cells += [speed(entries.get(name)) for name in ("sparsetrain", *present)]
        variant = entries.get("sparseprop", {}).get("variant", "")
        rows.append([*cells, variant.removeprefix("sparseprop ") or "-"])
    if not rows:
        return ""
    summary = peer_summary(run)
    line = (
        f"\n\nTimes the best peer: geometric mean {number(summary['geomean'])}, least "
        f"{number(summary['min'])}, most {number(summary['max'])} over {summary['rows']} rows."
        if summary
        else ""
    )
    header = ["layer", "sparsity", "sparsetrain", *present, "its better variant"]
    if not any(row[-1] != "-" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return table(header, rows) + line


def _break_even_cell(points: Sequence[tuple[float, float]]) -> str:
    """The break-even as read off the curve, or on which side of it the curve lies."""
    if not points:
        return "-"
    cross = break_even(points)
    if cross is not None:
        return percent(round(cross, 2))
    if points[-1][1] >= 1:
        return f"below {percent(points[0][0])}"
    return f"above {percent(points[-1][0])}"


def _break_even_table(run: Json) -> str:
    """The break-even of each library, of layers that were measured at low sparsities too."""
    names = [n for n in PEERS if any(n in row["contestants"] for row in run["rows"])]
    rows = []
    for case in dict.fromkeys(case_name(row) for row in run["rows"]):
        own = curve(run, case, "sparsetrain")
        if len(own) >= FEWEST_POINTS and own[0][0] < 0.5:
            others = [_break_even_cell(curve(run, case, name)) for name in names]
            rows.append([case, _break_even_cell(own), *others])
    return table(["layer", "sparsetrain", *names], rows) if rows else ""


def _forward_table(run: Json) -> str:
    rows = []
    for row in run["rows"]:
        forward, entry = row.get("forward"), row["contestants"].get("torch.sparse")
        if not row["targets"] or not forward:
            continue
        dense = forward.get("dense", {}).get("ms")
        cells = [case_name(row), percent(row["sparsity"]), median(dense)]
        cells.append(with_spread(forward.get("sparsetrain", {}).get("x_dense")))
        measured = forward.get("torch.sparse", {}).get("x_dense")
        cells.append(with_spread(measured) if measured else (entry or {}).get("status", "-"))
        rows.append(cells)
    header = ["layer", "sparsity", "dense ms", "sparsetrain", "torch.sparse CSR"]
    return table(header, rows) if rows else ""


def kernel_table(run: Json) -> str:
    """Each kernel alone, and its part of the L1 ceiling; "" where none was measured."""
    rows, names = [], ["forward", "grad input", "grad values", "both grads"]
    for row in run["rows"]:
        if not row["kernels"]:
            continue
        cells = [case_name(row), percent(row["sparsity"]), median(row["ceilings"]["L1"])]
        entries = {kernel_name(name): entry for name, entry in row["kernels"].items()}
        for kernel in names:
            entry = entries.get(kernel)
            cells.append(median(entry and entry["gflops"]))
            cells.append(with_spread(entry and entry["fraction_of_l1"]))
        rows.append(cells)
    header = ["layer", "sparsity", "L1 ceiling GF/s"]
    for shown in names:
        header += [f"{shown} GF/s", "of L1"]
    return table(header, rows) if rows else ""


def _scaling_table(run: Json, limit: float) -> str:
    rows, peers = [], [p for p in PEERS if any(p in r.get("scaling", {}) for r in run["rows"])]
    for row in run["rows"]:
        if "scaling" in row:
            scaling = row["scaling"]
            cells = [case_name(row), percent(row["sparsity"])]
            cells.append(with_spread(scaling.get("sparsetrain")))
            cells.append(judge(scaling.get("sparsetrain"), limit) if row["targets"] else "-")
            cells += [with_spread(scaling.get(name)) for name in ("dense", *peers, "l1_ceiling")]
            rows.append(cells)
    header = ["layer", "sparsity", f"sparsetrain (at least {limit:g})", "verdict", "dense"]
    return table([*header, *peers, "L1 ceiling"], rows) if rows else ""


def scaling_report(data: Json) -> str:
    """What `bench threads` measured, as Markdown."""
    sections = [("Machine", _machine(data))]
    limit = data["limits"].get("scaling_two_threads", 1.8)
    for run in data["runs"]:
        title = f"Time on one thread / time on {threads_name(run['threads'])}, in one process"
        sections.append((title, _scaling_table(run, limit)))
    return markdown(sections, data["command"])


def _tiny_table(data: Json) -> str:
    rows = []
    for run in data["runs"]:
        tiny = run.get("tiny")
        for kind in ("training", "forward") if tiny else ():
            limit, ratio = data["limits"]["tiny_overhead"], tiny.get(f"{kind}_x_dense_time")
            cells = [f"{tiny['name']}, batch {tiny['batch']}, {kind}", str(run["threads"])]
            cells += [median(tiny.get(f"{kind}_dense_us")), median(tiny.get(f"{kind}_us"))]
            cells += [with_spread(ratio), f"{limit:g}", judge(ratio, limit, most=True)]
            rows.append(cells)
    header = ["layer", "threads", "dense us", "sparsetrain us", "x dense time", "at most"]
    return table([*header, "verdict"], rows) if rows else ""


def ceiling_table(data: Json) -> str:
    """What the machine gave at each level, over the run."""
    rows = []
    for run in data["runs"]:
        for level, size in run.get("ceiling_bytes", {}).items():
            seen = [row["ceilings"][level]["median"] for row in run["rows"] if "ceilings" in row]
            seen = seen or [run["ceilings"][level]["median"]]
            entry = {"median": sorted(seen)[len(seen) // 2], "p25": min(seen), "p75": max(seen)}
            shown = f"{size >> 10} KiB" if size else "-"
            rows.append([level, str(run["threads"]), shown, with_spread(entry)])
    header = ["ceiling", "threads", "buffer per thread", "GF/s: median (least-most)"]
    return table(header, rows) if rows else ""


def _machine(data: Json) -> str:
    if not data["runs"]:
        return "nothing measured"
    loads = sorted(row["other_load_cpus"] for run in data["runs"] for row in run["rows"])
    neighbours = (
        f"- CPUs kept busy by other processes meanwhile: {loads[len(loads) // 2]:g} "
        f"({loads[0]:g}-{loads[-1]:g}); {sum(run['seconds'] for run in data['runs']):.0f} s in all"
    )
    left_out = sum(run.get("left_out", 0) for run in data["runs"])
    if left_out:
        neighbours += f"\n- not measured, for want of time: {left_out} layers; `--resume` goes on"
    return f"{environment_lines(data['runs'][0]['environment'])}\n{neighbours}"


def layer_sections(data: Json) -> list[tuple[str, str]]:
    """(heading, Markdown) of everything a result of `bench layers` holds."""
    sections = [("Machine", _machine(data))]
    if data["verdicts"]:
        sections.append(("Requirements", verdict_summary(data)))
    limit = data["limits"].get("scaling_two_threads", 1.8)
    for run in data["runs"]:
        name = threads_name(run["threads"])
        many = data.get("set") == "models" and not _has_peers(run)
        sections += [
            (f"Forward + backward, {name}", (_wide_table if many else _main_table)(run)),
            (f"Every library, x dense, forward + backward, {name}", _peer_table(run)),
            (f"Break-even with dense (sparsity), {name}", "" if many else _break_even_table(run)),
            (f"Forward only, x dense, {name}", _forward_table(run)),
            (f"Kernels alone against the L1 ceiling, {name}", kernel_table(run)),
            (f"Time on one thread / time on {name}, in one process", _scaling_table(run, limit)),
        ]
    sections.append(("Tiny layers", _tiny_table(data)))
    sections.append(("Ceilings", ceiling_table(data)))
    return [(heading, text) for heading, text in sections if text]


def layer_report(data: Json) -> str:
    """The whole report as Markdown, with the command it came from."""
    return markdown(layer_sections(data), data["command"])
