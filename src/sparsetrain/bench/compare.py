"""Two result files of the same benchmark: what became faster or slower, beyond the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparsetrain.bench.tables import number, percent, table
from sparsetrain.bench.timing import Json

LEAST_NOISE = 0.03  # what is never called a change: placement of memory, another day
MEDIAN_ERROR = 1.57  # times the quartile distance / sqrt(rounds): 95 % interval of a median


@dataclass(frozen=True)
class Speed:
    """How many times dense, with half the width of its 95 % interval as a fraction of it."""

    median: float
    noise: float


def speeds(data: Json) -> dict[tuple[str, ...], Speed]:
    """Every speed of sparsetrain over dense in a result of `bench layers` or `bench models`."""
    return {key: _speed(entry) for key, entry in _entries(data)}


def _entries(data: Json) -> Iterator[tuple[tuple[str, ...], Json]]:
    for run in data.get("runs", ()):
        for row in run.get("rows", ()):
            where = f"{row['layer']}, batch {row['batch']}" if "layer" in row else row["title"]
            for name in ("sparsetrain", "tuned"):
                entry = row["contestants"].get(name, {})
                if "x_dense" in entry:
                    yield (where, percent(row["sparsity"]), str(run["threads"]), name), entry


def _speed(entry: Json) -> Speed:
    ratio = entry["x_dense"]
    width = (ratio["p75"] - ratio["p25"]) / ratio["median"]
    # Quartiles of two or three rounds say little: no less than the whole width counts then.
    return Speed(ratio["median"], max(width / 2, MEDIAN_ERROR * width / math.sqrt(ratio["rounds"])))


def verdict(old: Speed, new: Speed) -> tuple[float, float, str]:
    """(new speed / old speed, noise of that ratio as a fraction, faster, slower or same)."""
    ratio = new.median / old.median
    noise = max(LEAST_NOISE, math.hypot(old.noise, new.noise))
    if ratio > 1 + noise:
        return ratio, noise, "faster"
    return ratio, noise, "SLOWER" if ratio < 1 / (1 + noise) else "same"


def broken(old: Json, new: Json) -> list[tuple[str, ...]]:
    """Where a speed was measured before and now the result is wrong or crashed."""
    before = speeds(old)
    found: list[tuple[str, ...]] = []
    for run in new.get("runs", ()):
        for row in run.get("rows", ()):
            where = f"{row['layer']}, batch {row['batch']}" if "layer" in row else row["title"]
            for name, entry in row["contestants"].items():
                key = (where, percent(row["sparsity"]), str(run["threads"]), name)
                if key in before and entry["status"] in ("wrong", "crashed"):
                    found.append(key)
    return found


def compare(old: Json, new: Json) -> Json:
    """{"rows": [...], "slower", "faster", "same": counts, "broken", "missing": keys}.

    Raises ValueError where the files have nothing in common.
    """
    before, after = speeds(old), speeds(new)
    common = [key for key in before if key in after]
    wrong = broken(old, new)
    if not common and not wrong:
        raise ValueError(
            "the two files have no measurement in common: both must be results of `sparsetrain "
            "bench layers` or both of `bench models`, with some of the same layers"
        )
    rows = []
    for key in common:
        ratio, noise, word = verdict(before[key], after[key])
        old_speed, new_speed = before[key].median, after[key].median
        row = dict(zip(("what", "sparsity", "threads", "contestant"), key, strict=True))
        rows.append(
            {**row, "old": old_speed, "new": new_speed, "ratio": ratio, "noise": noise}
            | {"verdict": word}
        )
    count = {word: sum(r["verdict"] == word for r in rows) for word in ("SLOWER", "faster", "same")}
    missing = [list(key) for key in before if key not in after and key not in wrong]
    same_cpu = _cpu(old) == _cpu(new)
    return {"rows": rows, **count, "broken": wrong, "missing": missing, "same_cpu": same_cpu}


def _cpu(data: Json) -> str | None:
    return next((run.get("environment", {}).get("cpu") for run in data.get("runs", ())), None)


def regressed(result: Json) -> bool:
    """Whether anything is slower beyond the noise, or wrong now."""
    return bool(result["SLOWER"] or result["broken"])


def compare_report(result: Json) -> str:
    """The comparison as Markdown: the changes first."""
    order = {"SLOWER": 0, "faster": 1, "same": 2}
    rows = []
    for row in sorted(result["rows"], key=lambda r: (order[r["verdict"]], r["ratio"])):
        cells = [row[name] for name in ("what", "sparsity", "threads", "contestant")]
        cells += [number(row["old"]), number(row["new"]), number(row["ratio"])]
        rows.append([*cells, f"{100 * row['noise']:.0f} %", row["verdict"]])
    header = ["what", "sparsity", "threads", "contestant", "old x dense", "new x dense"]
    text = table([*header, "new / old", "noise", "verdict"], rows)
    text += f"\n\n{result['SLOWER']} slower, {result['faster']} faster, {result['same']} the same"
    text += f"; {len(result['missing'])} measured before and not now."
    for key in result["broken"]:
        text += f"\nWRONG OR CRASHED NOW: {', '.join(key)}"
    if not result["same_cpu"]:
        text += "\nThe files come from different CPUs: read the ratios with care."
    return text
