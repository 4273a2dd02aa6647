"""Workloads with the sizes of the 340m model, which can be overridden."""

from __future__ import annotations

from schedules.workload import AXES, Op, Workload

OF_340M = {"N": 256, "T": 4096, "K": 8, "M": 1024, "D": 64, "U": 5, "P": 4, "R": 2**21}


def workload(op: Op, dtype: str = "bfloat16", **sizes: int) -> Workload:
    constants = {"decay_power": 1.0, "eps": 1e-6, "proxy_eps": 0.01}
    if op.startswith("address"):
        constants = {}
    elif not op.endswith("backward"):
        del constants["proxy_eps"]
    shape = {axis: {**OF_340M, **sizes}[axis] for axis in AXES[op]}
    return Workload(op=op, shape=shape, dtype=dtype, constants=constants)  # type: ignore[arg-type]
