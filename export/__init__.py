"""Exports of a model to ONNX, C, WebAssembly and ExecuTorch, written after their runtime gave PyTorch's results."""
