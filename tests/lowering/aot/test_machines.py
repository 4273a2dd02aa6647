"""A token is compiled for other processors than this one; what can run here gives the same numbers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from lowering.aot import build
from lowering.aot.machines import MACHINES, host
from lowering.targets import cpu_features
from tests.lowering.aot.c_library import TINY, CLibrary, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

SMALL = TINY.model_copy(update={"intermediate_size": 0, "conv_layers": 0})  # compiles in half the time
# Each machine is compiled for once. The integer products of x86-64-v3 and v4, of rpi4, and of rpi5 and graviton differ.
PRECISIONS = {"x86-64-v3": "int8", "x86-64-v4": "int4", "rpi4": "int4", "rpi5": "int8", "graviton": "float32"}
# The numbers of instruction sets in an ELF header.
ELF = {"x86_64": 62, "aarch64": 183}
# What qemu imitates, without instructions that the machine does not have.
QEMU = {"rpi4": "cortex-a72", "rpi5": "cortex-a76", "graviton": "neoverse-n1"}
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
PROGRAM = Path(export.__file__).parent / "examples" / "c" / "generate.c"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory)


class Sources:
    """What the library of each machine is made of."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.of = cache(lambda name: self._write(name, folders.mktemp(name)))

    def _write(self, name: str, folder: Path) -> Path:
        build.write_sources(SMALL, folder, PRECISIONS[name], MACHINES[name])
        return folder


@pytest.mark.parametrize("name", MACHINES)
def test_an_object_is_for_its_machine(name: str, sources: Sources) -> None:
    kernels = (sources.of(name) / build.KERNELS).read_bytes()
    assert kernels[:4] == b"\x7fELF"
    assert int.from_bytes(kernels[18:20], "little") == ELF[MACHINES[name].llvm["mtriple"].partition("-")[0]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64-v3 and v4 run on x86-64")
@pytest.mark.parametrize(("name", "feature"), [("x86-64-v3", "avx2"), ("x86-64-v4", "avx512vl")])
def test_integer_sums_are_the_same_on_all_processors(name: str, feature: str, sources: Sources, tmp_path: Path) -> None:
    """Sums of integers are exact, and what surrounds them differs in the order of float32 additions only."""
    if feature not in cpu_features():
        pytest.skip(f"{name} needs {feature}")
    precision = PRECISIONS[name]
    library = CLibrary(model_of(SMALL), tmp_path, precision)
    build.link(sources.of(name), tmp_path / "other.so")
    other = CLibrary(model_of(SMALL), tmp_path, precision, path=tmp_path / "other.so")
    assert host().dot.offset or host().dot == MACHINES["x86-64-v3"].dot
    ids = ids_of(40, SMALL.vocab_size)
    expected, found = (each.tokens(each.state(), ids, 40) for each in (library, other))
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()


@pytest.mark.skipif(
    CROSS is None or EMULATOR is None,
    reason="it needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user",
)
@pytest.mark.parametrize("name", QEMU)
def test_the_program_writes_the_same_text_on_arm(name: str, sources: Sources, tmp_path: Path) -> None:
    model, prompt = model_of(SMALL), b"A text of more than thirty-two bytes, "
    library = CLibrary(model, tmp_path, PRECISIONS[name])
    state, text = library.state(), bytearray(prompt)
    logits = library.tokens(state, np.array([*prompt], np.int32), 1)[0]
    for _ in range(20):
        text.append(int(logits.argmax()))
        logits = library.token(state, text[-1])
    if PRECISIONS[name] == "float32":
        with torch.no_grad():
            generated = model.generate(torch.tensor([[*prompt]]), 20, temperature=0)
        assert bytes(generated[0].tolist()) in bytes(text)
    folder, program = sources.of(name), tmp_path / "generate"
    parts = [PROGRAM, *sorted(folder.glob("*.c")), folder / build.KERNELS]
    strict = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-static")
    subprocess.run([str(CROSS), *strict, f"-I{folder}", "-o", program, *parts, "-lm"], check=True)
    run = [str(EMULATOR), "-cpu", QEMU[name], program, library.weights, prompt, "20"]
    assert subprocess.run(run, capture_output=True, check=True).stdout == bytes(text) + b"\n"
