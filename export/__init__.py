"""ONNX export: builds and verifies the graphs of a model, and runs them in onnxruntime."""
