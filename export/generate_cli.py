"""``ramnet generate``."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("text")
@click.option("--onnx", type=click.Path(path_type=Path), help="Directory of an export, run by onnxruntime.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Directory of a checkpoint, run by PyTorch.")
@click.option("--kernels", default="", help="Backend of the memory ops with --checkpoint, such as cpu.")
@click.option("--max-new-tokens", default=200, type=click.IntRange(min=0), show_default=True, help="Bytes to generate.")
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most probable byte.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k most probable bytes; 0 disables it.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the most probable bytes of this total.")
@click.option(
    "--min-p", default=0.0, show_default=True, help="Sample from bytes of at least this fraction of the largest one."
)
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    help="Above 1, bytes that have occurred are less probable.",
)
@click.option("--stop", multiple=True, help="Stop after generating this string; may be repeated.")
@click.option(
    "--seed", type=click.IntRange(-(2**63), 2**64 - 1), help="Seed of the sampling; without it every run differs."
)
def generate(  # noqa: PLR0913 - click hands over each option as a parameter
    text: str,
    onnx: Path | None,
    checkpoint: Path | None,
    kernels: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    seed: int | None,
) -> None:
    """Continue TEXT with a byte-level model, printing each byte as it is generated."""
    if (onnx is None) == (checkpoint is None):
        raise click.UsageError("give either --onnx DIR or --checkpoint DIR")
    if kernels and onnx is not None:
        raise click.UsageError("--kernels needs --checkpoint; an export runs on onnxruntime's kernels")
    if not text:
        raise click.UsageError("TEXT is empty; give at least one character to continue")
    from ramnet.config import BYTES
    from ramnet.generation.options import SamplingOptions, Stops

    # These raise before the model is read.
    options = SamplingOptions(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = Stops((), stop, None, BYTES)
    prompt = os.fsencode(text)  # the bytes of the command line, which need not be UTF-8
    say = _printer()
    if onnx is not None:
        import numpy as np

        from export.onnx.generate import generate as continuation
        from export.onnx.model import OnnxModel

        exported = OnnxModel(onnx)
        if exported.config.vocab_size != BYTES:
            raise ValueError(
                f"{onnx} has {exported.config.vocab_size} tokens; text needs a byte-level model, of {BYTES}"
            )
        say(prompt)
        for token in continuation(exported, np.array(list(prompt)), max_new_tokens, options, stops, seed):
            say(bytes([token]))
    else:
        assert checkpoint is not None
        import torch

        from ramnet import RamNetForCausalLM, ops
        from ramnet.training.checkpoint import check_of_bytes

        model = RamNetForCausalLM.from_pretrained(checkpoint)
        check_of_bytes(model.config, checkpoint)
        with ops.using(kernels):
            say(prompt)
            model.generate(
                torch.tensor([list(prompt)]), max_new_tokens, **asdict(options), stop=stop, seed=seed,
                streamer=lambda token: say(bytes([int(token[0])])),
            )  # fmt: skip
    say(b"\n")


def _printer() -> Callable[[bytes], None]:
    """Return a function that prints bytes as UTF-8 in any locale, each character when its last byte arrives.

    Invalid bytes are printed as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda data: click.echo(decoder.decode(data).encode(), nl=False)
