"""The example program in C, compiled with sanitizers, writes the text that PyTorch generates."""

from __future__ import annotations

import subprocess
from pathlib import Path
from random import Random

import pytest
import torch

import export
from lowering.aot import build
from tests.lowering.aot.c_library import OTHER_SIZES, CLibrary, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

PROGRAM = Path(export.__file__).parent / "examples" / "c" / "generate.c"
CONFIG = OTHER_SIZES.model_copy(update={"vocab_size": 256})
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the library of the model is made of."""
    folder = tmp_path_factory.mktemp("sources")
    build.write_sources(CONFIG, folder)
    return folder


def compiled(source: Path, folder: Path) -> Path:
    """Compile a program with the library and sanitizers; warnings are errors."""
    program = folder / source.stem
    strict = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", *SANITIZERS)
    parts = [source, *build.parts(folder)]
    subprocess.run([*build.compiler(), *strict, f"-I{folder}", "-o", program, *parts, "-lm"], check=True)
    return program


def test_the_program_writes_what_pytorch_generates(sources: Path, tmp_path: Path) -> None:
    model = model_of(CONFIG)
    weights = CLibrary(model, tmp_path).weights
    program = compiled(PROGRAM, sources)
    prompt = b"A text of more than thirty-two bytes, "
    ids = torch.tensor([list(prompt)])
    want = bytes(model.generate(ids, 20, temperature=0)[0].tolist())
    done = subprocess.run([program, weights, prompt, "20"], capture_output=True, check=True)
    assert done.stdout == (want if want.startswith(prompt) else prompt + want) + b"\n"

    wrong = subprocess.run([program, PROGRAM, b"text", "20"], capture_output=True)
    assert wrong.returncode == 1
    assert wrong.stderr.count(b"\n") == 1 and b"generate.c is not a safetensors file" in wrong.stderr


def test_damaged_states_neither_crash_nor_leak(sources: Path, tmp_path: Path) -> None:
    library = CLibrary(model_of(CONFIG), tmp_path)
    library.call("state_save", library.state(), str(tmp_path / "good").encode())
    good = (tmp_path / "good").read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    random = Random(0)
    files = []
    for i in range(400):
        damaged = bytearray(good)
        for _ in range(random.choice((1, 1, 2, 8))):
            # One byte of the header, replaced by any byte or by one that means something there.
            damaged[random.randrange(header)] = random.choice((random.randrange(256), *b'0123456789"[]{}:,\\'))
        if i % 8 == 0:
            del damaged[random.randrange(len(good)) :]
        files.append(tmp_path / f"state{i}")
        files[-1].write_bytes(damaged)
    program = compiled(Path(__file__).with_name("load_states.c"), sources)
    done = subprocess.run([program, library.weights, *files, tmp_path / "good"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 <= int(done.stdout) < 100, "nearly all damaged headers are refused"


def test_the_program_is_short() -> None:
    assert len(PROGRAM.read_text(encoding="utf-8").splitlines()) < 100
