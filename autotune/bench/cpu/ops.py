"""Each op in every form: eager, torch.compile, plain C++, kernels with default and tuned schedules, and the floor."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.bench import eager_scan_gradients
from autotune.bench.cpu import eager_address_decode, eager_memory_step, plain_cpp
from autotune.bench.cpu.eager_memory_step import Steps
from autotune.bench.inputs import ScanInputs, decode_logits, scan_inputs
from autotune.bench.run import FLOOR, TUNED, Candidate, Run, Table, check, within
from autotune.measure import eager_scan, native
from ramnet import ops
from ramnet.ops.accesses import Accesses
from ramnet.ops.backend import Backend

ROW_BYTES = 4  # float32

OPERANDS = "floor, with operands"
UNDISPATCHED = "tuned, undispatched"
SMALL, LARGE = "M = 4^5", "M = 4^10"
Forms = dict[str, Candidate]


def memory_scan(run: Run) -> Table:
    """The scan forward. The bound is three state rows for each pair of a write and a read: read, written, read.

    ``OPERANDS`` also reads 19 MB, the size of inputs and outputs, from memory or what the caches hold of it.
    """
    inputs = scan_inputs()
    expected = ops.memory_scan(*inputs)
    slow: Forms = {"eager, tokens and slots": partial(eager_scan.scan_by_slots, *inputs)}
    fast: Forms = {
        "eager, in place": partial(eager_scan.scan_in_place, *inputs),
        "eager, chunked": partial(eager_scan.scan_chunked, *inputs),
        **_compiled(run, "torch.compile, sorted", partial(eager_scan_gradients.scan_sorted, compiled=True), *inputs),
        **_plain_cpp(run, plain_cpp.scan, *inputs),
        **run.on_kernels(lambda: ops.memory_scan(*inputs)),
    }
    _check_all(run, slow | fast, expected)
    rows, operands = 3 * _row_bytes(inputs), sum(x.nbytes for x in (*inputs, *expected))
    fast[FLOOR] = partial(run.l2.read, rows)
    l2, memory = run.l2, run.dram(1)
    fast[OPERANDS] = lambda: (l2.read(rows), memory.read(operands))
    return run.compare("memory_scan", _shape(inputs), fast, slow, base=TUNED)


def memory_scan_training(run: Run) -> Table:
    """The scan forward and backward, with all gradients. The bound is nine rows per pair: three forward; in the
    backward, for the read and for the write, the row, and the gradient's row read and written.
    """
    inputs = scan_inputs()
    leaves = inputs.requiring_grad()
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator) for x in (inputs.values, inputs.memory, inputs.mass)]

    def training(scan: Callable[..., tuple[Tensor, ...]]) -> Sequence[Tensor]:
        outputs = scan(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, grads)]

    expected = training(ops.memory_scan)
    slow: Forms = {"eager, sorted": lambda: training(eager_scan_gradients.scan_sorted)}
    fast: Forms = {
        "eager, chunked": lambda: training(eager_scan_gradients.ScanChunked.apply),
        **_compiled(run, "torch.compile, sorted", training, partial(eager_scan_gradients.scan_sorted, compiled=True)),
        **_plain_cpp(run, plain_cpp.scan_forward_backward, inputs, grads),
        **run.on_kernels(lambda: training(ops.memory_scan)),
    }
    _check_all(run, slow | fast, expected)
    fast[FLOOR] = partial(run.l2.read, 9 * _row_bytes(inputs))
    return run.compare("memory_scan forward + backward", _shape(inputs), fast, slow, base=TUNED)


def memory_step(run: Run, tokens: int = 64) -> Table:
    """Tokens one by one on a state that is updated in place. The bound is three rows per pair, as in the scan."""
    inputs = scan_inputs(tokens=tokens)
    expected = ops.memory_scan(*inputs)[0]
    beside = partial(eager_memory_step.beside_mass, inputs)
    forms = {
        "eager, slots": Steps(inputs, eager_memory_step.by_slots),
        "eager, in place": Steps(inputs, eager_memory_step.in_place),
        "eager, one gather": Steps(inputs, eager_memory_step.one_gather, beside()),
    }
    if run.compiling("memory_step"):
        forms["torch.compile, one gather"] = Steps(inputs, torch.compile(eager_memory_step.one_gather), beside())
    forms |= {name: Steps(inputs, one) for name, one in _plain_cpp(run, plain_cpp.step).items()}
    for form, call in forms.items():
        check(form, [call.outputs()], [expected])
    fast: Forms = dict(forms)
    for name, use in run.kernels.items():
        call = Steps(inputs, ops.memory_step)
        check(name, [within(use, call.outputs)()], [expected])
        fast[name] = within(use, call)
    if run.undispatched:
        steps = Steps(inputs, _undispatched_step(run.undispatched))
        check(UNDISPATCHED, [steps.outputs()], [expected])
        fast[UNDISPATCHED] = steps
    fast[FLOOR] = partial(run.l2.read, 3 * _row_bytes(inputs))
    slow = {"eager, slots": fast.pop("eager, slots")}
    return run.compare("memory_step", _shape(inputs), fast, slow, base=TUNED, calls=tokens)


def memory_step_slots(run: Run, tokens: int = 16) -> Table:
    """The step at M = 4^5 and M = 4^10 with the same accesses, spread over 1024 times the slots.

    It is measured as called, and without torch's dispatcher, whose cost hides part of the difference. The larger state
    is 4.3 GB of address space, of which only the accessed pages are allocated.
    """
    small = scan_inputs(tokens=tokens)
    factor = 4**5
    heads, slots, dim = small.memory.shape[1:]
    # Not a multiple of a page, so that the rows do not all fall into the same cache set.
    spread = [s * factor + s * 37 % factor for s in (small.write_slots, small.read_slots)]
    large = small._replace(
        write_slots=spread[0],
        read_slots=spread[1],
        memory=_untouched(heads * slots * factor * dim).view(1, heads, -1, dim),
        mass=torch.full((1, heads, slots * factor), 0.5),
    )
    sizes = ((SMALL, small), (LARGE, large))

    def steps(one: Callable[..., Tensor]) -> dict[str, Steps]:
        return {name: Steps(x, one, (x.memory, x.mass)) for name, x in sizes}

    what = _shape(small)
    if not run.undispatched:
        forms: Forms = dict(steps(eager_memory_step.in_place))
        return run.compare("memory_step by slots", f"{what}, eager, in place", forms, base=SMALL, calls=tokens)
    use = run.kernels[TUNED]
    called = {name: within(use, call) for name, call in steps(ops.memory_step).items()}
    direct = {f"{name}, undispatched": call for name, call in steps(_undispatched_step(run.undispatched)).items()}
    return run.compare("memory_step by slots", f"{what}, {TUNED}", called | direct, base=SMALL, calls=tokens)


def address_decode(run: Run) -> Table:
    """The K best of a product softmax. The bound is to read its input and output once."""
    tokens, order, sub_dim, top_k = 16 * 1024, 5, 4, 8
    logits = decode_logits(tokens, order, sub_dim)
    slots, weights = ops.address_decode(logits, top_k)
    fast: Forms = {
        "eager, all M entries": partial(eager_address_decode.decode_full, logits, top_k),
        "eager, topk beams": partial(eager_address_decode.decode_beams, logits, top_k),
        "eager, merging network": partial(eager_address_decode.decode_merged, logits, top_k),
        **_compiled(
            run, "torch.compile, merging network", torch.compile(eager_address_decode.decode_merged), logits, top_k
        ),
        **_plain_cpp(run, plain_cpp.decode, logits, top_k),
        **run.on_kernels(lambda: ops.address_decode(logits, top_k)),
    }
    for form, call in fast.items():
        got_slots, got_weights = call()
        check(form, [got_weights], [weights])
        # Equal weights, which are rare with random logits, may be in either order.
        check(
            f"{form} (slots)", [(got_slots != slots).double().mean() + 1], [torch.ones((), dtype=torch.float64)], 1e-3
        )
    fast[FLOOR] = partial(run.l2.read, 4 * (logits.numel() + 2 * tokens * top_k))
    what = f"tokens·heads={tokens} U={order} P={sub_dim} K={top_k}"
    return run.compare("address_decode", what, fast, base=TUNED)


def _compiled(run: Run, name: str, call: Callable[..., Any], *arguments: Any) -> Forms:
    return {name: partial(call, *arguments)} if run.compiling(name) else {}


def _plain_cpp(run: Run, call: Callable[..., Any], *arguments: Any) -> Forms:
    """Return the single-threaded C++ loop, or nothing if there is no compiler."""
    try:
        plain_cpp.library()
    except native.NoCompilerError as problem:
        run.notice(f"plain C++ left out: {problem}")
        return {}
    return {"plain C++": partial(call, *arguments)}


def _check_all(run: Run, forms: Forms, expected: Sequence[Tensor]) -> None:
    for form, call in forms.items():
        run.on_step(f"checking {form}")
        check(form, call(), expected)


def _undispatched_step(backend: Backend) -> Callable[..., Tensor]:
    def step(*tensors: Tensor) -> Tensor:
        *accesses, values, memory, mass = tensors
        return backend.memory_step(Accesses(*accesses), values, memory, mass, 1.0, 1e-6)

    return step


def _untouched(count: int) -> Tensor:
    """Return zeros whose pages are not allocated yet, unlike those of torch.zeros."""
    pages = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.float32)


def _row_bytes(inputs: ScanInputs) -> int:
    """Return the bytes of one state row for each pair of a write and a read."""
    return inputs.write_slots.numel() * inputs.values.shape[-1] * ROW_BYTES


def _shape(inputs: ScanInputs) -> str:
    (batch, heads, tokens, top_k), (slots, dim) = inputs.write_slots.shape, inputs.memory.shape[2:]
    return f"B·H={batch * heads} T={tokens} K={top_k} M={slots} D={dim}"
