"""What several Triton kernels share: launches, arithmetic, copies, sorted lists in registers, dtypes."""
