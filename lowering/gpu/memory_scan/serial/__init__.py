"""The serial scan, forward only: kernels of the mass, then of the rows."""
