"""Fuzzes the C library with damaged files under sanitizers: ``python -m tests.robustness.c_files SECONDS``.

It reads two kinds of files, weights and states; ``ramnet.json`` is read by Python and JavaScript only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lowering.aot import build, weights
from tests.lowering.aot.c_library import TINY, CLibrary, model_of

_SOURCE = Path(__file__).with_name("c_files.c")
# Files that a fuzzer can get through, of a model with every kind of tensor.
_SMALL = TINY.model_copy(
    update={
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "value_dim": 8,
        "intermediate_size": 8,
        "vocab_size": 4,
        "cape_full_layers": 1,
        "cape_half_layers": 0,
    }
)


def fuzz(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Build the fuzzer in ``folder`` and run it with these options of libFuzzer."""
    model, checked, state = model_of(_SMALL), folder / "checked", folder / "state"
    library = CLibrary(model, folder)
    library.call("state_save", library.state(), str(state).encode())
    weights.save(checked, weights.stored(model.state_dict(), _SMALL, "float32"), _SMALL)
    seeds = folder / "seeds"
    seeds.mkdir()
    # Weights without a checksum, too, so that altered ones are read.
    for kind, path in ((b"\0", library.weights), (b"\0", checked), (b"\1", state)):
        (seeds / path.name).write_bytes(kind + path.read_bytes())
    build.write_sources(_SMALL, folder)
    program = folder / "fuzz"
    flags = ("-std=c11", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-pthread")
    parts = [_SOURCE, *build.parts(folder)]
    subprocess.run(["clang", *flags, f"-I{folder}", "-o", program, *parts, "-lm"], check=True)
    largest = max(path.stat().st_size for path in seeds.iterdir())
    command = [program, f"-max_len={2 * largest}", *options, seeds]
    environment = {**os.environ, "FUZZ_WEIGHTS": str(library.weights)}
    return subprocess.run(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, errors="replace")


def _main(seconds: str) -> int:
    with tempfile.TemporaryDirectory(prefix="ramnet-") as folder:
        done = fuzz(Path(folder), f"-max_total_time={int(seconds)}")
    sys.stderr.write("\n".join(done.stderr.splitlines()[-40:]) + "\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
