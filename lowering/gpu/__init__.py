"""The ops on GPUs: Triton kernels, and TIR templates through CUDA C.

``kernels`` and ``templates`` map an op, and a form of the scan, to its Triton and its TIR kernels.
"""
