"""``ramnet bench``: every op and the model against eager PyTorch, plain C++ and the bandwidth floor."""
