"""Training on tasks whose data every machine has: recall, and the Python standard library's sources."""

from ramnet.training.loop import Result, train
from ramnet.training.recipe import Recipe

__all__ = ["Recipe", "Result", "train"]
