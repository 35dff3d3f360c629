"""The examples that train in a loop of their own: they run, and learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_an_algorithm_of_ones_own(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import custom_sparsifier

    losses = custom_sparsifier.main(steps=200)
    assert losses[-1] < 0.7 * losses[0]
    assert "Restless, step 200" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
def test_several_processes_learn():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", EXAMPLES / "ddp_rigl.py", "--steps", "60"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x.split()[-1]) for x in done.stdout.splitlines() if x.startswith("step")]
    assert losses[-1] < 0.9 * losses[0]
    assert "RigL, step 60" in done.stdout
