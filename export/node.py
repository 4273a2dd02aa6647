"""Runs a model that was exported for browsers in Node."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.manifest import Speed
from export.samples import TOKENS
from lowering.targets import cpu_name


def logits(directory: Path, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the logits, [T, V], after each of T ids. Half of them are read one by one, and the others as a block.

    Raises ValueError if the model does not run, and OSError if there is no Node.
    """
    found = _run(
        directory,
        f"""
        const ids = {json.dumps(ids.tolist())}, half = ids.length >> 1;
        const parts = ids.slice(0, half).map((id) => model.token(state, id).slice());
        parts.push(model.tokens(state, ids.slice(half), ids.length - half));
        for (const x of parts) process.stdout.write(Buffer.from(x.buffer, x.byteOffset, x.byteLength));
        """,
    )
    return np.frombuffer(found, np.float32).reshape(len(ids), -1)


# Logits that one process of Node returns at most, if there are several windows: 64 MB.
_AT_ONCE = 1 << 24


def of_windows(directory: Path, ids: NDArray[np.int64], vocabulary: int) -> Iterator[NDArray[np.float32]]:
    """Yield the logits [L, V] after each token of each window of ``ids`` [N, L]. Raises what ``logits`` does."""
    count, length = ids.shape
    for part in np.array_split(ids, -(-count // max(1, _AT_ONCE // (length * vocabulary)))):
        found = _run(
            directory,
            f"""
            for (const ids of {json.dumps(part.tolist())}) {{
              state.reset();
              const x = model.tokens(state, ids, ids.length);
              process.stdout.write(Buffer.from(x.slice().buffer));
            }}
            """,
        )
        yield from np.frombuffer(found, np.float32).reshape(len(part), length, vocabulary)


def speed(directory: Path) -> Speed:
    """Time tokens. Raises what ``logits`` does."""
    found = _run(
        directory,
        f"""
        const seconds = [];
        for (let i = 0; i < {TOKENS}; i++) {{
          const start = performance.now();
          model.token(state, i % model.vocabularySize);
          seconds.push((performance.now() - start) / 1e3);
        }}
        process.stdout.write(JSON.stringify(seconds));
        """,
    )
    return Speed(token_seconds=statistics.median(json.loads(found)), threads=1, processor=f"{cpu_name()}, in Node")


def _run(directory: Path, script: str) -> bytes:
    """Return what a script prints that has a ``model`` and a ``state``."""
    node = shutil.which("node")
    if node is None:
        raise OSError("node is not installed; it runs the WebAssembly module")
    module = (directory / "ramnet.js").resolve().as_uri()
    begin = f"""
        import {{ load }} from {json.dumps(module)};
        const model = await load({json.dumps(str(directory.resolve()))}), state = model.state();
    """
    # From standard input, since an argument is at most 128 KB long.
    done = subprocess.run([node, "--input-type=module", "-"], input=(begin + script).encode(), capture_output=True)
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if "Error" in line]
        raise ValueError(f"the model does not run in Node: {lines[0] if lines else done.returncode}")
    return done.stdout
