"""A whole token compiled ahead of time: TIR kernels and a small C library around them, without TVM's runtime."""
