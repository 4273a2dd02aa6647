"""``ramnet.compile``, ``use``, ``tune`` and ``export_onnx``, and user files that shadow a package."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import autotune.call
import export.onnx.build
import lowering
import ramnet

ROOT = Path(__file__).parents[2]
PACKAGES = ["schedules", "lowering", "autotune", "export"]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_they_are_the_functions_of_the_packages_that_do_the_work() -> None:
    assert ramnet.compile is lowering.compile
    assert ramnet.use is lowering.use
    assert ramnet.tune is autotune.call.tune
    assert ramnet.export_onnx is export.onnx.build.export_onnx


def test_a_program_imports_one_name(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import torch, ramnet\n"
        "model = ramnet.RamNetForCausalLM(ramnet.RamNetConfig.preset('tiny', num_layers=2))\n"
        "print(type(ramnet.compile(model)).__name__)\n"
    )
    done = run(tmp_path, "program.py")
    assert done.stdout == "CompiledRamNetForCausalLM\n", done.stderr


@pytest.mark.parametrize("package", ["ramnet", *PACKAGES])
def test_type_checkers_are_told_that_a_package_is_typed(package: str) -> None:
    assert files(package).joinpath("py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("kind", ["file", "package", "folder"])
def test_a_file_that_shadows_a_package_is_named(tmp_path: Path, package: str, kind: str) -> None:
    mine = tmp_path / f"{package}.py" if kind == "file" else tmp_path / package
    if kind != "file":
        mine.mkdir()
    if kind == "package":
        mine = mine / "__init__.py"
    if kind != "folder":
        mine.write_text("raise SystemExit('this file was run')")
    (tmp_path / "program.py").write_text("import ramnet\ntry:\n    ramnet.use\nexcept ImportError as e: print(e)")
    done = run(tmp_path, "program.py")
    installed = {"stderr": done.stderr, "stdout": done.stdout}
    if kind == "folder" and not done.stdout:
        return  # a package on the path takes precedence over a folder without __init__.py
    assert installed == {
        "stderr": "", "stdout": f"{mine} hides the package '{package}' of RAM-Net: rename it or move it elsewhere\n",
    }  # fmt: skip


def test_a_file_that_shadows_a_package_does_not_affect_the_rest(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text("mine = 1")
    (tmp_path / "program.py").write_text(
        "import export\n"
        "try: exec('from ramnet import *')\nexcept ImportError as refused: print(refused)\n"
        "import torch\nfrom ramnet import RamNetConfig, RamNetForCausalLM\n"
        "model = RamNetForCausalLM(RamNetConfig.preset('tiny'))\n"
        "print(export.mine, model(torch.zeros(1, 3, dtype=torch.int64)).logits.shape[1])"
    )
    done = run(tmp_path, "program.py")
    assert done.stdout == (
        f"{tmp_path}/export.py hides the package 'export' of RAM-Net: rename it or move it elsewhere\n1 3\n"
    ), done.stderr


def test_the_command_runs_no_file_of_the_current_folder(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text("raise SystemExit('this file was run')")
    done = run(tmp_path, "-m", "ramnet.cli", "targets", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")


def test_nor_do_processes_that_it_starts(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text("raise SystemExit('this file was run')")
    program = (
        "import subprocess, sys\nfrom ramnet.cli import main\nsys.argv = ['ramnet', '--version']\n"
        "try: main()\nfinally: subprocess.run([sys.executable, '-m', 'autotune.bench.cpu.decode_process'])"
    )
    done = run(tmp_path, "-c", program)
    assert "this file was run" not in done.stderr and "_main() missing 4 required positional arguments" in done.stderr
