"""The ops on a CPU: one TIR template per op, compiled by TVM and called with torch tensors."""
