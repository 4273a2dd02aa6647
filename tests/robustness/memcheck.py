"""Runs the op tests on the CPU kernels under valgrind's memcheck, which finds accesses out of bounds and branches on
uninitialised memory.

    python -m tests.robustness.memcheck

A first run of the tests without valgrind builds the kernels for x86-64-v3, whose instructions valgrind supports. Then
memcheck's findings in the kernels are printed; those in Python and torch are ignored. Takes some minutes, and exits
with 1 if there are findings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

TESTS = [f"tests/ramnet/test_ops_{op}.py" for op in ("address_decode", "memory_scan", "memory_step")]
PROCESSOR = "x86-64-v3"


class ForValgrind:
    """A pytest plugin: builds kernels for ``PROCESSOR`` and leaves uninitialised memory as it is."""

    @pytest.fixture(autouse=True)
    def _built_for_valgrind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        monkeypatch.setattr("lowering.cpu.build.processor", lambda: PROCESSOR)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def main() -> int:
    """Run the tests twice and print the findings."""
    if shutil.which("valgrind") is None:
        print("memcheck needs valgrind, which is not installed: apt install valgrind")
        return 1
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.xml"
        environment = os.environ | {
            "RAMNET_CACHE": place, "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.robustness.memcheck", "run"]
        valgrind = ["valgrind", "--quiet", "--error-limit=no", "--xml=yes", f"--xml-file={found}"]
        for watched in ([], valgrind):
            if subprocess.run([*watched, *command], env=environment, check=False).returncode:
                print("the tests failed" + (" under valgrind" if watched else ""))
                return 1
        errors = ElementTree.parse(found).getroot().findall("error")
        of_kernels = [error for error in errors if _objects(error) & {str(x) for x in Path(place).rglob("*.so")}]
        print(f"{len(of_kernels)} findings in kernels, {len(errors) - len(of_kernels)} elsewhere")
        for error in of_kernels:
            print(ElementTree.tostring(error, encoding="unicode"))
        return 1 if of_kernels else 0


def _objects(error: ElementTree.Element) -> set[str]:
    """The files whose code was running, the innermost first, down to a kernel's caller."""
    return {frame.text or "" for frame in error.iter("obj")}


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "cpu", *TESTS], plugins=[ForValgrind()]))
    sys.exit(main())
