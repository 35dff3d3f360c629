"""The life cycle that all sparse-training algorithms share.

An algorithm says which weights go and where new ones come (`update`, or the smaller methods that it
calls); this class does the rest: it makes the model sparse, asks the schedule, changes patterns,
values and optimizer state together, keeps all ranks alike, reports, saves and resumes.
"""

from __future__ import annotations

import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsetrain.nn._select import Selection, check_model
from sparsetrain.pattern import SparsePattern
from sparsetrain.sparsify import _monitor, schedules
from sparsetrain.sparsify._distributed import Ranks
from sparsetrain.sparsify._growth import Recording, gradient_at, strongest_inactive
from sparsetrain.sparsify._optimizer import carry_state, gather
from sparsetrain.sparsify._setup import Trained, Wishes, prepare
from sparsetrain.sparsify._topology import change_pattern, inactive_count, random_inactive
from sparsetrain.sparsify.criteria import keep_top

__all__ = ["DEFAULT_TOTAL_STEPS", "Change", "Sparsifier", "finite"]

#: What `total_steps` is where neither it nor a schedule is given.
DEFAULT_TOTAL_STEPS = 10_000


@dataclass(frozen=True)
class Change:
    """What an update does to one layer.

    Attributes:
        pattern: the new one.
        source: int32 (new nnz,): where each weight was among the old ones, -1 for a newcomer.
    """

    pattern: SparsePattern
    source: Tensor


class Sparsifier:
    """Sparse training of a model in the user's own loop; the base of all algorithms.

    Call `step()` after ``optimizer.step()`` and before ``optimizer.zero_grad()``. Subclasses
    override `published` and, from the largest to the smallest change, `update`, `grow` or
    `drop_scores`. As it is, this class drops the smallest weights and grows random ones.

    Laws: survivors keep value and optimizer state exactly, newcomers start at zero with zero state;
    scalar state ("step") is untouched; `values` stays the same Parameter object in the optimizer;
    gradients of changed layers are dropped; equal scores are decided by the lowest position; a
    layer whose `values` do not require gradients stays as it is.

    Attributes:
        layers: the layers under it (Trained: name, module, goal, dropped, grown).
        schedule: when it acts (sparsetrain.schedules).
        steps: how many optimizer steps it has seen.
        updates: how many times it has changed the topology.
    """

    #: Whether dense gradients are needed at update steps (see `strongest_inactive`).
    needs_dense_gradients: ClassVar[bool] = False
    #: How a dense model starts: a criterion ("random", "magnitude"), or "dense" for all weights.
    initial: ClassVar[str] = "random"
    #: Whether it may make a sparse model sparser.
    prunes: ClassVar[bool] = False
    #: Of the weights that a layer stores, those that the forward pass uses (see TopKAST).
    _share: float = 1.0

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sparsity: float | None = None,
        *,
        distribution: str | Mapping[str, float] = "erk",
        schedule: schedules.Schedule | None = None,
        total_steps: int | None = None,
        include: Selection = None,
        exclude: Selection = None,
        initial: str | None = None,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Takes over the sparsity of a model.

        Args:
            model: dense, whose layers are then made sparse in place, or already sparse. A
                DistributedDataParallel is taken as its module, with its process group.
            optimizer: owns the weights. The new `values` take the place of dense weights in it,
                with the state of the weights that stay.
            sparsity: fraction of weights left out, in [0, 1); 0.9 for a dense model, as it is for a
                sparse one.
            distribution: how the weights are divided among layers; as in `sparsify`.
            schedule: when to act and how much; default: the published one, for `total_steps`.
            total_steps: length of the training in optimizer steps; default 10,000.
            include, exclude: which layers; as in `sparsify`.
            initial: which weights of a dense model stay at first: "random" or "magnitude" (for a
                trained model); default: as published.
            seed: of the random choices. The same on all ranks.
            process_group: for ranks without DistributedDataParallel that average gradients.

        Raises:
            TypeError, ValueError: an argument that does not fit, a model with nothing to make
                sparse, or an optimizer that does not own its weights. Everything is as it was.
        """
        self.schedule = self._choose_schedule(schedule, total_steps)
        self._ranks = Ranks(check_model(model), process_group)
        module: Any = model.module if self._ranks.ddp is not None else model
        self.model: nn.Module = module
        self.optimizer = optimizer
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self.steps = self.updates = 0
        self._stepped = self._warned = False
        self._callbacks: list[Callable[[Sparsifier], Any]] = []
        start = self._initial(initial)
        wishes = Wishes(sparsity, distribution, include, exclude, start, self.prunes, self._share)
        self.distribution = distribution
        self.layers = prepare(module, optimizer, wishes, self.generator, self._ranks)
        self._ranks.refit()
        self._ranks.check_same(self._fingerprints(), "the topology")
        for layer in self.layers:
            layer.started = _monitor.pack(layer.module.pattern)
            layer.explored = layer.started.clone()
        self._watch_optimizer()
        self.begin()
        self._arm()

    # ---- what an algorithm may override ----------------------------------------------------------

    @classmethod
    def published(cls, total_steps: int) -> schedules.Schedule:
        """The schedule of the paper, for a training of `total_steps`."""
        every = max(1, min(100, total_steps // 20))
        return schedules.Constant(0.3, every=every, stop=max(1, total_steps * 3 // 4))

    def begin(self) -> None:
        """Called once, at the end of the construction."""

    def update(self) -> list[Change | None]:
        """What changes now, one entry for each of `layers`; None leaves one as it is."""
        return [self.exchange(layer, self.exchange_count(layer)) for layer in self.layers]

    def exchange_count(self, layer: Trained) -> int:
        """How many weights to replace: the schedule's share, as far as places are free."""
        wanted = round(self.schedule.value(self.steps) * layer.nnz)
        return min(wanted, inactive_count(layer.module.pattern))

    def drop_scores(self, layer: Trained) -> Tensor:
        """(nnz,): the higher, the longer a weight stays."""
        return layer.module.values.detach().abs()

    def grow(self, layer: Trained, count: int) -> Tensor:
        """`count` positions in ``weight.reshape(-1)`` without a weight; int64, increasing."""
        return random_inactive(layer.module.pattern, count, self.generator)

    # ---- what an algorithm may use ---------------------------------------------------------------

    def exchange(self, layer: Trained, count: int) -> Change | None:
        """Drops the `count` lowest by `drop_scores`, and grows as many by `grow`."""
        if count == 0:
            return None
        grown = self.grow(layer, count)
        return self.change(layer, layer.nnz - grown.numel(), grown)

    def change(self, layer: Trained, keep: int, grown: Tensor | None = None) -> Change:
        """Keeps the `keep` highest by `drop_scores`, and adds the positions `grown`."""
        drop = ~keep_top(finite(self.drop_scores(layer)), keep)
        if grown is None:
            grown = torch.empty(0, dtype=torch.int64)
        return Change(*change_pattern(layer.module.pattern, drop, grown))

    def strongest_inactive(self, layer: Trained, count: int) -> Tensor:
        """The `count` positions without weight of the largest |dense gradient|; int64, increasing.

        Needs ``needs_dense_gradients = True``. Over several ranks: each proposes its own largest;
        the gradients of all that were proposed are averaged, and the largest of these win.
        """
        recording = layer.module._recorder
        calls = recording.calls if isinstance(recording, Recording) else []
        if not calls:
            raise RuntimeError(f"layer {layer.name} took no part in the last backward pass")
        found = strongest_inactive(layer.module, calls, count)
        if self._ranks.world == 1:
            return found
        union = self._ranks.union(found)
        scores = self._ranks.sum(gradient_at(layer.module, calls, union))
        return union[keep_top(finite(scores.abs_()), count)]

    def took_part(self, layer: Trained) -> bool:
        """Whether the layer has seen a backward pass in this step (on this rank)."""
        recording = layer.module._recorder
        return isinstance(recording, Recording) and bool(recording.calls)

    # ---- the life cycle --------------------------------------------------------------------------

    def step(self) -> bool:
        """Counts one optimizer step and changes the topology if the schedule says so.

        Without an ``optimizer.step()`` since the last call it does nothing and counts nothing, with
        a warning the first time: so a step that a GradScaler skipped is skipped here as well, and
        what was seen of its gradients is forgotten.

        Returns:
            Whether the topology has changed.

        Raises:
            RuntimeError: no gradient was seen at an update that needs it; or another rank has gone
                or holds another topology.
        """
        if not self._stepped:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "sparsifier.step() without an optimizer.step() since the last call: nothing is "
                    "done; call it once after each optimizer.step()",
                    stacklevel=2,
                )
            self._arm()
            return False
        due = self.schedule.due(self.steps + 1)
        if due and self.needs_dense_gradients and not any(map(self.took_part, self.layers)):
            raise RuntimeError(
                f"{type(self).__name__} saw no gradient at step {self.steps + 1}, at which it is "
                "to update: call step() after loss.backward() and optimizer.step(), on the model "
                "that was trained (a model compiled with fullgraph=True cannot be watched)"
            )
        self._stepped = False
        self.steps += 1
        if due:
            changes = zip(self.layers, self.update(), strict=True)
            self._apply([c if x.module.values.requires_grad else None for x, c in changes])
        self._arm()
        if due:
            self._tell()
        return due

    def register_callback(self, callback: Callable[[Sparsifier], Any]) -> None:
        """Calls ``callback(self)`` after each change of the topology."""
        if not callable(callback):
            raise TypeError(f"callback must be callable; got {callback!r}")
        self._callbacks.append(callback)

    def close(self) -> None:
        """Lets go of the optimizer and the layers; the model stays as it is."""
        self._handle.remove()
        for layer in self.layers:
            _forget(layer)

    def _tell(self) -> None:
        for callback in self._callbacks:
            callback(self)

    def _apply(self, changes: list[Change | None]) -> None:
        for layer, change in zip(self.layers, changes, strict=True):
            layer.dropped = layer.grown = 0
            if change is None:
                continue
            module, length = layer.module, layer.nnz
            module.set_pattern(change.pattern, gather(module.values, change.source))
            carry_state(self.optimizer, module.values, length, change.source)
            newcomers = (change.source < 0).nonzero().squeeze(1)
            layer.grown = newcomers.numel()
            layer.dropped = length - (change.source.numel() - layer.grown)
            assert layer.explored is not None
            _monitor.extend(layer.explored, change.pattern, newcomers)
        self.updates += 1
        self._ranks.refit()
        self._ranks.check_same(self._fingerprints(), "the topology")

    def _arm(self) -> None:
        """Has the layers record the next step if an update that needs gradients comes after it."""
        if not self.needs_dense_gradients:
            return
        due = self.schedule.due(self.steps + 1)
        for layer in self.layers:
            _forget(layer)
            if due:
                layer.module._recorder = Recording()

    def _watch_optimizer(self) -> None:
        me = weakref.ref(self)

        def stepped(*_: Any) -> None:
            sparsifier = me()
            if sparsifier is not None:
                sparsifier._stepped = True

        self._handle = self.optimizer.register_step_post_hook(stepped)

    @classmethod
    def _choose_schedule(cls, schedule: Any, total_steps: int | None) -> schedules.Schedule:
        if schedule is not None:
            if total_steps is not None:
                raise ValueError("pass either schedule or total_steps, not both")
            return schedules.check_schedule(schedule)
        if total_steps is None:
            total_steps = DEFAULT_TOTAL_STEPS
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 2:
            raise ValueError(f"total_steps must be an integer of at least 2; got {total_steps!r}")
        return cls.published(total_steps)

    def _initial(self, initial: str | None) -> str:
        if initial is None:
            return self.initial
        if initial not in ("random", "magnitude"):
            raise ValueError(f"initial must be 'random' or 'magnitude'; got {initial!r}")
        if self.initial == "dense":
            raise ValueError(
                f"{type(self).__name__} starts with all weights of a dense model: leave out initial"
            )
        return initial

    def _fingerprints(self) -> list[int]:
        return [_fingerprint(layer.module.pattern) for layer in self.layers]

    # ---- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, besides the state of the model and of the optimizer."""
        return {
            "algorithm": type(self).__name__,
            "schedule": repr(self.schedule),
            "steps": self.steps,
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "layers": {layer.name: self.layer_state(layer) for layer in self.layers},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken, after the model and the optimizer have loaded.

        Raises:
            TypeError: no mapping.
            ValueError: the state of another algorithm, schedule or model, or of the same model with
                another topology (load the model's state_dict first). Nothing changes.
        """
        self._check_state(state_dict)
        self.generator.set_state(state_dict["generator"])
        self.steps, self.updates = state_dict["steps"], state_dict["updates"]
        for layer in self.layers:
            self.load_layer_state(layer, state_dict["layers"][layer.name])
        self._stepped = False
        self._ranks.refit()
        self._arm()

    def layer_state(self, layer: Trained) -> dict[str, Any]:
        """What is saved of one layer; an algorithm may add to it."""
        return {
            "shape": tuple(layer.module.weight_shape),
            "goal": layer.goal,
            "first": layer.first,
            "fingerprint": _fingerprint(layer.module.pattern),
            "dropped": layer.dropped,
            "grown": layer.grown,
            "started": layer.started,
            "explored": None if layer.explored is None else layer.explored.clone(),
        }

    def load_layer_state(self, layer: Trained, state: Mapping[str, Any]) -> None:
        """The reverse of `layer_state`."""
        for name in ("goal", "first", "dropped", "grown", "started", "explored"):
            setattr(layer, name, state[name])
        if layer.explored is not None:
            layer.explored = layer.explored.clone()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        mine = self.state_dict()
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a sparsifier's; got {type(state).__name__}")
        missing = [key for key in mine if key not in state]
        if missing:
            raise ValueError(f"the state is no sparsifier's: it lacks {', '.join(missing)}")
        for key in ("algorithm", "schedule"):
            if state[key] != mine[key]:
                raise ValueError(f"the state is of {key} {state[key]}, this is {mine[key]}")
        theirs = {name: tuple(s["shape"]) for name, s in state["layers"].items()}
        ours = {name: s["shape"] for name, s in mine["layers"].items()}
        if theirs != ours:
            odd = sorted(n for n in {*theirs, *ours} if theirs.get(n) != ours.get(n))[0]
            raise ValueError(
                f"the state is of another model: layer {odd} has shape {theirs.get(odd, 'none')} "
                f"there and {ours.get(odd, 'none')} here"
            )
        for name, entry in mine["layers"].items():
            if entry["fingerprint"] != state["layers"][name]["fingerprint"]:
                raise ValueError(
                    f"layer {name} has another topology than when the state was taken: load the "
                    "model's state_dict (and the optimizer's) of the same moment first"
                )

    # ---- reporting -------------------------------------------------------------------------------

    def itop_rate(self) -> float:
        """Share of all weights that have ever existed (in-time over-parameterisation, Liu 2021)."""
        tried = sum(_monitor.count(x.explored) for x in self.layers if x.explored is not None)
        return tried / sum(layer.size for layer in self.layers)

    def overlap(self) -> float:
        """Share of the present weights that were there at the start."""
        both = sum(
            _monitor.shared(x.started, x.module.pattern)
            for x in self.layers
            if x.started is not None
        )
        return both / max(1, sum(layer.nnz for layer in self.layers))

    def log(self) -> dict[str, float]:
        """Plain numbers for TensorBoard, W&B and the like."""
        nnz, size = (sum(getattr(x, name) for x in self.layers) for name in ("nnz", "size"))
        report: dict[str, float] = {
            "sparsity/steps": self.steps,
            "sparsity/updates": self.updates,
            "sparsity/total": 1.0 - nnz / size,
            "sparsity/nnz": nnz,
            "sparsity/dropped": sum(layer.dropped for layer in self.layers),
            "sparsity/grown": sum(layer.grown for layer in self.layers),
            "sparsity/itop_rate": self.itop_rate(),
            "sparsity/overlap_with_start": self.overlap(),
        }
        report |= {f"sparsity/layer/{x.name}": 1.0 - x.nnz / x.size for x in self.layers}
        return report

    def summary(self) -> str:
        """A table of the layers, as text (drawn by rich where it is installed)."""
        rows = [
            (
                x.name,
                "x".join(map(str, x.module.weight_shape)),
                f"{1.0 - x.nnz / x.size:.4f}",
                f"{x.nnz:,}",
                f"{x.dropped:,}",
                f"{x.grown:,}",
            )
            for x in self.layers
        ]
        nnz, size = sum(x.nnz for x in self.layers), sum(x.size for x in self.layers)
        rows.append(("total", f"{size:,}", f"{1.0 - nnz / size:.4f}", f"{nnz:,}", "", ""))
        title = (
            f"{type(self).__name__}, step {self.steps}, {self.updates} updates, "
            f"{self.itop_rate():.1%} of all weights tried"
        )
        return _monitor.render(
            title, ("layer", "shape", "sparsity", "nnz", "dropped", "grown"), rows
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.layers)}, schedule={self.schedule!r})"


def _forget(layer: Trained) -> None:
    """Frees what was recorded now: cycles would keep it until the garbage collector runs."""
    recording = layer.module.__dict__.pop("_recorder", None)
    if isinstance(recording, Recording):
        recording.calls.clear()


def finite(scores: Tensor) -> Tensor:
    """Scores fit to be ordered: float32 or float64, NaN last of all."""
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()
    return scores.nan_to_num(nan=-torch.finfo(scores.dtype).max)


def _fingerprint(pattern: SparsePattern) -> int:
    return zlib.crc32(
        pattern.col_indices.numpy().data, zlib.crc32(pattern.crow_indices.numpy().data)
    )
