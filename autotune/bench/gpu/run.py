"""What the parts of a GPU's benchmark share: forms that may fail separately, and the measured bandwidth bound."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from autotune.bench.run import DEFAULT, TUNED, Candidate, Run, Table

# For results in bfloat16, compared with float32 sums that are rounded to bfloat16.
TOLERANCE = 6e-3
# The share of a part's time after which a table's further forms are left out.
LATEST = 0.7
NO_FLA = "flash-linear-attention is not installed: pip install flash-linear-attention"

# Builds and checks a form; the table shows what it raises.
Make = Callable[[], Candidate]


@dataclass
class GpuRun(Run):
    """The run of one part on ``device`` within ``seconds``. In a benchmark, ``clock`` is a ``CudaClock``.

    ``tables`` are the finished ones; ``on_table`` is called after each.
    """

    device: str = "cuda"
    seconds: float = 150.0
    begin: float = field(default_factory=perf_counter)
    tables: list[Table] = field(default_factory=list)
    on_table: Callable[[GpuRun], None] = lambda run: None

    @cached_property
    def kernels(self) -> dict[str, Callable[[], Any]]:
        """Context managers that run the ops on the target's kernels with default and with tuned schedules."""
        import lowering

        return {
            DEFAULT: lambda: lowering.use(self.target, tuned=False),
            TUNED: lambda: lowering.use(self.target, tuned=True),
        }

    def table(
        self, name: str, what: str, forms: Mapping[str, Make], *, base: str, slow: Iterable[str] = (), calls: int = 1
    ) -> Table:  # fmt: skip
        """Build each form and time those that succeed; those in ``slow`` are timed separately in few rounds.

        Each is called once beforehand, so that forms that run out of memory are omitted, too. When ``LATEST`` of the
        part's time has passed, further forms are omitted, so that those that are ready are timed.
        """
        ready: dict[str, Candidate] = {}
        failed: dict[str, str] = {}
        for form, make in forms.items():
            late = perf_counter() - self.begin
            if ready and late > LATEST * self.seconds:
                failed[form] = f"left out: {late:.0f} of the part's {self.seconds:.0f} s had passed"
                continue
            self.on_step(f"{name}: checking {form}")
            try:
                ready[form] = make()
                ready[form]()
                self.wait()
            except Exception as problem:  # noqa: BLE001 whatever a form raises is what there is to say of it
                ready.pop(form, None)
                failed[form] = reason(problem)
            self.release()
        rare = {form: ready.pop(form) for form in slow if form in ready}
        if not ready:
            ready, rare = rare, {}
        found = Table(name, what, self.threads, base, [])
        if ready:
            found = self.compare(name, what, ready, rare, base=base, calls=calls)
        self.tables.append(replace(found, failed=failed))
        self.on_table(self)
        return self.tables[-1]

    def copying(self, nbytes: int) -> Candidate:
        """Return a copy that reads and writes ``nbytes`` in all."""
        source = torch.randint(256, (max(nbytes // 2, 1),), dtype=torch.uint8, device=self.device)
        return partial(torch.empty_like(source).copy_, source)

    def wait(self) -> None:
        """Synchronise with the device, so that its errors are attributed to the form that queued the work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def release(self) -> None:
        """Free memory that no form holds."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def reason(problem: BaseException) -> str:
    """Return an error in one line, short enough for a table."""
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(problem).split())
    return (text if len(text) <= 240 else f"{text[:160]} … {text[-70:]}") or type(problem).__name__


def require_fla() -> None:
    """Raise ImportError if flash-linear-attention or its dependencies cannot be imported.

    Its autotuner then times each schedule for 30 ms, not 100: chunk_gla has about 300 of them.
    """
    try:
        import fla.ops  # noqa: F401 that it is there
    except ImportError as error:
        raise without_fla(error) from None
    from triton import testing

    testing.do_bench = partial(testing.do_bench, warmup=10, rep=30)


def without_fla(error: ImportError) -> ImportError:
    """Return the error for a failed import of flash-linear-attention or its dependencies."""
    missing = (error.name or "").partition(".")[0] == "fla"
    return ImportError(NO_FLA if missing else f"flash-linear-attention cannot be imported: {error}")


def finite(form: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError if a result holds NaN or infinity; other libraries' results are not checked further."""
    for i, tensor in enumerate(tensors):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{form} is wrong: its result {i} holds numbers that are not finite")
