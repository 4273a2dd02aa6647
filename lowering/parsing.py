"""Calls TVM's parser where it is quick."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def on_a_short_stack(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``function(*arguments)``, called in a thread of its own.

    TVM's parser looks up the module of every function that is being called, among all that were imported. Within
    pytest that is 13 to 20 % of the time of compiling a kernel.
    """
    with ThreadPoolExecutor(1, "parse") as thread:
        return thread.submit(function, *arguments).result()
