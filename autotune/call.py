"""``ramnet.tune``: a model's memory ops, tuned for a machine by one call."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from autotune.study.search import Budget, Progress, Result
from lowering.targets import find, here
from ramnet.config import RamNetConfig
from schedules.of_model import of_model, of_model_on_gpu
from schedules.records import records_path
from schedules.shapes import parse
from schedules.workload import Op, Workload

if TYPE_CHECKING:
    from autotune.study.study import Sampler


def tune(
    config: RamNetConfig,
    target: str = "cpu",
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> list[Result]:
    """Find the fastest schedules of a model's memory ops, and merge them into the records that kernels are built from.

    Processes are started anew, which import the program that calls this: call it under
    ``if __name__ == "__main__":``.

    Args:
        config: of the model whose shapes are tuned for.
        target: a name of ``lowering.TARGETS``.
        on_progress: called as the search goes on.
        options: the other arguments of ``prepare``; ``budget`` in seconds above all.

    Returns:
        For each op what was found, and how much faster it is than the default schedule.

    Raises:
        As ``prepare`` and ``autotune.study.tuner.tune`` do.
    """
    tuning = prepare(config, target, **options)
    if not tuning.workloads:
        raise ValueError(f"{', '.join(tuning.ops)} has no workload on {target}; leave ops out for all that have")
    return tuning.run(on_progress)


@dataclass(frozen=True)
class Tuning:
    """What a run tunes and how, checked; the fields are those of ``prepare``.

    Attributes:
        makes: gives what does a worker's work, in its process.
        device: the name of the GPU that is measured; None for the processor, and where nothing is run.
        modelled: candidates are compiled and their times modelled; nothing is run.
    """

    target: str
    ops: tuple[str, ...]
    workloads: list[Workload]
    makes: Callable[[], Any]
    device: str | None
    modelled: bool
    budget: Budget
    sampler: Sampler
    seed: int
    threads: int
    build_limit: float
    run_limit: float
    journal: Path
    records_file: Path

    def run(
        self,
        on_progress: Callable[[Progress], None],
        begin: float | None = None,
        calls: dict[str, int] | None = None,
    ) -> list[Result]:
        """Search; see ``autotune.study.tuner.tune``."""
        from autotune.study import tuner
        from autotune.study.worker import Worker

        with Worker(self.threads, self.build_limit, self.run_limit, makes=self.makes) as worker:
            return tuner.tune(
                self.target, self.workloads, worker, journal=self.journal, records_file=self.records_file,
                budget=self.budget, threads=self.threads, device=self.device, modelled=self.modelled,
                sampler=self.sampler, seed=self.seed, on_progress=on_progress, begin=begin, calls=calls,
            )  # fmt: skip


def prepare(  # noqa: PLR0913 - the settings of ``ramnet.tune``, each a keyword
    config: RamNetConfig,
    target: str = "cpu",
    *,
    budget: float | None = None,
    trials: int | None = None,
    ops: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    lengths: Sequence[int] = (),
    shapes: Sequence[str] = (),
    workloads: Sequence[Workload] | None = None,
    modelled: bool = False,
    sampler: Sampler = "tpe",
    seed: int = 0,
    threads: int | None = None,
    build_limit: float = 60.0,
    run_limit: float = 30.0,
    journal: Path | None = None,
    records_file: Path | None = None,
) -> Tuning:
    """Check what is asked for, before anything is begun.

    Args:
        budget: seconds in all; 180 where neither this nor ``trials`` is given.
        trials: schedules to try for each op at most, those of earlier runs included.
        ops: tune only these; all where it is empty.
        batch_sizes: sequences that the model works on at a time; by default 1 on a CPU, and on a GPU 16 in training and
            64 in decoding.
        lengths: tokens of a sequence in training and prefill; by default 1024 on a CPU and 4096 on a GPU.
        shapes: such as "memory_scan N=16 T=1024", in place of what the model calls.
        workloads: in place of all these.
        modelled: compile and model, and run nothing, also where the GPU is there.
        sampler, seed: of Optuna, "tpe" or "random".
        threads: of the kernels; None takes all cores.
        build_limit, run_limit: seconds after which a build, and a run, is killed.
        journal: the file of all trials; None takes runs/tune/<target>/journal.log.
        records_file: what the best schedules are merged into; None takes the project's.

    Raises:
        ValueError: for an unknown target, or numbers out of their ranges.
        ImportError: for what is missing, with its install line.
    """
    is_gpu = find(target).gpu is not None
    for op in ops:
        if op not in get_args(Op):
            raise ValueError(f"op {op!r} is unknown; there are {', '.join(get_args(Op))}")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024, or None for all cores")
    makes, device = _gpu_work(target, modelled) if is_gpu else _cpu_work(modelled)
    if workloads is None:
        workloads = _workloads(config, is_gpu, batch_sizes, lengths, shapes)
    return Tuning(
        target=target, ops=tuple(ops), makes=makes, device=device, modelled=is_gpu and device is None,
        budget=Budget(180.0 if budget is None and trials is None else budget, trials),
        workloads=[w for w in workloads if not ops or w.op in ops],
        sampler=sampler, seed=seed, threads=threads or os.cpu_count() or 1, build_limit=build_limit,
        run_limit=run_limit, journal=journal or Path("runs/tune") / target / "journal.log",
        records_file=records_file or records_path(target),
    )  # fmt: skip


def _cpu_work(modelled: bool) -> tuple[Callable[[], Any], str | None]:
    """What a worker does for this processor, and its name: the tuner's own."""
    from autotune.study.worker import cpu_runner
    from lowering.cpu import runtime

    if modelled:
        raise ValueError("--model is for GPUs; the processor is here and is measured")
    runtime.match_threads()  # says what is missing, before anything is begun
    return cpu_runner, None


def _gpu_work(target: str, modelled: bool) -> tuple[Callable[[], Any], str | None]:
    """What a worker does for a GPU, and its name where it is here, to be measured."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("tuning for a GPU needs triton, which is not installed: pip install 'ramnet[gpu]'")
    found = None if modelled else here()
    if found is None or found.name != target:
        from autotune.model.prediction import Predictor

        return Predictor, None
    import torch

    from autotune.measure.gpu_runner import GpuRunner

    return GpuRunner, torch.cuda.get_device_name()


def _workloads(
    config: RamNetConfig, is_gpu: bool, batch_sizes: Sequence[int], lengths: Sequence[int], shapes: Sequence[str]
) -> list[Workload]:
    """Those of ``shapes`` or, without any, of the model at each batch size and length; each once."""
    found = [parse(shape, config, "bfloat16" if is_gpu else "float32") for shape in shapes]
    for batch_size, length in () if shapes else product(batch_sizes or (None,), lengths or (None,)):
        given = {"batch_size": batch_size, "length": length} | ({"decode_batch": batch_size} if is_gpu else {})
        sizes = {name: size for name, size in given.items() if size is not None}
        found += of_model_on_gpu(config, **sizes) if is_gpu else of_model(config, **sizes)
    return list({workload.name: workload for workload in found}.values())
