"""Sizes whose product exceeds 2^31: every kernel uses 64-bit offsets."""

from __future__ import annotations

import importlib.util
import mmap
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from lowering.cpu.templates import TEMPLATES
from lowering.gpu.kernels import plan
from lowering.gpu.offline import arguments
from lowering.targets import gpu_of
from ramnet import ops
from ramnet.ops import reference
from schedules import gpu
from schedules.cpu import SCHEDULES
from schedules.gpu.step import MemoryStep
from schedules.workload import Op, Workload
from tests.samples import as_backends_take, relative_rmse, scan_inputs

tvm = pytest.importorskip("tvm", reason="the kernels need tvm: pip install 'ramnet[tvm]'")

# 4 heads of 2^22 slots of 172 channels: 11.5 GB, of which only the accessed rows are allocated. The last head begins
# past 2^31 elements. Programs of the interpreted kernels are blocks of channels, so there are few.
HEADS, SLOTS, DIM = 4, 4**11, 172

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="Triton's kernels are interpreted here",
)

CONSTANTS = {"decay_power": 0.5, "eps": 1e-6, "proxy_eps": 0.01, "temperature": 1.0, "norm_eps": 1e-5, "cape_heads": 1}
SHAPES: dict[Op, dict[str, int]] = {
    "address_decode": {"R": 300, "U": 3, "P": 4, "K": 8},
    "address_decode_backward": {"R": 300, "U": 3, "P": 4, "K": 8},
    "memory_scan": {"N": 2, "T": 9, "K": 4, "M": 256, "D": 32},
    "memory_scan_backward": {"N": 2, "T": 9, "K": 2, "M": 256, "D": 32},
    "memory_step": {"N": 2, "K": 4, "M": 256, "D": 32},
    "decode_heads": {"N": 4, "U": 4, "P": 4, "K": 4, "M": 256, "D": 32},
}


def narrow_accesses(module: Any, target: Any) -> set[str]:
    """Return the arguments that the module's functions index with 32 bits after flattening."""
    from tvm.ir.expr import TensorLoad
    from tvm.ir.instrument import pass_instrument
    from tvm.tirx import BufferStore
    from tvm_ffi.structural import structural_walk

    @pass_instrument
    class Flat:
        def run_after_pass(self, module: Any, info: Any) -> None:
            if info.name == "tirx.FlattenBuffer":
                self.module = module
                raise RuntimeError("this is all there is to see")

    flat = Flat()
    with tvm.transform.PassContext(instruments=[flat]), pytest.raises(RuntimeError, match="all there is to see"):
        tvm.compile(module, target=target)
    found: set[str] = set()
    for function in flat.module.functions.values():
        arguments = {str(argument.name) for argument in function.params}
        seen: dict[str, bool] = {}  # for each tensor: whether all its accesses use 64 bits

        def see(name: str, index: Any, seen: dict[str, bool] = seen) -> None:
            seen[name] = seen.get(name, True) and "int64" in str(index.ty)

        structural_walk(
            function.body,
            [
                (BufferStore, lambda store: see(str(store.buffer.name), store.indices[0])),
                (TensorLoad, lambda load: see(str(load.source.name), load.indices[0])),
            ],
        )
        assert arguments <= seen.keys(), f"no access was seen to {arguments - seen.keys()}"
        found |= {name for name in arguments if not seen[name]}
    return found


@pytest.mark.parametrize("op", SCHEDULES)
def test_cpu_kernels_use_64_bit_offsets(op: Op) -> None:
    work = Workload(op=op, shape=SHAPES[op], constants=CONSTANTS)
    module = TEMPLATES[op](work, SCHEDULES[op].default(work))
    assert narrow_accesses(module, tvm.target.Target({"kind": "llvm"})) <= {"at"}  # the position, one number


@pytest.mark.parametrize("op", gpu.SCHEDULES)
def test_tir_gpu_kernels_use_64_bit_offsets(op: Op) -> None:
    work = Workload(op=op, shape=SHAPES[op], constants=CONSTANTS)
    kinds = gpu.SCHEDULES[op]
    schedule = kinds["shared"](slot_lanes=2, chunk=2) if "shared" in kinds else kinds[""](compiler="tir")
    launch: Any = plan(op, schedule, *arguments(work)).launches[0]
    module = launch.kernels.module(cuda=False)
    assert narrow_accesses(module, tvm.target.Target({"kind": "llvm"})) <= {"A"}  # [2, H]


def spread(slots: Tensor) -> Tensor:
    """Map slots of a small memory to slots of the large one, from its first to its last."""
    return (slots.long() * (SLOTS - 1) // 7).int()


def untouched_zeros() -> Tensor:
    """Return a memory [1, N, M, D] of zeros, whose pages are allocated on first access."""
    size = 4 * HEADS * SLOTS * DIM
    try:
        place = mmap.mmap(-1, size)
    except OSError:
        pytest.skip(f"the system does not reserve {size} bytes, more than its memory, though few of them are accessed")
    return torch.frombuffer(place, dtype=torch.float32).view(1, HEADS, SLOTS, DIM)


def large_state() -> tuple[Tensor, Tensor]:
    """Return memory of zeros and mass of ones."""
    return untouched_zeros(), torch.ones(1, HEADS, SLOTS)


def inputs_of(tokens: int) -> dict[str, Tensor]:
    small = scan_inputs(1, HEADS, tokens, 2, 8, DIM)
    return small | {"memory": torch.zeros_like(small["memory"]), "mass": torch.ones_like(small["mass"])}


def steps(backend: Any, **how: Any) -> None:
    small = inputs_of(3)
    memory, mass = large_state()
    for t in range(3):
        accesses = [x[:, :, t].contiguous() for x in list(small.values())[:5]]
        on_small = as_backends_take([*accesses, small["memory"], small["mass"]])
        expected = reference.memory_step(*on_small, 1.0, 1e-6)
        accesses[0], accesses[2] = spread(accesses[0]), spread(accesses[2])
        assert relative_rmse(backend(*accesses, memory, mass, **how), expected) < 1e-5
    rows = spread(torch.arange(8)).long()
    assert torch.allclose(memory[:, :, rows], small["memory"], atol=1e-5)


def test_cpu_kernels_of_a_step_are_right_on_a_large_memory() -> None:
    with ops.using("cpu"):
        steps(ops.memory_step)


def walked(op: str, schedule: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Run a plan without its copies of the whole state, which is 0 like fresh memory."""
    from lowering.gpu.triton.copying import copy_elements

    made = plan(op, schedule, *arguments)
    for launch in made.launches:
        if launch.kernel is not copy_elements:
            launch.run(gpu_of("h100"))
        elif launch.arguments["source"].numel() < 2**30:
            launch.arguments["target"].copy_(launch.arguments["source"])
    return made.outputs


@interpreted
def test_gpu_kernels_of_a_step_are_right_on_a_large_memory() -> None:
    def step(*arguments: Tensor) -> Tensor:
        schedule = MemoryStep(compiler="triton", threads=64)
        (output,) = plan("memory_step", schedule, *(x.flatten(0, 1) for x in arguments), 1.0, 1e-6).run(gpu_of("h100"))
        return output.view(arguments[4].shape)

    steps(step)


@interpreted
@pytest.mark.parametrize(("form", "knobs"), [("serial", {}), ("slots", {"piece": 8})], ids=["serial", "slots"])
def test_gpu_kernels_of_a_scan_are_right_on_a_large_memory(form: str, knobs: dict[str, int]) -> None:
    small = inputs_of(3)
    expected = reference.memory_scan(*as_backends_take(small.values()), 1.0, 1e-6, 0.01)
    given = [torch.randn_like(small["values"]), torch.zeros_like(small["memory"]), torch.zeros_like(small["mass"])]
    gradients = reference.memory_scan_backward(tuple(given), *as_backends_take(small.values()), 1.0, 1e-6, 0.01)
    memory, mass = large_state()
    large = small | {"memory": memory, "mass": mass}
    large |= {name: spread(small[name]) for name in ("write_slots", "read_slots")}
    inputs = [x.flatten(0, 1) for x in large.values()]
    rows = spread(torch.arange(8)).long()

    forward = gpu.SCHEDULES["memory_scan"][form](**knobs)
    output, new_memory, new_mass = walked("memory_scan", forward, *inputs, 1.0, 1e-6)
    assert relative_rmse(output.view(expected[0].shape), expected[0]) < 1e-5
    assert relative_rmse(new_memory[:, rows], expected[1].flatten(0, 1)) < 1e-5
    assert relative_rmse(new_mass[:, rows], expected[2].flatten(0, 1)) < 1e-5
    del new_memory
    if form not in gpu.SCHEDULES["memory_scan_backward"]:
        return
    backward = gpu.SCHEDULES["memory_scan_backward"][form](**knobs)
    wide = [given[0].flatten(0, 1), untouched_zeros().flatten(0, 1), torch.zeros_like(mass).flatten(0, 1)]
    found = walked("memory_scan_backward", backward, *wide, *inputs, 1.0, 1e-6, 0.01)
    for actual, wanted in zip(found[:3], gradients[:3], strict=True):
        assert relative_rmse(actual.view(wanted.shape), wanted) < 1e-4
    assert relative_rmse(found[3][:, rows], gradients[3].flatten(0, 1)) < 1e-4
