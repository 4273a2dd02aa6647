"""One token of a layer between its two projections, in one launch."""
