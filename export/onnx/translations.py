"""The memory ops in standard ONNX operators, for the translation table of ``torch.onnx.export``.

Each function has the signature of its op in ``ramnet.ops.library``. The state [B, H, M, D] goes from the graph's input
through ScatterND to its output without other operators. Only then does onnxruntime update a state that is bound to both
in place, writing K rows instead of copying M.
"""

# mypy: ignore-errors
# onnxscript accepts Python constants as tensors and turns decorated functions into graphs; its stubs describe neither.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT32, INT64, graph, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from ramnet.ops import library  # noqa: F401  registers the ops

OPSET = 18
_domain = Opset("ramnet", 1)  # the domain of the functions below until they are inlined
Float, Int64 = FLOAT[...], INT64[...]  # of any rank; a bare FLOAT is a scalar


def address_decode(logits: Any, top_k: int, kernels: str = "") -> tuple[Any, Any]:
    """Return weights and slots [..., K] of logits [..., U, P] by beam search, with one TopK per sub-vector."""
    order, sub_dim = (int(size) for size in logits.shape[-2:])
    leading = [0] * (len(logits.shape) - 2)  # Reshape keeps sizes given as 0
    log_p = op.LogSoftmax(logits, axis=-1)
    best = op.Squeeze(op.Slice(log_p, [0], [1], [-2]), [-2])  # [..., P]
    slots = op.Expand(_int64(range(sub_dim)), op.Shape(best))
    beam = 1
    for u in range(order):
        if u > 0:
            next_log_p = op.Slice(log_p, [u], [u + 1], [-2])  # [..., 1, P]
            digits = _int64(digit * sub_dim**u for digit in range(sub_dim))
            flat = _int64([*leading, beam * sub_dim])
            best = op.Reshape(op.Add(op.Unsqueeze(best, [-1]), next_log_p), flat)
            slots = op.Reshape(op.Add(op.Unsqueeze(slots, [-1]), digits), flat)
        beam = min(top_k, beam * sub_dim)
        best, chosen = op.TopK(best, [beam], axis=-1)
        slots = op.GatherElements(slots, chosen, axis=-1)
    return op.Exp(best), op.Cast(slots, to=INT32.dtype)


def memory_scan(  # noqa: PLR0913 - the signature of its op
    write_slots: Any,
    write_weights: Any,
    read_slots: Any,
    read_weights: Any,
    values: Any,
    memory: Any,
    mass: Any,
    decay_power: float = 1.0,
    eps: float = 1e-6,
    proxy_eps: float = 0.01,
    kernels: str = "",
) -> tuple[Any, Any, Any]:
    """Return output [B, H, T, D], memory and mass by an ONNX Scan over tokens, or without one if T is 1 statically."""
    decay = op.Pow(op.Sub(1.0, write_weights), decay_power)
    epsilon = op.Constant(value_float=eps)
    write_at, read_at = _indices(write_slots), _indices(read_slots)
    tokens = (write_at, write_weights, decay, read_at, read_weights, values)
    if values.shape[2] == 1:
        now = (op.Squeeze(x, [2]) for x in tokens)
        output, memory, mass = token(memory, mass, *now, epsilon)
        return op.Unsqueeze(output, [2]), memory, mass
    return _scan(memory, mass, *tokens, epsilon)


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ``custom_translation_table`` for ``torch.onnx.export``."""
    return {
        torch.ops.ramnet.address_decode.default: address_decode,
        torch.ops.ramnet.memory_scan.default: memory_scan,
    }


def _int64(numbers: Any) -> Any:
    return op.Constant(value_ints=list(numbers))


def _indices(slots: Any) -> Any:
    """Convert slots [B, H, T, K] to indices (b, h, slot) into the state, int64 [B, H, T, K, 3]."""
    slots = op.Unsqueeze(op.Cast(slots, to=INT64.dtype), [-1])
    shape = op.Shape(slots)
    batch = op.Reshape(op.Range(0, op.Gather(shape, 0), 1), [-1, 1, 1, 1, 1])
    head = op.Reshape(op.Range(0, op.Gather(shape, 1), 1), [-1, 1, 1, 1])
    indices = op.Concat(op.Expand(batch, shape), op.Expand(head, shape), slots, axis=-1)
    return op.Reshape(indices, [0, 0, 0, 0, 3])  # only for shape inference, which needs the constant 3


@script(_domain, default_opset=op)
def token(
    memory: Float, mass: Float, write_at: Int64, write_weights: Float, decay: Float,
    read_at: Int64, read_weights: Float, values: Float, epsilon: Float,
) -> tuple[Float, Float, Float]:  # fmt: skip
    """One token: indices [B, H, K, 3], weights and decay [B, H, K], values [B, H, D] (paper, steps 5 and 6)."""
    kept = op.Mul(op.Unsqueeze(decay, [-1]), op.GatherND(memory, write_at))
    rows = op.Add(kept, op.Mul(op.Unsqueeze(write_weights, [-1]), op.Unsqueeze(values, [2])))
    masses = op.Add(op.Mul(decay, op.GatherND(mass, write_at)), write_weights)
    memory_after = op.ScatterND(memory, write_at, rows)
    mass_after = op.ScatterND(mass, write_at, masses)
    scaled = op.Div(read_weights, op.Add(op.GatherND(mass_after, read_at), epsilon))
    output = op.ReduceSum(op.Mul(op.Unsqueeze(scaled, [-1]), op.GatherND(memory_after, read_at)), [2], keepdims=0)
    return output, memory_after, mass_after


@script(_domain, default_opset=op)
def _scan(
    memory: Float, mass: Float, write_at: Int64, write_weights: Float, decay: Float,
    read_at: Int64, read_weights: Float, values: Float, epsilon: Float,
) -> tuple[Float, Float, Float]:  # fmt: skip
    """Scan the tokens, which are axis 2 of all arguments but the state."""

    @graph()
    def body(
        memory_in: Float, mass_in: Float, write_at_t: Int64, write_weights_t: Float, decay_t: Float,
        read_at_t: Int64, read_weights_t: Float, values_t: Float,
    ) -> tuple[Float, Float, Float]:  # fmt: skip
        output_t, memory_t, mass_t = token(
            memory_in, mass_in, write_at_t, write_weights_t, decay_t, read_at_t, read_weights_t, values_t, epsilon
        )
        return memory_t, mass_t, output_t

    memory_after, mass_after, output = op.Scan(
        memory, mass, write_at, write_weights, decay, read_at, read_weights, values,
        body=body, num_scan_inputs=6, scan_input_axes=[2, 2, 2, 2, 2, 2], scan_output_axes=[2],
    )  # fmt: skip
    return output, memory_after, mass_after
