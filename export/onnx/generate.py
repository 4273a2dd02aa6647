"""Continues a text with an exported model on NumPy arrays, without PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from export.onnx.model import OnnxModel
from ramnet.generation.options import TOKENS_AT_ONCE, SamplingOptions, Stops


def generate(
    model: OnnxModel, prompt: NDArray[np.int64], max_new_tokens: int, options: SamplingOptions, stops: Stops,
    seed: int | None,
) -> Iterator[int]:  # fmt: skip
    """Yield the tokens that continue a prompt [T], T ≥ 1: those of ``OnnxSession.generate`` with this seed.

    Raises RuntimeError if the largest logit is NaN or infinite.
    """
    numbers, state, unread, generated = uniforms(seed), None, prompt, list[int]()
    seen = np.zeros(model.config.vocab_size, bool)
    seen[prompt] = True
    for _ in range(max_new_tokens):
        for part in np.array_split(unread, -(-len(unread) // TOKENS_AT_ONCE)):
            if state is None or len(part) > 1:
                logits, state = model.read(part[None], state)
            else:
                logits = model.step(part[None], state)
        if not math.isfinite(logits[0, -1].max()):
            raise RuntimeError(
                "the largest logit is NaN or infinite, so that no token can be chosen; look for NaN and infinity in the"
                " model's weights"
            )
        token = choose(options, penalise(options, logits[0, -1], seen), numbers)
        yield token
        generated.append(token)
        if token in stops.tokens or stops.found_in(generated):
            return
        seen[token], unread = True, np.array([token])


def choose(options: SamplingOptions, logits: NDArray[np.float32], numbers: Iterator[float]) -> int:
    """Choose a token from logits [V]; ``numbers`` are in [0, 1) for sampling."""
    if options.temperature == 0:
        return int(logits.argmax())
    total = probabilities(options, logits).cumsum()
    # The token is the first whose cumulative sum exceeds the drawn number, which rounding may not lift to the total.
    drawn = min(next(numbers) * total[-1], np.nextafter(total[-1], 0))
    return int((total <= drawn).sum())


def probabilities(options: SamplingOptions, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return unnormalised probabilities [V]; 0 for tokens that are excluded."""
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max()) / options.temperature  # in this order, so that a tiny temperature gives no inf
    if options.top_k:
        kth = np.sort(scaled)[-min(options.top_k, len(scaled))]
        scaled[scaled < kth] = -np.inf
    if options.top_p < 1:
        order = np.argsort(-scaled, kind="stable")  # of equal logits, the first is taken, as by PyTorch
        probability = np.exp(scaled[order])
        probability /= probability.sum()
        # A token is excluded if the more probable ones already sum to top_p; the most probable always stays.
        scaled[order[probability.cumsum() - probability >= options.top_p]] = -np.inf
    if options.min_p:
        scaled[scaled < math.log(options.min_p)] = -np.inf
    found: NDArray[np.float64] = np.exp(scaled)
    return found


def penalise(options: SamplingOptions, logits: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Divide positive logits of tokens ``seen``, bool [V], by the penalty and multiply negative ones by it."""
    penalty = np.float32(options.repetition_penalty)
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def uniforms(seed: int | None) -> Iterator[float]:
    """Yield numbers in [0, 1). Those of a seed are those of PyTorch's generator, which is a Mersenne Twister too."""
    if seed is None:
        generator = np.random.default_rng()
        while True:
            yield generator.random()
    twister = np.random.RandomState(seed % 2**32)  # PyTorch drops the upper bits as well
    while True:
        yield int(twister.randint(2**64, size=1, dtype=np.uint64)[0]) % 2**53 / 2**53
