"""Training on tasks whose data every machine has: recall, and the Python standard library's sources."""

from ramnet.training.loop import Recipe, Result, train

__all__ = ["Recipe", "Result", "train"]
