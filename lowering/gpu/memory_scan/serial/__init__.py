"""The serial scan: the mass first, then rows; ``rows_backward`` and ``mass_backward`` are its gradients."""
