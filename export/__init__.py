"""RAM-Net as ONNX: the graphs of a model, their verification, and a session that runs them."""
