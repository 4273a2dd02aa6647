"""Parses workloads such as "memory_scan N=256 T=4096 dtype=bfloat16"."""

from __future__ import annotations

import math
from typing import Any

from ramnet.config import RamNetConfig, check_constants
from schedules.workload import AXES, Workload


def parse(text: str, config: RamNetConfig, on_gpu: bool = False) -> Workload:
    """Parse the name of an op, followed by sizes by the paper's symbols and optionally a dtype and constants.

    Args:
        text: the text to parse.
        config: gives sizes and constants that ``text`` does not; N is then that of one sequence. The sizes T and R,
            and those that differ between layers, must be in ``text``.
        on_gpu: whether the workload is a GPU's, where the dtype is bfloat16 if ``text`` names none, and float32
            otherwise. A CPU's kernels compute in float32 or float64.

    Raises:
        ValueError: if the op or a size is unknown, a size is missing, or a value is not a number or out of range.
    """
    dtype, given = "bfloat16" if on_gpu else "float32", set()
    op, *settings = text.split() or [""]
    if op not in AXES:
        raise ValueError(f"shape {text!r} has the op {op!r}; there are {', '.join(sorted(AXES))}")
    layers = [
        {
            "U": layer.order, "P": layer.sub_dim, "K": layer.top_k, "M": layer.slots, "D": layer.value_dim,
            "N": layer.num_heads,
        }
        for layer in config.layers
    ]  # fmt: skip
    of_model = {axis: size for axis, size in layers[0].items() if all(each[axis] == size for each in layers)}
    sizes = {axis: of_model[axis] for axis in AXES[op] if axis in of_model}
    constants = _constants(op, config)
    for setting in settings:
        name, _, value = setting.partition("=")
        if name in AXES[op]:
            sizes[name] = _number(text, setting, int)
            given.add(name)
            if sizes[name] < 1:
                raise ValueError(f"shape {text!r} has {setting}; it must be at least 1")
        elif name in constants:
            constants[name] = _number(text, setting, float)
        elif name == "dtype":
            dtype = value
        else:
            known = ", ".join((*AXES[op], *constants, "dtype"))
            raise ValueError(f"shape {text!r} has {setting!r}; {op} has {known}, each as NAME=VALUE")
    missing = [axis for axis in AXES[op] if axis not in sizes]
    if missing:
        raise ValueError(f"shape {text!r} lacks {' and '.join(missing)}")
    if not on_gpu and dtype not in ("float32", "float64"):
        raise ValueError(f"shape {text!r} is of {dtype}; a CPU's kernels compute in float32 or float64")
    if "U" in sizes:
        if sizes["U"] * math.log2(sizes["P"]) >= 31:
            raise ValueError(f"shape {text!r} has P^U = {sizes['P']}^{sizes['U']} slots; kernels count to 2^31 - 1")
        slots, called = sizes["P"] ** sizes["U"], "P^U"
        if "M" in given and sizes["M"] != slots:
            raise ValueError(f"shape {text!r} has M = {sizes['M']}; there are P^U = {slots} slots")
        if "M" in sizes:
            sizes["M"] = slots
    else:
        slots, called = sizes["M"], "M"
    if sizes["K"] > slots:
        raise ValueError(f"shape {text!r} has K = {sizes['K']}; there are only {called} = {slots} slots")
    try:
        check_constants(**constants)
    except ValueError as error:
        raise ValueError(f"shape {text!r}: {error}") from None
    return Workload.model_validate(
        {"op": op, "shape": {axis: sizes[axis] for axis in AXES[op]}, "dtype": dtype, "constants": constants}
    )


def _constants(op: str, config: RamNetConfig) -> dict[str, float]:
    """Return the constants that are compiled into a kernel of the op."""
    if not op.startswith(("memory_", "decode_heads")):
        return {}
    found = {"decay_power": config.decay_power, "eps": config.eps}
    return found | {"proxy_eps": config.proxy_eps} if op == "memory_scan_backward" else found


def _number(text: str, setting: str, of: type) -> Any:
    try:
        return of(setting.partition("=")[2])
    except ValueError:
        raise ValueError(f"shape {text!r} has {setting!r}, which is no number") from None
