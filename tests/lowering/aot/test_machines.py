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
from export.c.session import CModel
from lowering.aot import build, machines
from lowering.aot.machines import TARGETS
from lowering.aot.schedules import schedules_of
from lowering.targets import cpu_features, cpu_name
from schedules import records
from schedules.cpu import MemoryStep
from schedules.of_model import of_layer
from schedules.records import Record, Time
from tests.lowering.aot.c_library import TINY, CLibrary, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

PROMPT = b"A text of more than thirty-two bytes, "
SMALL = TINY.model_copy(update={"intermediate_size": 0, "conv_layers": 0})  # compiles in half the time
# Each of these is compiled for once. The integer products of x86-64, rpi4, rpi5 and graviton3 differ.
PRECISIONS = {
    "x86-64-v3": "int8", "x86-64": "int4", "rpi4": "int4", "rpi5": "int8", "graviton": "float32", "graviton3": "int8",
}  # fmt: skip
# The numbers of instruction sets in an ELF header.
ELF = {"x86_64": 62, "aarch64": 183}
# What qemu imitates, without instructions that the machine does not have.
QEMU = {"rpi4": "cortex-a72", "rpi5": "cortex-a76", "graviton": "neoverse-n1", "graviton3": "max"}
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
X86_EMULATOR = shutil.which("qemu-x86_64")
PROGRAM = Path(export.__file__).parent / "examples" / "c" / "generate.c"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory)


class Sources:
    """What the library of each machine is made of."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self.of = cache(lambda name: self._write(name, folders.mktemp(name)))

    def _write(self, name: str, folder: Path) -> Path:
        build.write_sources(SMALL, folder, PRECISIONS[name], TARGETS[name])
        return folder


def test_a_library_has_the_schedules_of_this_machines_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAMNET_RECORDS", str(tmp_path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "none")
    (kind,) = SMALL.kinds
    workload = next(each for each in of_layer(kind) if each.op == "memory_step")
    time = Time(median=1e-6, spread=0.0, runs=9)
    key, host = build._key(SMALL, "int8", build.LOOPS), machines.host()
    for device, tile in (("Another", 2), (cpu_name(), 4)):
        knobs = MemoryStep(tile=tile, unroll=1, parallel=False, prefetch=0).model_dump()
        records.merge(records.records_path("cpu"), [Record(
            workload=workload, target="cpu", device=device, knobs=knobs, how="measured", gain=1.0, gain_spread=0.0,
            tuned=time, default=time, trials=1, fingerprint="", versions={}, date="2026-01-01",
        )])  # fmt: skip
        assert schedules_of(kind, host).step.tile == tile
        assert build._key(SMALL, "int8", build.LOOPS) != key
        key = build._key(SMALL, "int8", build.LOOPS)


@pytest.mark.parametrize("name", PRECISIONS)
def test_an_object_is_for_its_machine(name: str, sources: Sources) -> None:
    for machine in TARGETS[name]:
        kernels = (sources.of(name) / f"{machine.symbol}.o").read_bytes()
        assert kernels[:4] == b"\x7fELF"
        assert int.from_bytes(kernels[18:20], "little") == ELF[machine.llvm["mtriple"].partition("-")[0]]


def test_products_of_several_tokens_use_i8mm(sources: Sources) -> None:
    def has_smmla(name: str) -> bool:
        words = np.frombuffer((sources.of(name) / f"{name}.o").read_bytes(), "<u4", offset=64)
        return bool((words & 0xFFE0FC00 == 0x4E80A400).any())

    assert has_smmla("graviton3") and not has_smmla("rpi5")


@pytest.mark.skipif("avx2" not in cpu_features(), reason="it runs code of x86-64-v3")
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64"])
def test_integer_sums_are_the_same_on_all_processors(name: str, sources: Sources, tmp_path: Path) -> None:
    """Sums of integers are exact, and what surrounds them differs in the order of float32 additions only."""
    precision = PRECISIONS[name]
    library = CLibrary(model_of(SMALL), tmp_path, precision)
    build.link(sources.of(name), tmp_path / "other.so")
    other = CLibrary(model_of(SMALL), tmp_path, precision, path=tmp_path / "other.so")
    ids = ids_of(40, SMALL.vocab_size)
    expected, found = (each.tokens(each.state(), ids, 40) for each in (library, other))
    assert np.median(np.abs(found - expected)) < 1e-5 * np.abs(expected).max()


def text_after(library: CLibrary, prompt: bytes) -> bytes:
    """Return the prompt and the 20 bytes that the program writes after it, and an end of line."""
    state, text = library.state(), bytearray(prompt)
    logits = library.tokens(state, np.array([*prompt], np.int32), 1)[0]
    for _ in range(20):
        text.append(int(logits.argmax()))
        logits = library.token(state, text[-1])
    return bytes(text) + b"\n"


@pytest.mark.skipif(X86_EMULATOR is None or platform.machine() != "x86_64", reason="it needs Debian's qemu-user")
def test_one_library_runs_on_several_processors(sources: Sources, tmp_path: Path) -> None:
    """qemu imitates no AVX-512: with Haswell's instructions, the kernels of x86-64-v3 run. Nehalem has no AVX2."""
    library = CLibrary(model_of(SMALL), tmp_path, PRECISIONS["x86-64"])
    folder, program = sources.of("x86-64"), tmp_path / "generate"
    strict = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-static")
    command = [*build.compiler(), *strict, f"-I{folder}", "-o", program, PROGRAM, *build.parts(folder), "-lm"]
    subprocess.run(command, check=True)
    call = [program, library.weights, PROMPT, "20"]
    want = text_after(library, PROMPT)
    for run in (call, [str(X86_EMULATOR), "-cpu", "Haswell", *call]):
        assert subprocess.run(run, capture_output=True, check=True).stdout == want
    done = subprocess.run([str(X86_EMULATOR), "-cpu", "Nehalem", *call], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the library needs a CPU with avx2, bmi2, fma, which this one lacks\n"


def test_the_first_kernels_are_taken_that_the_processor_can_run(tmp_path: Path) -> None:
    sets = {"best": "ab", "good": "a", "plain": "cd"}
    needs = {name: " ".join(f'NEEDS("{each}", getenv("{each}"))' for each in of) for name, of in sets.items()}
    (tmp_path / "config.h").write_text(
        "#include <stdlib.h>\n#define KERNELS(KERNEL, set) KERNEL(set, run)\n"
        f"#define SETS {' '.join(f'SET({name}, {of})' for name, of in needs.items())}\n"
    )
    functions = "".join(
        f"int __tvm_ffi_ramnet_{name}_run(void* s, const argument* a, int32_t c, argument* r)"
        f' {{ (void)s, (void)a, (void)c, (void)r; return puts("{name}"), 0; }}\n'
        for name in sets
    )
    main = "int main(void) { return choose_kernels() ? puts(ramnet_message()), 1 : CALL(run, I(0)); }\n"
    (tmp_path / "main.c").write_text(f'#include <stdio.h>\n#include "kernels.h"\n{functions}{main}')
    sources = [tmp_path / "main.c", *(build.RUNTIME / name for name in ("cpu.c", "kernels.c"))]
    include = [f"-I{folder}" for folder in (tmp_path, build.RUNTIME)]
    subprocess.run([*build.compiler(), "-std=c11", *include, "-o", tmp_path / "main", *sources], check=True)

    def run(has: str) -> str:
        return subprocess.run([tmp_path / "main"], env=dict.fromkeys(has, "1"), stdout=-1, text=True).stdout.strip()

    assert [run(has) for has in ("abcd", "acd", "ab", "bcd")] == ["best", "good", "best", "plain"]
    assert run("bd") == "the library needs a CPU with c, which this one lacks"
    assert run("b") == "the library needs a CPU with c, d, which this one lacks"


def test_a_library_for_another_processor_is_refused_in_python(sources: Sources, tmp_path: Path) -> None:
    folder = sources.of("x86-64-v3")
    shutil.copytree(folder, tmp_path / "other")
    config = tmp_path / "other" / "config.h"
    config.write_text(config.read_text().replace('__builtin_cpu_supports("avx2")', "0"))
    build.link(tmp_path / "other", tmp_path / "other.so")
    with pytest.raises(OSError, match=r"^the library needs a CPU with avx2, which this one lacks$"):
        CModel(tmp_path / "other.so", tmp_path / "weights.safetensors")


@pytest.mark.parametrize("compiler", [build.compiler()[0], CROSS, shutil.which("clang")])
def test_compilers_know_every_feature(compiler: str | None, tmp_path: Path) -> None:
    if compiler is None:
        pytest.skip("the compiler is not installed")
    features = machines._USED["aarch64" if compiler == CROSS else platform.machine()]
    needs = " ".join(f'NEEDS("{each}", {machines.condition(each)})' for each in features)
    (tmp_path / "config.h").write_text(f"#define KERNELS(KERNEL, set)\n#define SETS SET(all, {needs})\n")
    include = [f"-I{folder}" for folder in (tmp_path, build.RUNTIME)]
    subprocess.run([compiler, "-fsyntax-only", *include, build.RUNTIME / "cpu.c"], check=True)


@pytest.mark.skipif(
    CROSS is None or EMULATOR is None,
    reason="it needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user",
)
@pytest.mark.parametrize("name", QEMU)
def test_the_program_writes_the_same_text_on_arm(name: str, sources: Sources, tmp_path: Path) -> None:
    model = model_of(SMALL)
    library = CLibrary(model, tmp_path, PRECISIONS[name])
    text = text_after(library, PROMPT)
    if PRECISIONS[name] == "float32":
        with torch.no_grad():
            generated = model.generate(torch.tensor([[*PROMPT]]), 20, temperature=0)
        assert bytes(generated[0].tolist()) in text
    folder, program = sources.of(name), tmp_path / "generate"
    parts = [PROGRAM, *build.parts(folder)]
    strict = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-static")
    subprocess.run([str(CROSS), *strict, f"-I{folder}", "-o", program, *parts, "-lm"], check=True)
    run = [str(EMULATOR), "-cpu", QEMU[name], program, library.weights, PROMPT, "20"]
    assert subprocess.run(run, capture_output=True, check=True).stdout == text
