"""Training on tasks that need no download: associative recall, and text of the Python standard library's sources."""

from typing import TYPE_CHECKING

from ramnet.lazy import attributes

if TYPE_CHECKING:
    from ramnet.training.loop import Result, train
    from ramnet.training.recipe import Recipe

__all__ = ["Recipe", "Result", "train"]

__getattr__, __dir__ = attributes(
    __name__,
    {"Recipe": "ramnet.training.recipe", "Result": "ramnet.training.loop", "train": "ramnet.training.loop"},
)
