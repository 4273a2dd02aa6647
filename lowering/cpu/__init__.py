"""The ops on a CPU: a TIR template per op, compiled by TVM and called on torch's tensors."""
