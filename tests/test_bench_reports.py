"""What becomes of benchmark results: comparison, verdicts, documents, README tables."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsetrain.bench import compare, layer_tables, page, processes, report, verdicts
from sparsetrain.bench.compare import Speed
from sparsetrain.cli import app

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import readme_tables  # noqa: E402  (a script: its folder goes on the path first)


def spread(median: float, width: float = 0.0) -> dict[str, float]:
    return {"median": median, "p25": median - width, "p75": median + width, "rounds": 5}


def row(layer: str, speed: float, status: str = "ok", peer: float | None = None) -> dict[str, Any]:
    own: dict[str, Any] = {"status": status}
    if status == "ok":
        own.update(ms=spread(10.0), x_dense=spread(speed, 0.01 * speed), round_ms=[10.0])
    found = {
        "layer": layer,
        "batch": 32,
        "sparsity": 0.9,
        "threads": 1,
        "rounds": 5,
        "other_load_cpus": 0.1,
        "targets": {"x_dense": {"floor": 2.0, "aim": 4.0}},
        "contestants": {"dense": {"status": "ok", "ms": spread(20.0)}, "sparsetrain": own},
        "kernels": {},
    }
    if peer is not None:
        own_peer = {"status": "ok", "ms": spread(30.0), "x_dense": spread(0.7)}
        found["contestants"]["sparseprop"] = own_peer
        found.update(best_peer="sparseprop", x_best_peer=spread(peer))
        found["targets"]["x_best_peer"] = {"floor": 1.5, "aim": None}
    return found


def result(*rows: dict[str, Any], limits: dict[str, Any] | None = None) -> dict[str, Any]:
    environment = {
        "cpu": "a CPU",
        "cpus": 2,
        "caches": {"L1": 32768},
        "flags": ["avx2"],
        "system": "Linux",
        "python": "3.11",
        "versions": {"torch": "2"},
        "mkl": "MKL",
        "isa": "avx2",
        "date": "today",
        "commit": "abc",
    }
    run = {"threads": 1, "environment": environment, "rows": list(rows), "seconds": 1.0}
    data = {"benchmark": "layers", "set": "conv", "command": "sparsetrain bench layers --set conv"}
    data.update(limits=limits or {}, runs=[run])  # type: ignore[arg-type]
    data["verdicts"] = verdicts.layer_verdicts(data)  # type: ignore[assignment]
    return data


@pytest.mark.parametrize(
    ("old", "new", "noise", "word"),
    [
        (4.0, 4.0, 0.0, "same"),
        (4.0, 3.9, 0.0, "same"),  # within the 3 % that are never called a change
        (4.0, 3.8, 0.0, "SLOWER"),
        (4.0, 4.2, 0.0, "faster"),
        (4.0, 3.8, 0.1, "same"),
        (4.0, 4.2, 0.1, "same"),
        (4.0, 3.4, 0.1, "SLOWER"),
        (4.0, 4.7, 0.1, "faster"),
    ],
)
def test_a_change_counts_beyond_the_noise(old: float, new: float, noise: float, word: str) -> None:
    ratio, width, found = compare.verdict(Speed(old, noise), Speed(new, 0.0))
    assert found == word
    assert ratio == new / old
    assert width == max(noise, compare.LEAST_NOISE)


@pytest.mark.parametrize(
    ("new", "code", "said"),
    [
        (row("a", 4.0), 0, "0 slower, 0 faster, 1 the same"),
        (row("a", 5.0), 0, "0 slower, 1 faster, 0 the same"),
        (row("a", 3.0), 1, "1 slower, 0 faster, 0 the same"),
        (row("a", 4.0, "wrong"), 1, "WRONG OR CRASHED NOW: a, batch 32, 90 %, 1, sparsetrain"),
        (row("b", 4.0), 2, "no measurement in common"),
    ],
)
def test_compare_exits_with_1_on_a_regression(
    new: dict[str, Any], code: int, said: str, tmp_path: Path
) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, data in zip(files, (result(row("a", 4.0)), result(new)), strict=True):
        file.write_text(json.dumps(data))
    done = CliRunner().invoke(app, ["bench", "compare", *map(str, files)])
    assert done.exit_code == code
    assert said in done.output


def test_layers_of_whole_networks_take_a_line_each() -> None:
    rows = [row("a", 4.0), {**row("a", 1.5), "sparsity": 0.5}, row("b", 3.0, "wrong")]
    data = {**result(*rows), "set": "models"}
    found = dict(layer_tables.layer_sections(data))["Forward + backward, 1 thread"]
    assert "| layer | 50 % | 90 % |" in found
    assert "| a, batch 32 | **1.50** | 4.00 |" in found
    assert "| b, batch 32 | - | wrong |" in found


def test_compare_names_an_unreadable_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    done = CliRunner().invoke(app, ["bench", "compare", str(bad), str(bad)])
    assert done.exit_code == 2
    assert "bad.json: not a readable JSON file" in done.output


def test_geometric_means_are_required_of_rows_with_targets() -> None:
    limits = {"best_peer_geomean": {"floor": 2.5, "aim": 4.0}}
    data = result(row("a", 4.0, peer=2.0), row("b", 4.0, peer=8.0), row("c", 4.0), limits=limits)
    (mean,) = [v for v in data["verdicts"] if "geometric mean" in v["what"]]
    assert mean["measured"]["median"] == pytest.approx(4.0)
    assert (mean["measured"]["p25"], mean["verdict"]) == (2.0, "aim")
    narrow = {"dense_geomean": {"floor": 4.5, "aim": 6.0, "sparsity": 0.9, "batch": 32}}
    (mean,) = verdicts.mean_verdicts(data["runs"][0], narrow)
    assert mean["verdict"] == "MISSED"
    assert (
        verdicts.mean_verdicts(data["runs"][0], {"dense_geomean": {"batch": 1, "floor": 1}}) == []
    )


def test_wrong_results_of_ours_are_listed_and_those_of_peers_are_not() -> None:
    data = result(row("a", 4.0, "wrong"), row("b", 4.0, peer=2.0))
    data["runs"][0]["rows"][1]["contestants"]["sparseprop"] = {"status": "wrong", "detail": "y"}
    assert verdicts.wrong_results(data) == ["a, batch 32 at 90 %: None"]


def _results(folder: Path) -> Path:
    data = result(row("3x3 <64>", 4.0, peer=2.0), row("b", 1.0))
    second = deepcopy(data["runs"][0]["rows"])
    for each in second:
        each["sparsity"] = 0.95
    data["runs"][0]["rows"] += second
    data["verdicts"] = verdicts.layer_verdicts(data)
    (folder / "conv.json").write_text(json.dumps(data))
    return folder


def test_the_document_has_the_command_above_every_table_and_the_losses(tmp_path: Path) -> None:
    output = tmp_path / "docs" / "performance.md"
    report.write(_results(tmp_path), output)
    text = output.read_text()
    tables = len(re.findall(r"^\| :-- ", text, re.MULTILINE))
    assert tables >= 3
    assert text.count("sparsetrain bench layers --set conv") >= tables
    assert "| b, batch 32 | 90 % |" in text
    assert "MISSED" in text or "missed" in text
    assert (output.parent / "conv-speedup.png").stat().st_size > 0
    assert "![Speedup over dense against sparsity](conv-speedup.png)" in text


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    report.write_page(_results(tmp_path), output)
    text = output.read_text()
    assert not re.search(r"(https?:)?//[a-z]", text.split("base64,")[0])
    assert set(re.findall(r'(?:src|href)="(#|data:image/png;base64,|.)', text)) == {
        "#",
        "data:image/png;base64,",
    }
    assert "<link" not in text
    assert "<script" not in text
    assert "3x3 &lt;64&gt;, batch 32" in text
    assert text.count("<table>") >= 3
    assert '<td class="missed">MISSED</td>' in text


def test_markdown_becomes_a_table_with_every_cell() -> None:
    text = page.from_markdown("| a | b |\n| :-- | --: |\n| 1 |  |\n\n- one\n- two\n\nend")
    assert "<thead><tr><th>a</th><th>b</th></tr></thead>" in text
    assert "<tr><td>1</td><td></td></tr>" in text
    assert "<ul><li>one</li><li>two</li></ul>" in text
    assert text.endswith("<p>end</p>")


def test_settings_that_change_speeds_are_part_of_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in processes.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/models.py", "--json", "/somewhere/models.json"])
    assert processes.command_line() == "python benchmarks/models.py --json models.json"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert processes.command_line().startswith("THP_MEM_ALLOC_ENABLE=1 python benchmarks/models.py")


def test_a_file_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(json.dumps({"benchmark": "layers"}))
    with pytest.raises(ValueError, match=r"memory\.json: expected a result of .*bench memory"):
        report.load_results(tmp_path)


def test_the_readme_shows_layers(tmp_path: Path) -> None:
    text = readme_tables.generate(
        "x\n<!-- measured:begin (a) -->\nold\n<!-- measured:end -->\ny", _results(tmp_path)
    )
    assert "old" not in text
    assert "| layer | 90 % | 95 % |" in text
    assert "| b, batch 32 | 1.0x | 1.0x |" in text
