"""The serial scan: kernels of the mass, then of the rows; ``rows_backward`` and ``mass_backward`` are the gradients."""
