"""One token of the scan, updating the state in place."""
