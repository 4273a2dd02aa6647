"""memory_scan and its backward, in three forms.

serial    Triton, forward only: a program scans the tokens in order, with its channels of the state in the L2 cache
slots     Triton: accesses are sorted by slot and time, and slots are scanned in parallel (the paper's algorithm)
shared    TIR: a warp scans the tokens in order, with its channels of the state in shared memory
"""
