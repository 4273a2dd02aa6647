"""A token is compiled for other processors than this one; what can run here gives the same numbers."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

from lowering.aot import build
from lowering.aot.machines import MACHINES, host
from lowering.targets import cpu_features
from tests.lowering.aot.c_library import TINY, CLibrary, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

SMALL = TINY.model_copy(update={"intermediate_size": 0, "conv_layers": 0})  # compiles in half the time
# The numbers of instruction sets in an ELF header.
ELF = {"x86_64": 62, "aarch64": 183}


@pytest.mark.parametrize("name", MACHINES)
def test_an_object_is_for_its_machine(name: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    build.write_sources(SMALL, tmp_path, "int8", machine)
    kernels = (tmp_path / build.KERNELS).read_bytes()
    assert kernels[:4] == b"\x7fELF"
    assert int.from_bytes(kernels[18:20], "little") == ELF[machine.llvm["mtriple"].partition("-")[0]]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not {"avx2", "fma"} <= cpu_features(), reason="x86-64-v3 needs AVX2"
)
def test_integer_sums_are_the_same_with_and_without_dot_products(tmp_path: Path) -> None:
    """Sums of integers are exact, and what surrounds them differs in the order of float32 additions only."""
    library = CLibrary(model_of(SMALL), tmp_path, "int8")
    build.write_sources(SMALL, tmp_path, "int8", MACHINES["x86-64-v3"])
    build.link(tmp_path, tmp_path / "v3.so")
    plain = CLibrary(model_of(SMALL), tmp_path, "int8", path=tmp_path / "v3.so")
    assert host().dot.intrinsic or host().dot == MACHINES["x86-64-v3"].dot
    ids = ids_of(40, SMALL.vocab_size)
    expected, found = (each.tokens(each.state(), ids, 40) for each in (library, plain))
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()
