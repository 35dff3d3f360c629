"""Requirements of the shapes files against what was measured. Measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsetrain.bench.break_even import break_even
from sparsetrain.bench.timing import Json

WHAT = {
    "x_dense": "forward + backward, x dense",
    "x_tuned": "forward + backward, tuned, x dense",
    "x_best_peer": "forward + backward, x best peer",
}


def judge(measured: Json | None, floor: float, aim: float | None = None, most: bool = False) -> str:
    """`aim`, `floor`, `MISSED` or `not measured`, by the median. most: a limit from above."""
    if not measured:
        return "not measured"
    sign = -1 if most else 1
    if aim is not None and sign * measured["median"] >= sign * aim:
        return "aim"
    return "floor" if sign * measured["median"] >= sign * floor else "MISSED"


def targets_of(name: str | None, sparsity: float, shapes: Json) -> Json:
    """{"x_dense": {"floor", "aim"}, "x_best_peer": ...}: of a targets table at one sparsity.

    shapes: the shapes file, or its `targets` and `sparsities`. Empty where there is no table or it
    has no entry for this sparsity; an aim that the table leaves out is None.
    """
    if name is None:
        return {}
    table = shapes["targets"][name]
    known = table.get("sparsities", shapes["sparsities"])
    if sparsity not in known:
        return {}
    place = known.index(sparsity)
    return {
        what: {
            kind: table[what][kind][place] if kind in table[what] else None
            for kind in ("floor", "aim")
        }
        for what in WHAT
        if what in table
    }


def verdict(
    what: str,
    case: str,
    row: Json,
    measured: Json | None,
    goal: Json,
    most: bool = False,
) -> Json:
    """One requirement and what was measured for it. goal: {"floor", "aim" (may be None)}."""
    return {
        "what": what,
        "case": case,
        "sparsity": row.get("sparsity"),
        "threads": row.get("threads"),
        "measured": measured,
        "floor": goal["floor"],
        "aim": goal.get("aim"),
        "at_most": most,
        "verdict": judge(measured, goal["floor"], goal.get("aim"), most),
    }


def case_name(row: Json) -> str:
    """`768->3072, batch 2048`"""
    return f"{row['layer']}, batch {row['batch']}"


def _row_verdicts(row: Json, limits: Json) -> list[Json]:
    found, case = [], case_name(row)
    ratio = {
        "x_dense": row["contestants"].get("sparsetrain", {}).get("x_dense"),
        "x_tuned": row["contestants"].get("tuned", {}).get("x_dense"),
        "x_best_peer": row.get("x_best_peer"),
    }
    present = {
        "x_dense": True,
        "x_tuned": "tuned" in row["contestants"],
        "x_best_peer": any(peer in row["contestants"] for peer in ("sparseprop", "sparselab")),
    }
    for what, goal in row["targets"].items():
        if present[what]:
            found.append(verdict(WHAT[what], case, row, ratio[what], goal))
    if row["sparsity"] in limits.get("roofline_sparsities", ()) and row["kernels"]:
        goal = {"floor": limits["roofline_fraction"], "aim": limits.get("roofline_aim")}
        for kernel, entry in row["kernels"].items():
            what = f"{kernel_name(kernel)} kernel / L1 ceiling"
            found.append(verdict(what, case, row, entry["fraction_of_l1"], goal))
    if row["threads"] == 2 and row["targets"].get("x_best_peer"):
        goal = {"floor": limits["scaling_two_threads"]}
        scaling = row.get("scaling", {}).get("sparsetrain")
        found.append(verdict("two threads / one", case, row, scaling, goal))
    return found


def kernel_name(operator: str) -> str:
    """What an operator of sparsetrain computes: `linear_grad_input` -> `grad input`."""
    for end in ("grad_input", "grad_values"):
        if operator.endswith(end):
            return end.replace("_", " ")
    return "both grads" if operator.endswith("backward") else "forward"


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def peer_summary(run: Json) -> Json:
    """Geometric mean and minimum of the ratios to the best peer, over rows with such a target."""
    rows = [row for row in run["rows"] if row["targets"].get("x_best_peer")]
    return _summary([row["x_best_peer"]["median"] for row in rows if row.get("x_best_peer")])


def mean_verdicts(run: Json, limits: Json) -> list[Json]:
    """The requirements for geometric means: over all rows, or those of one sparsity and batch."""
    found = []
    for what, name in (("dense_geomean", "x dense"), ("best_peer_geomean", "x best peer")):
        goal = limits.get(what)
        if goal is None:
            continue
        ratios, narrow = [], {k: goal[k] for k in ("sparsity", "batch") if k in goal}
        for row in run["rows"]:
            own = row["contestants"].get("sparsetrain", {}).get("x_dense")
            ratio = own if what == "dense_geomean" else row.get("x_best_peer")
            wanted = row["targets"] if narrow else row["targets"].get("x_best_peer")
            if ratio and wanted and all(row[k] == v for k, v in narrow.items()):
                ratios.append(ratio["median"])
        summary = _summary(ratios)
        if summary:
            low, high, count = summary["min"], summary["max"], summary["rows"]
            measured = {"median": summary["geomean"], "p25": low, "p75": high, "rounds": count}
            case = f"{count} layers" + (f", batch {goal['batch']}" if "batch" in goal else "")
            row = {"threads": run["threads"], "sparsity": goal.get("sparsity")}
            title = f"{name}, geometric mean (least-most)"
            found.append(verdict(title, case, row, measured, goal))
    return found


def _summary(ratios: Sequence[float]) -> Json:
    mean = geometric_mean(ratios)
    if mean is None:
        return {}
    return {"geomean": mean, "min": min(ratios), "max": max(ratios), "rows": len(ratios)}


def curve(run: Json, case: str, name: str) -> list[tuple[float, float]]:
    """(sparsity, speedup over dense) of one contestant on one layer, sorted."""
    points = []
    for row in run["rows"]:
        entry = row["contestants"].get(name, {})
        if case_name(row) == case and "x_dense" in entry:
            points.append((row["sparsity"], entry["x_dense"]["median"]))
    return sorted(points)


def _break_even_verdicts(run: Json, limits: Json) -> list[Json]:
    """`limits["break_even"]`: case -> the sparsity by which it must have passed dense."""
    found, measured_cases = [], {case_name(row) for row in run["rows"]}
    for case, limit in limits.get("break_even", {}).items():
        if case not in measured_cases:
            continue
        points, measured = curve(run, case, "sparsetrain"), None
        if points and points[0][0] <= limit:
            cross = break_even(points)
            if cross is None:
                cross = points[0][0] if points[-1][1] >= 1 else 1.0
            measured = {"median": cross, "p25": cross, "p75": cross, "rounds": len(points)}
        facts = {"threads": run["threads"], "sparsity": None}
        goal = {"floor": limit}
        found.append(verdict("break-even with dense, sparsity", case, facts, measured, goal, True))
    return found


def layer_verdicts(data: Json) -> list[Json]:
    """Every requirement of the shapes file with what was measured for it."""
    found, limits = [], data["limits"]
    for run in data["runs"]:
        for row in run["rows"]:
            found += _row_verdicts(row, limits)
        found += mean_verdicts(run, limits)
        found += _break_even_verdicts(run, limits)
        tiny = run.get("tiny")
        for kind in ("training", "forward") if tiny else ():
            ratio, goal = tiny.get(f"{kind}_x_dense_time"), {"floor": limits["tiny_overhead"]}
            case = f"{tiny['name']}, batch {tiny['batch']}"
            found.append(verdict(f"tiny {kind} time / dense", case, tiny, ratio, goal, True))
    return found


def wrong_results(data: Json) -> list[str]:
    """Where sparsetrain itself gave a wrong result or crashed: no time counts then."""
    lines = []
    for run in data["runs"]:
        for row in (*run["rows"], *([run["tiny"]] if run.get("tiny") else [])):
            for name in ("sparsetrain", "tuned"):
                entry = row["contestants"].get(name, {})
                if entry.get("status") in ("wrong", "crashed"):
                    where = case_name(row) if "layer" in row else row.get("name", row.get("model"))
                    lines.append(f"{where} at {100 * row['sparsity']:g} %: {entry.get('detail')}")
    return lines
