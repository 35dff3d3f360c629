"""Progress on standard error (so that standard output stays free for --json).

Bars on a terminal; in a log file one line per tenth of a phase.
"""

from __future__ import annotations

from types import TracebackType

import rich.console
import rich.progress


class Progress:
    """One bar per phase, and lines above it. Use as a context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = rich.console.Console(stderr=True, quiet=quiet, highlight=False)
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>9}"),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._task: rich.progress.TaskID | None = None
        self._phase, self._done, self._total = "", 0, 0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, phase: str, total: int, done: int = 0) -> None:
        """A new bar of `total` steps, `done` of which came from a checkpoint."""
        self._phase, self._done, self._total = phase, done, total
        if total and self.console.is_terminal:
            self._task = self._bars.add_task(phase, total=total, completed=done, note="")

    def advance(self, note: str) -> None:
        """One step further."""
        self._done += 1
        if self._task is not None:
            self._bars.update(self._task, advance=1, note=note)
        elif self._done * 10 // self._total > (self._done - 1) * 10 // self._total:
            self.say(f"{self._phase} {self._done}/{self._total}: {note}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line)
