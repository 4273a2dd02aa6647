"""A sequence of writes and reads, in three forms.

serial    Triton: a program walks through time with its channels of the state in the L2 cache
slots     Triton: accesses are sorted by slot and time, and slots are scanned in parallel (the paper's algorithm)
shared    TIR: a warp walks through time with its channels of the state in shared memory
"""
