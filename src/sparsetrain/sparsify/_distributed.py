"""Several processes that train one model: the same topology everywhere.

Everything that decides about the topology is either the same on all ranks already (the weights, the
averaged gradients, a generator with a shared seed) or is reduced here. Traffic is of the order of
the nonzeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The processes that train together; a single one by default."""

    def __init__(self, model: nn.Module, group: Any = None) -> None:
        """`group`: a process group; that of `model`, if it is a DistributedDataParallel."""
        self.ddp = model if _is_ddp(model) else None
        if self.ddp is not None and group is None:
            group = self.ddp.process_group
        self.group = group
        self.world = 1 if group is None else dist.get_world_size(group)
        self._fitted = self._lengths()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """`tensor` of the first rank, into it."""
        if self.world > 1:
            first = dist.get_global_rank(self.group, 0)
            self._call(lambda: dist.broadcast(tensor, first, group=self.group))
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, into `tensor`."""
        if self.world > 1:
            self._call(lambda: dist.all_reduce(tensor, group=self.group))
        return tensor

    def union(self, positions: Tensor) -> Tensor:
        """All ranks' positions, increasing; int64 (n,) with the same n on each."""
        if self.world == 1:
            return positions
        parts = [torch.empty_like(positions) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(parts, positions, group=self.group))
        union: Tensor = torch.unique(torch.cat(parts))
        return union

    def check_same(self, numbers: list[int], what: str) -> None:
        """Raises RuntimeError where the ranks hold different numbers."""
        if self.world == 1:
            return
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(parts, mine, group=self.group))
        different = [rank for rank, part in enumerate(parts) if not torch.equal(part, parts[0])]
        if different:
            raise RuntimeError(
                f"{what} of rank {different[0]} is not that of rank 0: all ranks must begin with "
                "the same model, seed and settings, and take the same steps"
            )

    def refit(self) -> None:
        """Makes DistributedDataParallel take the parameters' present lengths, if they changed."""
        if self.ddp is None or self._lengths() == self._fitted:
            return
        ddp: Any = self.ddp
        try:
            parameters, expect_sparse = ddp._build_params_for_reducer()
            ddp._module_parameters = list(parameters)
            names = ddp._build_debug_param_to_name_mapping(parameters)
            ddp._ddp_init_helper(parameters, expect_sparse, names, ddp.static_graph)
        except AttributeError as error:
            raise RuntimeError(
                f"torch {torch.__version__} has another DistributedDataParallel than sparsetrain "
                f"knows, which cannot follow a change of nonzeros ({error}): use an algorithm that "
                "keeps their number, such as RigL, SET or MEST, on a model that is already sparse"
            ) from error
        self._fitted = self._lengths()

    def _lengths(self) -> list[tuple[int, int]]:
        return [] if self.ddp is None else [(id(p), p.numel()) for p in self.ddp.parameters()]

    def _call(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RuntimeError(
                "the ranks could not agree on a topology: another process has ended, or did not "
                "answer within the timeout of the process group. End this run and resume all "
                f"ranks from a checkpoint. ({error})"
            ) from error


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel)
