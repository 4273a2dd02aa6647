"""The scan with its state in shared memory; the backward recomputes the forward, then visits tokens in reverse."""
