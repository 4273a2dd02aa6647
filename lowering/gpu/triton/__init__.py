"""Functions that several Triton kernels share: arithmetic, copies, sorted lists in registers, dtypes."""
