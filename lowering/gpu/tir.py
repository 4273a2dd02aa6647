"""Compiles, loads and launches the TIR kernels of an op.

For tensors on the CPU, the same templates run as loops (``lowering.gpu.threads``), so that they can be tested there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowering import cache
from lowering.fingerprint import fingerprint
from lowering.gpu.cuda.driver import Cubin
from lowering.gpu.instructions import issued, of_cubin
from lowering.gpu.plan import Launch
from lowering.gpu.resources import Compiled, Resources, Work
from lowering.parsing import on_a_short_stack
from schedules.gpu.shared import VECTOR
from schedules.workload import AXES, DYNAMIC_AXES, Op, Workload

if TYPE_CHECKING:
    from lowering.gpu.cuda.generate import Source
    from lowering.targets import Gpu

# What a file of binaries holds besides them.
_FORMAT = "with resources"
# Loaded kernels, by everything that they are compiled from.
_cubins: dict[tuple[Any, ...], Cubin] = {}
_loops: dict[tuple[Any, ...], Callable[..., None]] = {}


@dataclass(frozen=True)
class Kernels:
    """The kernels of an op's template under a schedule.

    Attributes:
        template: returns the IRModule; called as (workload, schedule, cuda, state, reverse_threads). It imports TVM,
            which is not needed to run binaries from disk.
        sizes: the sizes of the op, in the order of ``schedules.workload.AXES``.
        dtype: the dtype of values, weights and logits.
        state: the dtype of memory and mass.
    """

    template: Callable[..., Any]
    op: Op
    sizes: tuple[int, ...]
    dtype: torch.dtype
    state: torch.dtype
    schedule: Any
    constants: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def workload(self) -> Workload:
        return Workload.of(self.op, self.sizes, self.dtype, dict(self.constants))

    def module(self, cuda: bool, reverse_threads: bool = False) -> Any:
        """Return the IRModule of the kernels for a GPU or, unless ``cuda``, of the same programs as loops on the CPU.

        Args:
            reverse_threads: the CPU's loops over threads go from the last to the first.

        Raises:
            ValueError: if the schedule is not valid for the workload.
            ImportError: if TVM is not installed.
        """
        self.schedule.require(self.workload)
        return self.template(self.workload, self.schedule, cuda, _name(self.state), reverse_threads)

    @cached_property
    def _gpu_module(self) -> Any:
        return on_a_short_stack(self.module, True)

    @cached_property
    def _source(self) -> Source:
        from lowering.gpu.cuda.generate import generate

        return generate(self._gpu_module)

    def source(self, gpu: Gpu) -> Source:
        """Return the kernels as CUDA C. Raises as ``module`` and ``lowering.gpu.cuda.generate.require_shared`` do."""
        from lowering.gpu.cuda.generate import require_shared

        require_shared(self.op, self._gpu_module, gpu)
        return self._source

    def cubin(self, gpu: Gpu) -> Cubin:
        """Return the binaries of ``from_disk``, which are loaded once per process."""
        key = (gpu.arch, *self._compiled_from())
        if key not in _cubins:
            _cubins[key] = self.from_disk(gpu)[0]
        return _cubins[key]

    def from_disk(self, gpu: Gpu) -> tuple[Cubin, bool]:
        """Load the binaries from disk, or compile them; also return whether they were compiled.

        Raises ValueError if the GPU is not NVIDIA's and, if the binaries are not on disk, as ``source`` and
        ``lowering.nvcc.compile_cuda`` do.
        """
        name = self.file(gpu)
        path = cache.find(name)
        if path is not None:
            return Cubin.read(path), False
        from lowering.gpu.cuda.ptxas import resources

        source = self.source(gpu)
        cubin, printed = _compile_cuda(source.text, gpu.arch)
        used = resources(printed, source.shared)
        functions = {
            kernel: {"arguments": tensors, "parameters": source.parameters(kernel), "shared": source.shared[kernel],
                     "resources": asdict(used[kernel])}
            for kernel, tensors in source.arguments.items()
        }  # fmt: skip
        made = Cubin(cubin, functions)
        cache.keep(name, made.write)
        return made, True

    def file(self, gpu: Gpu) -> str:
        """Return the name of the binaries in the cache. Raises ValueError if the GPU is not NVIDIA's."""
        if gpu.backend != "cuda":
            raise ValueError(f"TIR does not compile for {gpu.arch}; use Triton")
        made_from = fingerprint(self.op, gpu.arch, self.schedule)
        parts = (self.workload.kernel_name, gpu.arch, _name(self.state), self.schedule.model_dump_json(), made_from)
        key = hashlib.sha256("\n".join((*parts, _FORMAT)).encode()).hexdigest()[:24]
        return f"{self.op}-{gpu.arch}-{key}.cubin"

    def loops(self) -> Callable[..., None]:
        """Return the function of ``on_cpu``, which is compiled once per process."""
        key = self._compiled_from()
        if key not in _loops:
            _loops[key] = self.on_cpu()
        return _loops[key]

    def on_cpu(self, reverse_threads: bool = False) -> Callable[..., None]:
        """Compile the kernels as loops over programs and threads. The result is called as (name, *tensors)."""
        import tvm

        from lowering.gpu.cuda.generate import build

        module = on_a_short_stack(self.module, False, reverse_threads)
        # These passes only make the code faster, and take half of the build time.
        fast = ("s_tir.HoistIfThenElse", "s_tir.InsertHoistIfThenElse", "tirx.RemoveNoOp")
        functions = build(module, tvm.target.Target({"kind": "llvm", "opt-level": 0}), fast)
        return lambda name, *tensors: functions[name](*tensors)

    def _compiled_from(self) -> tuple[Any, ...]:
        fixed = (size for axis, size in zip(AXES[self.op], self.sizes, strict=True) if axis not in DYNAMIC_AXES)
        return self.op, *fixed, self.dtype, self.state, self.schedule, *self.constants.values()


@dataclass(frozen=True)
class TirLaunch(Launch):
    """A launch of the kernel ``function`` of ``kernels``; ``tensors`` are in the order of its parameters."""

    kernels: Kernels
    function: str
    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    threads: int
    work: Work

    @property
    def name(self) -> str:
        return self.function

    def run(self, gpu: Gpu) -> None:
        if not all(self.grid):
            return
        if self.tensors[0].is_cuda:
            self.kernels.cubin(gpu).run(self.function, self.tensors, self.grid, self.threads)
        else:
            self.kernels.loops()(self.function, *self.tensors)

    def compile(self, gpu: Gpu) -> Compiled:
        found = self.kernels.cubin(gpu)
        code = of_cubin(found.cubin)[f"{self.function}_kernel"]
        resources = Resources(**found.functions[self.function]["resources"])
        return Compiled(self.name, self.work, resources, issued(code, self.work.nest))


@lru_cache(maxsize=8)
def _compile_cuda(text: str, arch: str) -> tuple[bytes, str]:
    """Compile as ``lowering.nvcc.compile_cuda`` does, once where schedules differ only in how they launch."""
    from lowering.nvcc import compile_cuda

    return compile_cuda(text, arch)


def types(values: Tensor, memory: Tensor, *others: Tensor) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Return the dtypes of values and weights, of the state, and of sums; all are float64 if an input is."""
    if torch.float64 in {x.dtype for x in (values, memory, *others)}:
        return torch.float64, torch.float64, torch.float64
    return values.dtype, memory.dtype, torch.float32


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that begins at a multiple of ``VECTOR`` bytes, as wide loads require: itself or a copy."""
    return tensor if tensor.data_ptr() % VECTOR == 0 else tensor.clone()


def refuse_two_types(memory: Tensor, mass: Tensor) -> None:
    """Raise ValueError if memory and mass differ in dtype."""
    if memory.dtype != mass.dtype:
        raise ValueError(f"memory is {memory.dtype} but mass is {mass.dtype}; TIR's kernels of a token need one dtype")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
