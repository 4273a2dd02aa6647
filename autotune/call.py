"""``ramnet.tune``: tunes a model's memory ops for a machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

from autotune.study.search import Budget, Progress, Result
from autotune.study.study import Sampler
from lowering.backends import read_records_again
from lowering.targets import device_of, find, here
from ramnet.config import RamNetConfig
from ramnet.processes import usable_cores
from schedules.of_model import of_model, of_model_on_gpu
from schedules.records import records_path
from schedules.shapes import parse
from schedules.workload import Op, Workload


def tune(
    config: RamNetConfig,
    target: str = "cpu",
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> list[Result]:
    """Find the fastest schedules of a model's memory ops, and merge them into the records that kernels use.

    It starts processes that import the calling program, so call it under ``if __name__ == "__main__":``.

    Args:
        config: the configuration of the model to tune for.
        target: a name in ``lowering.TARGETS``.
        on_progress: called during the search.
        options: the other arguments of ``prepare``, such as ``budget``, in seconds.

    Returns:
        The result for each workload, with its gain over the default schedule.

    Raises:
        As ``prepare`` and ``autotune.study.tuner.tune`` do.
    """
    tuning = prepare(config, target, **options)
    if not tuning.workloads:
        raise ValueError(f"{', '.join(tuning.ops)} has no workload on {target}; leave ops out for all that have")
    return tuning.run(on_progress)


@dataclass(frozen=True)
class Tuning:
    """The checked settings of a run; other fields are arguments of ``prepare``.

    Attributes:
        makes: creates the runner or predictor in a worker's process.
        device: the name of the GPU that is measured; None for a CPU, or if nothing is run.
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
        """Run the search; see ``autotune.study.tuner.tune``."""
        from autotune.study import tuner
        from autotune.study.worker import Worker

        with Worker(self.threads, self.build_limit, self.run_limit, makes=self.makes) as worker:
            results = tuner.tune(
                self.target, self.workloads, worker, journal=self.journal, records_file=self.records_file,
                budget=self.budget, threads=self.threads, device=self.device, modelled=self.modelled,
                sampler=self.sampler, seed=self.seed, on_progress=on_progress, begin=begin, calls=calls,
            )  # fmt: skip
        read_records_again()
        return results


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
    journal: str | Path | None = None,
    records_file: str | Path | None = None,
) -> Tuning:
    """Check the settings of a run before it starts.

    Args:
        budget: seconds in all; 180 if neither this nor ``trials`` is given.
        trials: the most schedules to try for each op, including those of earlier runs.
        ops: the ops to tune; all if empty.
        batch_sizes: batch sizes of the model; by default 1 on a CPU, and on a GPU 16 in training and 64 in decoding.
        lengths: tokens of a sequence in training and prefill; by default 1024 on a CPU and 4096 on a GPU.
        shapes: workloads such as "memory_scan N=16 T=1024", instead of those of the model.
        workloads: workloads, instead of all of these.
        modelled: compile and model candidates without running them, even if the GPU is available.
        sampler, seed: of Optuna; the sampler is "tpe" or "random".
        threads: of the kernels; None uses all cores.
        build_limit, run_limit: seconds after which a build, or a run, is killed.
        journal: the file of all trials; None uses runs/tune/<target>/journal.log.
        records_file: the file that the best schedules are merged into; None uses the user's records.

    Raises:
        ValueError: if the target is unknown, or a number is out of range.
        ImportError: if a package is missing, with its install command.
    """
    is_gpu = find(target).gpu is not None
    for op in ops:
        if op not in get_args(Op):
            raise ValueError(f"op {op!r} is unknown; there are {', '.join(get_args(Op))}")
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler is {sampler!r}; it must be {' or '.join(map(repr, get_args(Sampler)))}")
    if threads is not None and not 1 <= threads <= 1024:
        raise ValueError(f"threads is {threads}; it must be from 1 to 1024, or None for all cores")
    makes, device = _gpu_work(target, modelled) if is_gpu else _cpu_work(modelled)
    if workloads is None:
        workloads = _workloads(config, is_gpu, batch_sizes, lengths, shapes)
    return Tuning(
        target=target, ops=tuple(ops), makes=makes, device=device, modelled=is_gpu and device is None,
        budget=Budget(180.0 if budget is None and trials is None else budget, trials),
        workloads=[w for w in workloads if not ops or w.op in ops],
        sampler=sampler, seed=seed, threads=threads or usable_cores(), build_limit=build_limit,
        run_limit=run_limit, journal=Path(journal or f"runs/tune/{target}/journal.log"),
        records_file=Path(records_file or records_path(target)),
    )  # fmt: skip


def _cpu_work(modelled: bool) -> tuple[Callable[[], Any], str | None]:
    """Return the function that creates a worker's runner for this CPU, and no device name."""
    from autotune.study.worker import cpu_runner
    from lowering.cpu import runtime

    if modelled:
        raise ValueError("--model is for GPUs; the processor is here and is measured")
    runtime.match_threads()  # raises ImportError if TVM is missing
    return cpu_runner, None


def _gpu_work(target: str, modelled: bool) -> tuple[Callable[[], Any], str | None]:
    """Return the function that creates a worker's runner or predictor for a GPU, and its name if it is measured."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError("tuning for a GPU needs triton, which is not installed: pip install 'ramnet[gpu]'")
    found = None if modelled else here()
    if found is None or found.name != target:
        from autotune.model.prediction import Predictor

        return Predictor, None
    from autotune.measure.gpu_runner import GpuRunner

    return GpuRunner, device_of(target)


def _workloads(
    config: RamNetConfig, is_gpu: bool, batch_sizes: Sequence[int], lengths: Sequence[int], shapes: Sequence[str]
) -> list[Workload]:
    """Return the workloads of ``shapes`` or, without any, of the model at each batch size and length; each once."""
    found = [parse(shape, config, is_gpu) for shape in shapes]
    for batch_size, length in () if shapes else product(batch_sizes or (None,), lengths or (None,)):
        given = {"batch_size": batch_size, "length": length} | ({"decode_batch": batch_size} if is_gpu else {})
        sizes = {name: size for name, size in given.items() if size is not None}
        found += of_model_on_gpu(config, **sizes) if is_gpu else of_model(config, **sizes)
    return list({workload.name: workload for workload in found}.values())
