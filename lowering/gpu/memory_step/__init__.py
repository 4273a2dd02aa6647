"""One token of the scan, its state updated in place."""
