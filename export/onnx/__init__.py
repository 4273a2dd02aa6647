"""ONNX export: two graphs of a model, for a token and for a prompt, that onnxruntime runs."""
