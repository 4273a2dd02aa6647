"""``ramnet generate``."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ramnet.config import RamNetConfig
    from ramnet.training.tokens import Tokenizer


@click.command()
@click.argument("text")
@click.option("--onnx", type=click.Path(path_type=Path), help="Directory of an export, run by onnxruntime.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Directory of a checkpoint, run by PyTorch.")
@click.option("--kernels", default="", help="Backend of the memory ops with --checkpoint, such as cpu.")
@click.option(
    "--max-new-tokens",
    default=200,
    type=click.IntRange(min=0),
    show_default=True,
    help="Tokens to generate; of a byte-level model, bytes.",
)
@click.option("--temperature", default=0.8, show_default=True, help="0 takes the most probable token.")
@click.option("--top-k", default=0, show_default=True, help="Sample from the k most probable tokens; 0 disables it.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from the most probable tokens of this total.")
@click.option(
    "--min-p", default=0.0, show_default=True, help="Sample from tokens of at least this fraction of the largest one."
)
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    help="Above 1, tokens that have occurred are less probable.",
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
    """Continue TEXT, printing each token as it is generated.

    Tokens are bytes, or those of the tokenizer that a checkpoint was trained with.
    """
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

        model = RamNetForCausalLM.from_pretrained(checkpoint)
        tokenizer = _tokenizer(model.config, checkpoint)
        ids, decode, continued = list(prompt), None, None
        if tokenizer is not None:
            (ids,) = tokenizer.encode([text])
            if not ids:
                raise ValueError(f"TEXT {text!r} has no tokens of {checkpoint}; give other text to continue")
            decode, continued = _after(tokenizer, ids), tokenizer.stream(ids)

        def shown(token: int) -> bytes:
            return bytes([token]) if continued is None else continued(token).encode(errors="replace")

        with ops.using(kernels):
            say(prompt)
            model.generate(
                torch.tensor([ids], dtype=torch.int64), max_new_tokens, **asdict(options), stop=stop, seed=seed,
                decode=decode, streamer=lambda token: say(shown(int(token[0]))),
            )  # fmt: skip
    say(b"\n")


def _after(tokenizer: Tokenizer, prompt: list[int]) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes tokens after a prompt, as some tokenizers leave out the first token's space."""
    begun = len(tokenizer.decode(prompt))
    return lambda tokens: tokenizer.decode([*prompt, *tokens])[begun:]


def _tokenizer(config: RamNetConfig, checkpoint: Path) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint (``tokenizer_of``); None for bytes.

    Raises ValueError if it is not known, or cannot be read.
    """
    from ramnet.config import BYTES
    from ramnet.training.checkpoint import tokenizer_of
    from ramnet.training.tokens import Tokenizer

    path = tokenizer_of(checkpoint)
    if path is not None:
        return Tokenizer(path, config.vocab_size)
    if config.vocab_size != BYTES:
        raise ValueError(f"{checkpoint} has {config.vocab_size} tokens, and no tokenizer.json for text; put it there")
    return None


def _printer() -> Callable[[bytes], None]:
    """Return a function that prints bytes as UTF-8 in any locale, each character when its last byte arrives.

    Invalid bytes are printed as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda data: click.echo(decoder.decode(data).encode(), nl=False)
