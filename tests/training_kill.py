"""Stand-ins for the progress bar that note or interrupt a run."""

from __future__ import annotations

from typing import Any

from sparsetrain.recipes.progress import Progress


class Killed(Exception):
    """Stands for a kill at a certain step."""


class Recorder(Progress):
    """Notes where each phase started."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.starts: list[tuple[str, int]] = []

    def start(self, phase: str, total: int, done: int = 0) -> None:
        super().start(phase, total, done)
        self.starts.append((phase, done))


class Killer(Recorder):
    """Dies after `steps` training steps of all phases together."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def advance(self, note: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


def learned(report: dict[str, Any]) -> dict[str, Any]:
    """What must be the same bit for bit, whether or not the run was interrupted."""
    return {
        name: (lane["losses"], [(p["step"], p["accuracy"]) for p in lane["curve"]])
        for name, lane in report["lanes"].items()
    }
