"""What a run will need, found out without training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ramnet.config import RamNetConfig
from ramnet.console import digits, duration
from ramnet.plugins import load, plugins
from ramnet.training.flops import peak_flops
from ramnet.training.footprint import Pass, Rows, checkpoint_bytes, gathered, held, one_pass, state_bytes
from ramnet.training.model import Model
from ramnet.training.objective import Execution
from ramnet.training.parallel import Parallel
from ramnet.training.recipe import Recipe


def describe(
    model: Model, rows: Rows, recipe: Recipe, execution: Execution, parallel: Parallel, kernels: str
) -> Iterator[tuple[str, str]]:
    """Yield what a run needs in lines of a name and a text.

    Args:
        model: may be on the meta device.
        rows: those of a step, of all processes.
        kernels: the backend of the memory ops.

    Raises:
        ValueError: if the processes cannot share a batch equally.
    """
    parallel.check(rows.size)
    mine = rows._replace(size=rows.size // parallel.count)
    part = mine._replace(size=min(execution.micro_batch or mine.size, mine.size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = getattr(torch, recipe.precision)
    without, recomputed = (one_pass(model, part, precision, recompute, device) for recompute in (False, True))
    yield "parameters", f"{sum(p.numel() for p in model.parameters()):,}"
    yield from _memory(model, mine, part, (without, recomputed), execution, parallel)
    flops = (recomputed if execution.recompute else without).flops * rows.size / part.size
    tokens = rows.size * rows.length
    yield "a step", f"{tokens:,} tokens, {flops:.3g} FLOPs"
    seconds, why = _seconds(model, mine, flops / parallel.count, execution, precision, device, kernels)
    yield "time of a step", why if seconds is None else f"at least {duration(seconds)}: {why}"
    steps = recipe.steps
    if steps is None:
        yield "the run", f"{recipe.seconds:g} s, with as many steps as they hold"
    else:
        hours = "" if seconds is None else f", at least {seconds * steps / 3600:.3g} hours"
        limit = "" if recipe.seconds is None else f", ended after {recipe.seconds:g} s at the latest"
        yield "the run", f"{steps:,} steps, {tokens * steps:,} tokens, {flops * steps:.3g} FLOPs{hours}{limit}"
    weights, training = checkpoint_bytes(model, rows)
    yield "a checkpoint", f"{size(weights + training)}: the model {size(weights)}, training {size(training)}"


def _memory(
    model: Model, rows: Rows, part: Rows, passes: tuple[Pass, Pass], execution: Execution, parallel: Parallel
) -> Iterator[tuple[str, str]]:
    """Yield the memory of a process that computes ``rows``, of them ``part`` at a time."""
    of = held(model, parallel.count if parallel.shards else 1)
    share = f", its share of {parallel.count} processes" if parallel.shards else ""
    always, now = sum(of) + state_bytes(model, rows), passes[execution.recompute].activations
    yield "memory of a process", f"parameters {size(of.parameters)}{share}"
    yield "", f"gradients {size(of.gradients)}"
    yield "", f"moments of AdamW {size(of.optimizer)}"
    if rows.carried:
        yield "", f"state that rows go on from {size(state_bytes(model, rows))}"
    if parallel.shards:
        now = max(now + gathered(model), whole := checkpoint_bytes(model, rows)[1])
        yield "", f"whole parameters and gradients, of a block at a time {size(gathered(model))}"
        yield "", f"whole weights and moments, while a checkpoint is written {size(whole)}"
    elif parallel.count > 1:
        always += of.gradients
        yield "", f"gradients in exchange {size(of.gradients)}"
    kept, recomputed = (size(each.activations) for each in passes)
    yield "", f"activations of {part.size} rows of {part.length} tokens {kept}, with --recompute {recomputed}"
    yield "", f"in all {size(always + now)} at a time{' with --recompute' if execution.recompute else ''}"


def _seconds(
    model: Model, rows: Rows, flops: float, execution: Execution, precision: torch.dtype, device: torch.device,
    kernels: str,
) -> tuple[float | None, str]:  # fmt: skip
    """Return the least seconds that a process needs for its ``rows`` and ``flops``, and what they are of; or None, and
    why they are not known."""
    if not kernels or not isinstance(model.config, RamNetConfig):
        return None, "not known: only the tuned kernels of RAM-Net have records"
    times: Any = load(plugins("ramnet.step_times")["memory_ops"])
    try:
        ops = times(model.config, rows.size, rows.length)
    except LookupError as error:
        return None, f"not known: {error}; ramnet tune makes them"
    peak = peak_flops(device, precision)
    memory = ops.forward * (2 if execution.recompute else 1) + ops.backward
    products = flops / peak
    return memory + products, (
        f"matrix products {duration(products)} at the {digits(peak / 1e9)} GFLOP/s of a large one here, and memory ops"
        f" {duration(memory)} by the records of {ops.device} ({ops.how})"
    )


def size(count: float) -> str:
    """Format a number of bytes with three digits and a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{digits(count / factor)} {unit}"
    return f"{count:g} bytes"
