"""Training in several processes, started by torchrun: each computes its rows of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ramnet.state import RamState
from ramnet.training.batch import Batch
from ramnet.training.objective import Objective

Kind = Literal["ddp", "fsdp"]


class Parallel:
    """The processes of a run, and what they exchange. The methods are collective: all processes call them alike.

    Attributes:
        rank: of this process, from 0. Rank 0 alone evaluates, prints and writes files.
        count: of processes.
        kind: "ddp" keeps weights and moments in every process, "fsdp" a share of them in each.
        store: torchrun's, which the processes of all attempts share; None without torchrun.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, kind: Kind = "ddp", store: torch.distributed.Store | None = None
    ) -> None:
        self.rank, self.count, self.kind, self.store = rank, count, kind, store

    @property
    def shards(self) -> bool:
        """Whether weights and moments are DTensors."""
        return self.kind == "fsdp" and self.count > 1

    def check(self, batch_size: int) -> None:
        """Raise ValueError if a batch cannot be divided into equal parts."""
        if batch_size % self.count:
            raise ValueError(f"batch_size is {batch_size}; {self.count} processes need a multiple of {self.count}")

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Run the block in rank 0 before the other processes run it. It may take longer than a collective may."""
        store = None if self.store is None else _of_attempt(self.store)
        if self.rank > 0 and store is not None:
            store.wait(["first is done"], timedelta(days=7))
        yield
        if self.rank == 0 and store is not None:
            store.set("first is done", "")

    def begin(self) -> None:
        """Let later attempts know that this one has begun the run."""
        if self.store is not None:
            self.store.set("begun", "")

    def begun(self) -> bool:
        """Return whether an earlier attempt has begun the run."""
        return self.store is not None and _attempt() != "0" and self.store.check(["begun"])

    def wrap(self, objective: Objective) -> nn.Module:
        """Return a module whose gradients, after backward, are the mean over the processes."""
        if self.count == 1:
            return objective
        if self.kind == "ddp":
            return nn.parallel.DistributedDataParallel(objective)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = objective.model
        mesh = init_device_mesh(model.embedding.weight.device.type, (self.count,))
        for block in (*model.convs, *model.blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective

    def accumulating(self, objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a part of a batch: with DDP, gradients are exchanged only after the ``last`` one."""
        held = isinstance(objective, nn.parallel.DistributedDataParallel) and not last
        return objective.no_sync() if held else nullcontext()  # type: ignore[operator]

    def own(self, rows: Tensor) -> Tensor:
        """Return the rows of a batch, of any [B, …], that this process computes."""
        return rows.chunk(self.count)[self.rank] if self.count > 1 else rows

    def batch(self, batch: Batch) -> Batch:
        """Return this process's rows of a batch, which all processes have drawn alike."""
        return batch.split(len(batch.inputs) // self.count)[self.rank] if self.count > 1 else batch

    def state(self, state: RamState | None) -> RamState | None:
        """Return the state of all rows, of which ``state`` has this process's."""
        return state if self.count == 1 else _pytree.tree_map_only(Tensor, self._gather, state)

    def _gather(self, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the processes."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def of_first(self, value: float, device: torch.device) -> float:
        """Return the value that rank 0 has, so that all processes take the same decision."""
        if self.count == 1:
            return value
        held = torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64, device=device)
        return float(self.total(held))


def torchruns(kind: Kind) -> Parallel:
    """Return what torchrun says of this process, which need not meet the others for that.

    Raises ValueError if RANK and WORLD_SIZE are not those of a process.
    """
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise ValueError(f"RANK is {rank!r} and WORLD_SIZE is {count!r}; RANK must be in 0..WORLD_SIZE - 1")
    return Parallel(int(rank), int(count), kind)


@contextmanager
def processes(kind: Kind) -> Iterator[Parallel]:
    """Within the block, be one of torchrun's processes, which set RANK and WORLD_SIZE; without them, the only one."""
    count = torchruns(kind).count
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Parallel()
        return
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if nodes != "1" and _attempt() != "0":  # each node counts its own restarts, so attempts have no common name
        raise ValueError(
            f"torchrun has restarted processes of {nodes} nodes; give it --max-restarts 0 and use --resume"
        )
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    if count == 1:
        yield Parallel(store=store)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=_of_attempt(store), rank=rank, world_size=count)
    try:
        yield Parallel(rank, count, kind, store)
    finally:
        torch.distributed.destroy_process_group()


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _of_attempt(store: torch.distributed.Store) -> torch.distributed.Store:
    """Return the store of this attempt alone: restarted processes must not read the addresses of those before."""
    return torch.distributed.PrefixStore(f"attempt {_attempt()}", store)
