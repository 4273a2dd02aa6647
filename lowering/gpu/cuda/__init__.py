"""TIR kernels as CUDA C, compiled by nvcc and launched through the CUDA driver."""
