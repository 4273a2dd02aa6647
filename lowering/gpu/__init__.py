"""The ops on GPUs: Triton kernels, and TIR templates through CUDA C.

``kernels`` maps an op, a compiler and a form of the scan to the function that plans its launches (``plan``).
"""
