"""The scan forward and backward on a GPU: its forms, eager PyTorch, the bandwidth bound, attention and GLA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.bench import eager_scan_gradients
from autotune.bench.gpu.others import CUDNN, FLASH, GLA, GLA_HEADS, GLA_KEY, GLA_VALUE, Sizes, attention, chunk_gla
from autotune.bench.gpu.run import TOLERANCE, GpuRun, Make
from autotune.bench.inputs import ScanInputs
from autotune.bench.run import FLOOR, TUNED, Candidate, Table, check
from autotune.measure import eager_scan
from lowering.gpu.backend import GpuKernels
from ramnet import ops
from ramnet.ops import reference
from schedules.base import Schedule
from schedules.gpu import SCHEDULES
from schedules.workload import Workload

CHUNKED, SORTED = "eager, chunked", "eager, sorted"
FORMS = ("slots", "shared")
NAME, GLA_NAME = "memory_scan forward + backward", "scan and gated linear attention"
# The reference loops over tokens; beyond this many it would take most of the time.
LONGEST_CHECKED = 8192

LENGTHS = (2048, 4096, 8192, 16384, 32768)


def memory_scan(run: GpuRun, sizes: Sizes = Sizes()) -> list[Table]:  # noqa: B008 a tuple
    """Every form of the kernels, and the forms that they are compared with at the same tokens."""
    inputs, grads = scan_inputs(sizes, run.device)
    expected = training(inputs, grads)(ops.memory_scan)
    nbytes = floor_bytes([*inputs, *grads], expected)
    forms: dict[str, Make] = {}
    for name, use in run.kernels.items():
        forms[name] = partial(_checked, name, inputs, grads, expected, ops.memory_scan, use)
    for form in FORMS:
        forms[f"untuned, {form}"] = partial(_one_form, run.target, form, inputs, grads, expected)
    forms |= {
        FLOOR: lambda: run.copying(nbytes),
        FLASH: partial(attention, run, sizes, "FLASH_ATTENTION"),
        CUDNN: partial(attention, run, sizes, "CUDNN_ATTENTION"),
        CHUNKED: partial(
            _checked, CHUNKED, inputs, grads, expected, partial(_as_state, eager_scan_gradients.ScanChunked.apply)
        ),
        SORTED: partial(
            _checked, SORTED, inputs, grads, expected, partial(_as_state, eager_scan_gradients.scan_sorted)
        ),
    }
    what = f"{sizes}, bfloat16 with a state in float32; the floor copies {nbytes / 1e9:.2f} GB"
    table = run.table(NAME, what, forms, base=TUNED, slow=(CHUNKED, SORTED))
    floor = table.row(FLOOR)
    if floor is not None:
        run.facts["bandwidth of copies, bytes/s"] = nbytes / floor.seconds
    return [table]


def beside_gla(run: GpuRun, sizes: Sizes = Sizes()) -> list[Table]:  # noqa: B008
    """The scan and GLA at its paper's shape; a part of its own, as the library may compile for minutes."""
    inputs, grads = scan_inputs(sizes, run.device)
    expected = training(inputs, grads)(ops.memory_scan)
    forms: dict[str, Make] = {
        TUNED: partial(_checked, TUNED, inputs, grads, expected, ops.memory_scan, run.kernels[TUNED]),
        GLA: partial(chunk_gla, run, sizes),
    }
    what = f"{sizes}; chunk_gla with {GLA_HEADS} heads of keys of {GLA_KEY} and values of {GLA_VALUE}"
    return [run.table(GLA_NAME, what, forms, base=TUNED)]


def lengths(run: GpuRun, sizes: Sizes = Sizes(), tokens: Sequence[int] = LENGTHS) -> list[Table]:  # noqa: B008
    """The scan and causal attention with the same heads and channels, by the length of a sequence."""
    tables = []
    for length in tokens:
        at = sizes._replace(tokens=length)
        inputs, grads = scan_inputs(at, run.device)
        forms: dict[str, Make] = {
            TUNED: partial(_of_one_sequence, TUNED, inputs, grads, run.kernels[TUNED]),
            FLASH: partial(attention, run, at, "FLASH_ATTENTION"),
            CUDNN: partial(attention, run, at, "CUDNN_ATTENTION"),
        }
        what = f"{at}, attention causal over {at.heads} × {at.dim}"
        tables.append(run.table(f"scan and attention, T = {length}", what, forms, base=TUNED))
        del inputs, grads, forms
        run.release()
    run.notice(f"scan and attention: kernels checked on one sequence, up to T = {LONGEST_CHECKED}")
    found = crossover(tables)
    if found is not None:
        run.facts["shortest T measured from which the scan is faster than FlashAttention"] = found
    return tables


def crossover(tables: Sequence[Table]) -> int | None:
    """Return the shortest measured length from which on the scan takes less time than FlashAttention."""
    found = None
    for table in sorted(tables, key=_length, reverse=True):
        row = table.row(FLASH)
        if row is None or table.base != TUNED or row.ratio <= 1:
            break
        found = _length(table)
    return found


def _length(table: Table) -> int:
    return int(table.name.rpartition(" ")[2])


def scan_inputs(sizes: Sizes, device: str) -> tuple[ScanInputs, list[Tensor]]:
    """Return inputs of the scan in bfloat16 with a float32 state, and gradients of its three results.

    Addresses are decoded from random logits, so slots are about equally frequent.
    """
    generator = torch.Generator(device).manual_seed(0)
    leading = (sizes.batch, sizes.heads, sizes.tokens)
    slots = sizes.sub_dim**sizes.order

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def access() -> tuple[Tensor, Tensor]:
        # One sequence at a time, as the beams of all would be gigabytes.
        found = [
            reference.address_decode(2 * normal(*leading[1:], sizes.order, sizes.sub_dim), sizes.top_k)
            for _ in range(sizes.batch)
        ]
        where, weights = zip(*found, strict=True)
        return torch.stack(where), torch.stack(weights).bfloat16()

    (write_slots, write_weights), (read_slots, read_weights) = access(), access()
    memory = normal(*leading[:2], slots, sizes.dim)
    mass = 0.5 + torch.rand(*leading[:2], slots, generator=generator, device=device)
    values = normal(*leading, sizes.dim).bfloat16()
    inputs = ScanInputs(write_slots, write_weights, read_slots, read_weights, values, memory, mass)
    return inputs, [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in inputs[4:]]


def training(inputs: ScanInputs, grads: Sequence[Tensor]) -> Callable[[Callable[..., Any]], list[Tensor]]:
    """Return a function that runs a scan forward and backward and returns its results and all gradients."""
    leaves = inputs.requiring_grad()
    wanted = [x for x in leaves if x.requires_grad]

    def both(scan: Callable[..., Any]) -> list[Tensor]:
        outputs = scan(*leaves)
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, grads)]

    return both


def floor_bytes(given: Sequence[Tensor], found: Sequence[Tensor]) -> int:
    """Return the bytes that both passes must read and write; the backward reads the inputs again."""
    inputs, grads = given[:7], given[7:]
    return sum(x.nbytes for x in (*inputs, *inputs, *grads, *found))


def _checked(
    name: str, inputs: ScanInputs, grads: Sequence[Tensor], expected: Sequence[Tensor], scan: Callable[..., Any],
    use: Callable[[], Any] = nullcontext,
) -> Candidate:  # fmt: skip
    """Return a scan to be timed in the context of ``use``. Raises ValueError if it differs from the reference."""
    both = training(inputs, grads)

    def call() -> list[Tensor]:
        with use():
            return both(scan)

    check(name, call(), expected, TOLERANCE)
    return call


def _one_form(
    target: str, form: str, inputs: ScanInputs, grads: Sequence[Tensor], expected: Sequence[Tensor]
) -> Candidate:
    """Return the scan on the untuned kernels of one form."""
    heads, tokens, top_k = inputs.write_slots.flatten(0, 1).shape
    shape = {"N": heads, "T": tokens, "K": top_k, "M": inputs.memory.shape[2], "D": inputs.memory.shape[3]}
    workloads = (Workload(op=op, shape=shape, dtype="bfloat16") for op in ("memory_scan", "memory_scan_backward"))
    given: dict[str, Schedule] = {workload.op: untuned(workload, form) for workload in workloads}
    name = f"{target}:{form}"
    ops.register_backend(name, GpuKernels(target, given=given))
    return _checked(form, inputs, grads, expected, ops.memory_scan, lambda: ops.using(name))


def untuned(workload: Workload, form: str) -> Schedule:
    """Return the default schedule of a form. Raises ValueError, with the form's reason, if none is valid."""
    schedule = SCHEDULES[workload.op][form].default(workload)
    schedule.require(workload)
    return schedule


def _of_one_sequence(name: str, inputs: ScanInputs, grads: Sequence[Tensor], use: Callable[[], Any]) -> Candidate:
    """Return the scan of all sequences, of which the first is checked."""
    if inputs.values.shape[2] <= LONGEST_CHECKED:
        first, first_grads = ScanInputs(*(x[:1] for x in inputs)), [x[:1] for x in grads]
        expected = training(first, first_grads)(ops.memory_scan)
        _checked(name, first, first_grads, expected, ops.memory_scan, use)
    both = training(inputs, grads)

    def call() -> list[Tensor]:
        with use():
            return both(ops.memory_scan)

    return call


def _as_state(scan: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run an eager scan with operands converted to the state's dtype, and its output to that of the values."""
    output, memory, mass = scan(*eager_scan.as_state(tensors))
    return output.to(tensors[4].dtype), memory, mass
