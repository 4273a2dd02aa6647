"""Searches how a whole model is deployed: the precision of its weights, the loops of its products, and its threads."""
