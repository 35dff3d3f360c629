"""Two processes on one machine: the same topology everywhere, and a clean end when one dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparsify_cases import ALGORITHMS, network, train
from sparsify_ranks import SCHEDULES

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

SCRIPT = Path(__file__).with_name("sparsify_ranks.py")


def run(tmp_path, *arguments, timeout=240):
    """What each of two processes printed, and how it ended."""
    (tmp_path / "meet").unlink(missing_ok=True)  # of an earlier run
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), "2", str(tmp_path / "meet"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *o) for p, o in zip(processes, outputs, strict=True)]


def parts(output):
    head, tail = output.split("]")
    return head, [float(loss) for loss in tail.split()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in ALGORITHMS if k != "Static"])
def test_all_ranks_hold_the_topology_that_one_process_would(kind, tmp_path):
    results = run(tmp_path, kind)
    for code, _, errors in results:
        assert code == 0, errors
    (first, first_losses), (second, second_losses) = (parts(r[1]) for r in results)
    assert first == second
    if kind == "RigL":  # whose candidates are each rank's own, so one process may choose others
        assert first.startswith("6 ")
        return
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsifier = ALGORITHMS[kind](model, optimizer, 0.7, schedule=SCHEDULES[kind])
    losses = train(model, optimizer, sparsifier, range(20))
    both = (torch.tensor(first_losses) + torch.tensor(second_losses)) / 2
    torch.testing.assert_close(both, torch.tensor(losses), rtol=1e-6, atol=1e-8)
    assert first == f"{sparsifier.updates} {sparsifier._fingerprints()}".rstrip("]")
    assert sparsifier.updates >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GMP", "ACDC", "TopKAST"])  # whose layers change their lengths
def test_all_ranks_go_on_from_what_was_saved(kind, tmp_path):
    for (code, output, errors), (_, whole, _) in zip(
        run(tmp_path, kind, "resume"), run(tmp_path, kind), strict=True
    ):
        assert code == 0, errors
        assert output == whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RigL", "SET"])
def test_a_rank_that_dies_ends_the_other_with_an_error(kind, tmp_path):
    (code, output, errors), (other, *_) = run(tmp_path, kind, "die", timeout=150)
    assert other == 9
    assert code == 1
    assert not output
    assert "RuntimeError" in errors
