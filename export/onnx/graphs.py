"""Builds the two ONNX graphs of a model, for one token (decode) and for any number of tokens (prefill)."""

from __future__ import annotations

import hashlib
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export.libraries import quiet
from export.model import evaluating
from export.onnx.ports import PAST, PRESENT, SLOTS, WEIGHTS
from ramnet import RamNetForCausalLM, RamState

if TYPE_CHECKING:
    import onnx_ir

_INLINE_BYTES = 1024  # smaller constants are stored in the graphs


def build(model: RamNetForCausalLM, kind: str, kernels: bool = False) -> onnx_ir.Model:
    """Build the graph ``kind`` of a float32 model.

    Its inputs are ``input_ids`` int64 [batch, 1] (decode) or [batch, tokens] (prefill), and ``past_recurrent.NAME`` for
    each name of ``RamState.tensors``. Its outputs are ``logits`` [batch, tokens, V], ``present_recurrent.NAME``, and
    ``slots.LAYER`` int32 [batch, tokens, 2, H, K], the slots that each token reads and writes, before CAPE. The slots
    cost nothing if they are not requested.

    Args:
        kernels: make each layer between its projections a node of ``export.onnx.nodes``. Otherwise all operators are
            standard.
    """
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        InlinePass,
        RemoveUnusedFunctionsPass,
        RemoveUnusedOpsetsPass,
    )
    from onnx_ir.serde import deserialize_function

    from export.onnx import nodes, translations

    state = RamState.zeros(model.config, batch_size=2)  # torch.export treats a size of 1 as constant
    ids = torch.zeros(2, 1 if kind == "decode" else 3, dtype=torch.int64)
    batch = {0: torch.export.Dim("batch")}
    tokens = {} if kind == "decode" else {1: torch.export.Dim("tokens")}
    past = state.tensors()
    names = list(past)
    layers = nodes.layers_are_nodes(model) if kernels else nullcontext()
    with warnings.catch_warnings(), evaluating(model), layers, quiet("torch.onnx"), quiet("onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Stateful(model),
            (ids, list(past.values())),
            dynamic_shapes=(batch | tokens, [batch] * len(names)),
            input_names=["input_ids", *(PAST + name for name in names)],
            output_names=["logits", *(PRESENT + name for name in names)],
            custom_translation_table=translations.table(),
            opset_version=translations.OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RuntimeError(f"torch.onnx.export gave no {kind} graph")
    # The exporter keeps the functions of the translation table, but not those that they call.
    token = deserialize_function(translations.token.to_function_proto())
    program.model.functions[token.identifier()] = token
    # The metadata holds file paths and line numbers of the exporting machine.
    for tidy in (InlinePass(), RemoveUnusedFunctionsPass(), RemoveUnusedOpsetsPass(), ClearMetadataAndDocStringPass()):
        tidy(program.model)
    _output_slots(program.model, model.config.num_layers)
    return program.model


def _output_slots(model: onnx_ir.Model, layers: int) -> None:
    """Make the slots outputs. Each address_decode ends in a Cast of a GatherElements, which gives its slots; a node
    of a layer has them as its last output."""
    found = []
    for node in model.graph:
        if node.domain == "ramnet":
            found.append(node.outputs[-1])
            continue
        before = node.inputs[0].producer() if node.op_type == "Cast" and node.inputs[0] is not None else None
        if before is not None and before.op_type == "GatherElements":
            found.append(node.outputs[0])
    if len(found) != layers:
        raise RuntimeError(f"the graph decodes {len(found)} addresses; the model has {layers} layers")
    for layer, value in enumerate(found):
        value.name = f"{SLOTS}{layer}"
        model.graph.outputs.append(value)


def save(models: dict[str, onnx_ir.Model], directory: Path) -> None:
    """Write ``NAME.onnx`` for each graph, and ``weights.bin`` with the weights that they share."""
    import onnx_ir
    from onnx_ir.external_data import convert_tensors_to_external

    initializers: dict[bytes, list[onnx_ir.Value]] = {}
    tensors: dict[bytes, onnx_ir.TensorProtocol] = {}
    for model in models.values():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= _INLINE_BYTES:
                key = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()).digest()
                tensors.setdefault(key, tensor)
                initializers.setdefault(key, []).append(value)
    external = convert_tensors_to_external(list(tensors.values()), directory, WEIGHTS)
    for key, tensor in zip(tensors, external, strict=True):
        for value in initializers[key]:
            # One object per initializer, as it holds the initializer's name.
            value.const_value = onnx_ir.ExternalTensor(
                WEIGHTS, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=value.name or "",
                base_dir=directory,
            )  # fmt: skip
    for name, model in models.items():
        onnx_ir.save(model, directory / f"{name}.onnx")


class _Stateful(nn.Module):
    """The model with its state as a list of tensors, in the order of ``RamState.tensors``."""

    def __init__(self, model: RamNetForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        layers = self.model.config.num_layers
        *tensors, position = past
        state = RamState(tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :], position)
        logits, state, _ = self.model(input_ids, state)
        return logits, *state.tensors().values()
