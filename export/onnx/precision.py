"""Stores the weights of embedding and projections in fewer bits. The state, and all that is computed between products,
stay float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

_BLOCK = 32  # weights of an output that share a scale
_FLOAT = 1  # float32 in ONNX's numbers of types
_CONTRIB = "com.microsoft"  # the domain of onnxruntime's own operators


def convert(model: onnx_ir.Model, precision: str) -> None:
    """Change a float32 graph in place.

    - "float32" leaves it as it is.
    - "float16" stores weights as float16. onnxruntime converts those of projections to float32 when it loads the graph,
      as its float16 products on a CPU are slower, and less exact.
    - "int8" makes products MatMulNBits of onnxruntime: int8 weights with a scale for every 32, and activations that are
      rounded to int8, with scales of their own for each token. The embedding is int8 with a scale for each row.
    """
    import onnx_ir

    if precision == "float32":
        return
    matrix, rows = (_half, _half_rows) if precision == "float16" else (_int8, _int8_rows)
    for node in list(model.graph):
        which = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        weight = node.inputs[which] if which is not None and node.domain == "" else None
        if weight is None or weight.const_value is None or weight.const_value.dtype != onnx_ir.DataType.FLOAT:
            continue
        if len(weight.const_value.shape) != 2:
            continue
        change: Callable[..., Any] = matrix if which == 1 else rows
        change(model, node, weight.const_value.numpy())
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    if precision == "int8":
        model.opset_imports[_CONTRIB] = 1


def _half(model: onnx_ir.Model, node: onnx_ir.Node, weight: Any) -> None:
    wide = _node("Cast", [_stored(model, node, "half", weight.astype(np.float16))], node, "weight", {"to": _FLOAT})
    model.graph.insert_before(node, wide)
    node.replace_input_with(1, wide.outputs[0])


def _half_rows(model: onnx_ir.Model, node: onnx_ir.Node, table: Any) -> None:
    found = _node("Gather", [_stored(model, node, "half", table.astype(np.float16)), node.inputs[1]], node, "found")
    _replace(model, node, [found, _node("Cast", found.outputs, node, "wide", {"to": _FLOAT})])


def _int8(model: onnx_ir.Model, node: onnx_ir.Node, weight: Any) -> None:
    inputs, outputs = weight.shape
    blocks = -(-inputs // _BLOCK)
    padded = np.zeros((outputs, blocks * _BLOCK), np.float32)
    padded[:, :inputs] = weight.T
    whole, scale = _rounded(padded.reshape(outputs, blocks, _BLOCK))
    tensors = [
        _stored(model, node, "int8", (whole + 128).astype(np.uint8)),  # 128 stands for 0
        _stored(model, node, "scale", scale.reshape(-1)),
    ]
    attributes = {"K": inputs, "N": outputs, "bits": 8, "block_size": _BLOCK, "accuracy_level": 4}
    product = _node("MatMulNBits", [node.inputs[0], *tensors], node, "product", attributes, _CONTRIB)
    _replace(model, node, [product])


def _int8_rows(model: onnx_ir.Model, node: onnx_ir.Node, table: Any) -> None:
    whole, scale = _rounded(table)
    found = _node("Gather", [_stored(model, node, "int8", whole.astype(np.int8)), node.inputs[1]], node, "found")
    scales = _node("Gather", [_stored(model, node, "scale", scale), node.inputs[1]], node, "scales")
    wide = _node("Cast", found.outputs, node, "wide", {"to": _FLOAT})
    product = _node("Mul", [wide.outputs[0], scales.outputs[0]], node, "product")
    _replace(model, node, [found, scales, wide, product])


def _rounded(rows: Any) -> tuple[Any, Any]:
    """Return rows as whole numbers in −127..127, and their scales [..., 1]."""
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
    return np.rint(rows / np.maximum(scale, np.finfo(np.float32).tiny)), scale


def _node(
    operator: str, inputs: Sequence[Any], of: onnx_ir.Node, what: str, attributes: dict[str, int] | None = None,
    domain: str = "",
) -> onnx_ir.Node:  # fmt: skip
    """Return a node with one output, whose name is unique: it derives from the output of the node ``of``."""
    import onnx_ir

    output = onnx_ir.Value(name=f"{of.outputs[0].name}.{what}")
    return onnx_ir.node(operator, inputs, attributes, domain=domain, outputs=[output])


def _stored(model: onnx_ir.Model, node: onnx_ir.Node, what: str, array: Any) -> onnx_ir.Value:
    """Return a new initializer."""
    import onnx_ir

    name = f"{node.outputs[0].name}.{what}"
    value = onnx_ir.Value(
        name=name, const_value=onnx_ir.tensor(array, name=name), shape=onnx_ir.Shape(array.shape),
        type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
    )  # fmt: skip
    model.graph.register_initializer(value)
    return value


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, by: list[onnx_ir.Node]) -> None:
    """Replace a node by others, of which the last gives its output."""
    import onnx_ir

    last, output = by[-1].outputs[0], node.outputs[0]
    last.type, last.shape = output.type, output.shape
    onnx_ir.convenience.replace_nodes_and_values(model.graph, node, [node], by, [output], [last])
