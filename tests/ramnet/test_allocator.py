"""Freed memory is used again without page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
from resource import RUSAGE_SELF, getrusage
from ramnet.allocator import keep_freed_memory

def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)
    return getrusage(RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), keep_freed_memory(), faults(), faults())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's"
)
def test_the_second_of_two_results_has_no_page_faults() -> None:
    usual, kept, _first, second = subprocess.check_output([sys.executable, "-c", PROGRAM], text=True).split()
    assert kept == "True"
    assert int(usual) >= 32  # a page may have 2 MB
    assert int(second) <= 8
