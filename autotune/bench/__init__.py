"""``ramnet bench``: compares every op and the model with eager PyTorch, plain C++ and the bandwidth bound."""
