"""Collects what a machine with a GPU, and without a network, lacks: ``make gpu-kit`` fills ``build/gpu-kit/``.

The folder has parts, so that each can be copied by itself:

- ``1``: wheels, the binaries of TIR's kernels, the modelled time of every schedule, and ``install.sh``.
- ``2`` and ``3``: TVM, which is needed only to compile TIR's kernels there. ``install.sh`` also installs these parts if
  they are beside it.

What the machine has is listed in ``THERE``.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import click

from autotune.bench.gpu import kit_kernels
from ramnet.cli import main
from ramnet.files import write_text_atomic
from ramnet.processes import usable_cores

ROOT = Path(__file__).resolve().parents[3]
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
# Their versions are in constraints.txt.
PACKAGES = (
    "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions", "click", "platformdirs",
    "optuna", "alembic", "SQLAlchemy", "Mako", "MarkupSafe", "colorlog", "tqdm", "PyYAML", "packaging",
)  # fmt: skip
# What the benchmark compares with. The package flash-linear-attention is not needed: it only adds models to fla-core.
OTHERS = ("fla-core==0.6.0", "einops==0.8.2")
TVM = ("apache-tvm-ffi", "apache-tvm")
# The machine has torch 2.11 and Triton 3.6 or later, and these.
THERE = {
    "torch", "triton", "numpy", "safetensors", "rich", "matplotlib", "scikit-learn", "psutil", "pytest",
    "pytest-xdist", "hypothesis", "cloudpickle", "ml-dtypes",
}  # fmt: skip
MOST_BYTES = 60 << 20
# TVM's parts without sources that only compiling TVM needs.
LEFT_OUT = ("tvm/3rdparty/",)

INSTALL = """#!/bin/sh
# Installs the kit into the folder FOLDER and prints the settings of a shell: eval "$(sh install.sh FOLDER)".
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${RAMNET_PYTHON:-python3}
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \\
  --root-user-action=ignore --upgrade --target "$folder/site" "$here"/wheels/*.whl >&2
mkdir -p "$folder/cache"
cp -r "$here/kernels" "$folder/cache/"
chmod -R go= "$folder/cache"
cp "$here/modelled.json" "$folder/"
if [ -e "$here/../2/tvm.tar.xz.0" ] && [ -e "$here/../3/tvm.tar.xz.1" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \\
    --root-user-action=ignore --upgrade --target "$folder/site" "$here"/../2/*.whl >&2
  cat "$here/../2/tvm.tar.xz.0" "$here/../3/tvm.tar.xz.1" > "$folder/tvm.tar.xz"
  "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \\
    "$folder/tvm.tar.xz" "$folder/site" >&2
fi
echo "export PYTHONPATH='$folder/site' RAMNET_CACHE='$folder/cache' RAMNET_MODELLED='$folder/modelled.json'"
"""


class IncompleteError(RuntimeError):
    """The kit cannot be made; the message says what is missing."""


def pinned(name: str, constraints: str) -> str:
    """Return NAME==VERSION. Raises IncompleteError if the constraints do not have it."""
    found = re.search(rf"^{re.escape(name)}==\S+$", constraints, re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise IncompleteError(f"constraints.txt has no version of {name}, which the kit needs")
    return found[0]


def download(requirements: Sequence[str], folder: Path) -> None:
    """Download wheels for the machine's Python. Raises IncompleteError, with pip's last line, if one is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--implementation", "cp", "--python-version", PYTHON, *(f"--platform={name}" for name in PLATFORMS),
        "--dest", str(folder), *requirements,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise IncompleteError(f"pip cannot download {' '.join(requirements)}: {said[-1] if said else 'it failed'}")


def lacking(wheels: Sequence[Path], there: set[str]) -> dict[str, str]:
    """Return what the wheels need that neither they nor ``there`` provide, with the wheel that needs it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename

    provided = {canonicalize_name(name) for name in there} | {parse_wheel_filename(path.name)[0] for path in wheels}
    machine = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3", "sys_platform": "linux", "extra": "",
               "platform_machine": "x86_64", "platform_system": "Linux", "os_name": "posix",
               "implementation_name": "cpython", "platform_python_implementation": "CPython"}  # fmt: skip
    found = {}
    for path in wheels:
        for line in _metadata(path).splitlines():
            if line.startswith("Requires-Dist:"):
                needed = Requirement(line.partition(":")[2].strip())
                if needed.marker is None or needed.marker.evaluate(machine):
                    found[canonicalize_name(needed.name)] = path.name
    return {name: path for name, path in found.items() if name not in provided}


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(name).decode().partition("\n\n")[0]


def compress(wheel: Path, first: Path, second: Path) -> None:
    """Write a wheel's files as tar.xz, cut into two files of equal size."""
    with tempfile.TemporaryDirectory() as place:
        packed = Path(place) / "wheel.tar.xz"
        with zipfile.ZipFile(wheel) as archive, lzma.open(packed, "wb", preset=6) as out, \
                tarfile.open(fileobj=out, mode="w") as tar:  # fmt: skip
            for entry in archive.infolist():
                if not entry.is_dir() and not entry.filename.startswith(LEFT_OUT):
                    member = tarfile.TarInfo(entry.filename)
                    member.size = entry.file_size
                    with archive.open(entry) as file:
                        tar.addfile(member, file)
        content = packed.read_bytes()
    half = -(-len(content) // 2)
    for path, part in ((first, content[:half]), (second, content[half:])):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)


def require_small(folder: Path) -> None:
    """Print the size of each part. Raises IncompleteError if one is too large."""
    for part in (folder / name for name in "123"):
        size = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
        click.echo(f"{part}: {size / 2**20:.1f} MiB")
        if size > MOST_BYTES:
            raise IncompleteError(f"{part} has {size} bytes; a part may have {MOST_BYTES}")


def make(folder: Path, with_tvm: bool, jobs: int) -> None:
    """Fill the kit. What is there from an earlier call and did not change is not made again."""
    constraints = (ROOT / "constraints.txt").read_text()
    first, second, third = (folder / name for name in "123")
    wheels = first / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    download([*(pinned(name, constraints) for name in PACKAGES), *OTHERS], wheels)
    for name, needs in lacking(sorted(wheels.glob("*.whl")), THERE).items():
        raise IncompleteError(f"{needs} needs {name}, which neither the kit nor the machine has")
    write_text_atomic(first / "install.sh", INSTALL)
    kit_kernels.fill(first / "kernels", first / "modelled.json", folder / "cache", jobs)
    version = pinned(TVM[1], constraints)
    stamp = folder / "tvm.txt"
    if with_tvm and not (stamp.is_file() and stamp.read_text() == version):
        for part in (second, third):
            shutil.rmtree(part, ignore_errors=True)
        with tempfile.TemporaryDirectory() as place:
            download([version], Path(place))
            (wheel,) = Path(place).glob("*.whl")
            click.echo(f"compressing {wheel.name}, which takes minutes")
            compress(wheel, second / "tvm.tar.xz.0", third / "tvm.tar.xz.1")
        download([pinned(TVM[0], constraints)], second)
        write_text_atomic(stamp, version)
    require_small(folder)


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("build/gpu-kit"))
@click.option("--tvm/--no-tvm", "with_tvm", default=True, help="Also pack TVM.")
@click.option("--jobs", type=click.IntRange(1, 64), default=usable_cores(), help="Kernels compiled at a time.")
def kit(output: Path, with_tvm: bool, jobs: int) -> None:
    """Collect what a machine with a GPU and without a network lacks."""
    output.mkdir(parents=True, exist_ok=True)
    make(output, with_tvm, jobs)


if __name__ == "__main__":
    main(kit)
