"""The example program in C, compiled with sanitizers, writes the text that PyTorch generates."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import export
from lowering.aot import build
from tests.lowering.aot.c_library import TINY, CLibrary, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

PROGRAM = Path(export.__file__).parent / "examples" / "c" / "generate.c"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def test_the_program_writes_what_pytorch_generates(tmp_path: Path) -> None:
    model = model_of(TINY)
    weights = CLibrary(model, tmp_path).weights
    build.write_sources(TINY, tmp_path)
    program = tmp_path / "generate"
    strict = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pthread", *SANITIZERS)
    parts = [PROGRAM, *sorted(tmp_path.glob("*.c")), tmp_path / build.KERNELS]
    subprocess.run([build.compiler(), *strict, f"-I{tmp_path}", "-o", program, *parts, "-lm"], check=True)

    prompt = b"A text of more than thirty-two bytes, "
    ids = torch.tensor([list(prompt)])
    want = bytes(model.generate(ids, 20, temperature=0)[0].tolist())
    done = subprocess.run([program, weights, prompt, "20"], capture_output=True, check=True)
    assert done.stdout == (want if want.startswith(prompt) else prompt + want) + b"\n"

    wrong = subprocess.run([program, PROGRAM, b"text", "20"], capture_output=True)
    assert wrong.returncode == 1
    assert wrong.stderr.count(b"\n") == 1 and b"generate.c is not a safetensors file" in wrong.stderr


def test_the_program_is_short() -> None:
    assert len(PROGRAM.read_text(encoding="utf-8").splitlines()) < 100
