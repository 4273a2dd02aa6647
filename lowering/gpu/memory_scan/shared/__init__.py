"""The scan in shared memory; its backward recomputes the forward, then walks in reverse."""
