"""Compares an export with its model in a process of its own, which the code of its library may crash."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from export.onnx import verify
from export.process import environment
from ramnet import RamNetForCausalLM

_COMMAND = ("-m", "export.onnx.apart")


def compare(model: RamNetForCausalLM, directory: Path) -> Iterator[verify.Check]:
    """Yield the checks of ``verify.compare`` on the export in ``directory``.

    Raises RuntimeError if the process fails, for example because a kernel crashes.
    """
    with tempfile.TemporaryDirectory(prefix="ramnet-") as checkpoint:
        model.save_pretrained(checkpoint)
        command = [sys.executable, *_COMMAND, checkpoint, str(directory)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    yield verify.Check(**json.loads(line))
            except BaseException:  # whoever reads the checks may stop early
                process.kill()
                raise
            if process.wait():
                errors.seek(0)
                last = errors.read().strip().rpartition("\n")[2]
                raise RuntimeError(f"the process that checks the export ended with {process.returncode}: {last}")


def main(checkpoint: str, directory: str) -> None:
    """Print the checks as lines of JSON."""
    from export.onnx.session import OnnxSession

    model = RamNetForCausalLM.from_pretrained(checkpoint).eval()
    for check in verify.compare(model, OnnxSession(directory)):
        print(json.dumps(asdict(check)), flush=True)  # noqa: T201 - what this process is for


if __name__ == "__main__":
    main(*sys.argv[1:])
