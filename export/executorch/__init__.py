"""ExecuTorch export: a model as a .pte file with its state in mutable buffers, one call a token."""
