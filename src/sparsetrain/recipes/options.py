"""Options that all recipes share, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparsetrain.recipes.algorithms import ALGORITHMS, parse_schedule
from sparsetrain.recipes.errors import InputError

CHECKPOINT = "checkpoint.pt"
RESULTS = ("report.json", "accuracy.png", "model")
DISTRIBUTIONS = ("uniform", "erk", "global")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `sparsetrain train`; the command line's help describes each."""

    data: Path
    out: Path
    sparsity: float = 0.9
    distribution: str = "uniform"
    algorithm: str = "static"
    schedule: str = ""
    steps: int = 150
    epochs: float | None = None
    prune_steps: int = 100
    batch: int = 16
    lr: float = 4e-4
    weight_decay: float = 0.01
    test_fraction: float = 0.25
    seed: int = 0
    evaluate_every: int = 50
    checkpoint_every: int = 50
    compare: bool = False
    resume: bool = False
    overwrite: bool = False
    retime: bool = False
    threads: int | None = None
    keep_memory: bool = False
    title: str = ""

    #: Numbers that must be in [0, 1), and whole numbers of at least 1.
    shares: ClassVar[tuple[str, ...]] = ("sparsity",)
    counts: ClassVar[tuple[str, ...]] = ("steps", "batch", "evaluate_every", "checkpoint_every")

    def check(self) -> None:
        """Raise InputError, naming the option, if a value is out of range."""
        self._check_numbers()
        for name, known in (("distribution", DISTRIBUTIONS), ("algorithm", tuple(ALGORITHMS))):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}: got {getattr(self, name)!r}, expected {' or '.join(known)}"
                )
        parse_schedule(self.schedule, self.algorithm)
        if self.algorithm != "static" and self.steps < 2:
            raise InputError(f"steps: got {self.steps}, {self.algorithm} takes at least 2")
        self._check_folder()

    def _check_numbers(self) -> None:
        for name in self.shares:
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise InputError(f"{name}: got {value}, expected a number in [0, 1)")
        if not 0.0 < self.test_fraction < 1.0:
            raise InputError(f"test-fraction: got {self.test_fraction}, expected one in (0, 1)")
        for name in self.counts:
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise InputError(f"{option}: got {getattr(self, name)}, expected at least 1")
        if self.prune_steps < 0 or self.seed < 0:
            raise InputError(
                f"prune-steps, seed: got {self.prune_steps}, {self.seed}, expected at least 0"
            )
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads: got {self.threads}, expected at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr: got {self.lr}, expected a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight-decay: got {self.weight_decay}, expected at least 0")
        if self.epochs is not None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise InputError(f"epochs: got {self.epochs}, expected a positive number")

    def _check_folder(self) -> None:
        if self.resume + self.overwrite + self.retime > 1:
            raise InputError("resume, overwrite and retime exclude each other")
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"out: {self.out} is a file, expected a folder")
        taken = [name for name in (CHECKPOINT, *RESULTS) if (self.out / name).exists()]
        if taken and not (self.resume or self.overwrite or self.retime):
            raise InputError(
                f"out: {self.out} holds an earlier run ({taken[0]}); pass --resume to continue it, "
                "--overwrite to start again, or choose another folder"
            )
        if self.retime and not (self.out / CHECKPOINT).exists():
            raise InputError(f"retime: {self.out} holds no run whose steps could be timed")
