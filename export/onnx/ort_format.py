"""Graphs in onnxruntime's own format, which its builds for small devices need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.onnx.model import OnnxModel, run
from export.onnx.ports import GRAPHS
from export.onnx.runtime import OnnxGraph
from export.onnx.state import OnnxState


def save(model: OnnxModel, ids: NDArray[np.int64], directory: Path, library: Path | None) -> None:
    """Write ``NAME.ort``, with its weights, for each ``NAME.onnx`` in ``directory``.

    Args:
        model: the graphs of ``directory``.
        ids: int64 [1, T], with which the two formats are compared.
        library: the custom operators of the graphs, whose code is run.

    Raises:
        ValueError: if the two formats give different logits.
    """
    import onnxruntime

    for kind in GRAPHS:
        path = directory / f"{kind}.ort"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if library is not None:
            options.register_custom_ops_library(str(library))
        # Optimisations beyond these are for the processor that makes them.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        onnxruntime.InferenceSession(str(path.with_suffix(".onnx")), options, providers=["CPUExecutionProvider"])
        inputs = ids[:, :1] if kind == "decode" else ids, OnnxState.zeros(model.config, 1)
        found, expected = (run(graph, *inputs)[0] for graph in (OnnxGraph(path, None, library), model.graphs[kind]))
        if not np.allclose(found, expected, atol=1e-4):
            raise ValueError(f"{path.name} gives other logits than {kind}.onnx")
