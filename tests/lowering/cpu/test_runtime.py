"""What TVM's runtime is loaded with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ramnet.processes import usable_cores

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


def started(threads: str) -> subprocess.CompletedProcess[str]:
    """A process whose kernels begin with this number of threads."""
    program = (
        "import os; from lowering.cpu import runtime; runtime.match_threads(); print(os.environ['TVM_NUM_THREADS'])"
    )
    environment = os.environ | {"TVM_NUM_THREADS": threads}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_no_number_of_threads_is_that_of_the_cores() -> None:
    done = started("")
    assert (done.returncode, done.stdout) == (0, f"{usable_cores()}\n"), done.stderr


@pytest.mark.parametrize("threads", ["abc", "2.5", "0", "-1"])
def test_what_is_no_number_of_threads_is_named(threads: str) -> None:
    done = started(threads)
    assert done.stderr.endswith(
        f"ValueError: TVM_NUM_THREADS is {threads!r}; it must be a whole number of at least 1\n"
    )
