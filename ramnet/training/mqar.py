"""Multi-query associative recall: recall the value that followed a key."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ramnet.loss import IGNORED, LOGITS_AT_ONCE
from ramnet.training.batch import Batch
from ramnet.training.model import Model
from ramnet.training.recipe import HELD_OUT_SEED, MOST

GAP_POWER = 0.01  # a query is at gap i, counted from 1, with probability p_i ∝ i^(GAP_POWER − 1)
HELD_OUT_EXAMPLES = 1000


@dataclass(frozen=True)
class Mqar:
    """The recall task at one setting (paper, section MQAR).

    Attributes:
        pairs: key-value pairs to remember.
        length: L, tokens of an example.
        vocab_size: V; keys are 1..V/2−1 and values V/2..V−1.

    Raises:
        ValueError: if L is odd or above 2^31, 4·pairs > L, V is odd, or there are fewer than ``pairs`` keys.
    """

    pairs: int = 8
    length: int = 64
    vocab_size: int = 8192
    metric = "accuracy"

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}; it must be at least 1")
        if self.length > MOST:
            raise ValueError(f"length is {self.length}; it must be at most 2^31")
        if self.length % 2:
            raise ValueError(f"length is {self.length}; it must be even, as queries stand at even positions")
        if 4 * self.pairs > self.length:
            raise ValueError(
                f"length is {self.length}; {self.pairs} pairs and their queries need at least {4 * self.pairs}"
            )
        if self.vocab_size % 2 or self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; {self.pairs} pairs need an even one of at least {2 * self.pairs + 2}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what defines the task, for a checkpoint."""
        return {"task": "mqar", **asdict(self)}

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``size`` examples: inputs and labels, int64 [size, L]. Labels are IGNORED except at the queries.

        The context is k v k v …. Each key is queried once, at 2·pairs + 2·gap with gaps drawn without replacement. The
        label of a query, its value, is at the same position. All other positions hold random tokens.
        """
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + _distinct(size, half - 1, self.pairs, generator)  # [size, pairs]
        values = half + _distinct(size, half, self.pairs, generator)
        space = (self.length - context) // 2
        chance = torch.arange(1, space + 1, dtype=torch.float64) ** (GAP_POWER - 1)
        gaps = torch.multinomial(chance.expand(size, space), self.pairs, generator=generator)
        inputs = torch.zeros(size, self.length, dtype=torch.int64)
        inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
        inputs.scatter_(1, context + 2 * gaps, keys)
        labels = torch.full_like(inputs, IGNORED).scatter_(1, context + 2 * gaps, values)
        noise = torch.randint(self.vocab_size, inputs.shape, generator=generator)
        return torch.where(inputs == 0, noise, inputs), labels

    def evaluate(self, model: Model) -> float:
        """Return the accuracy on 1000 fixed examples, or NaN if the model's logits are not finite."""
        generator = torch.Generator().manual_seed(HELD_OUT_SEED)
        examples = Batch(*self.batch(HELD_OUT_EXAMPLES, generator))
        right = [count_right(model, part.inputs, part.labels) for part in examples.few_tokens()]
        return sum(right) / (HELD_OUT_EXAMPLES * self.pairs)


@dataclass(frozen=True)
class Mix:
    """Recall at several settings: each batch is of one of them, drawn uniformly.

    Attributes:
        trained: the settings of batches. A batch holds as many tokens as one of the shortest.
        tested: the settings of ``evaluate``.
    """

    trained: tuple[Mqar, ...]
    tested: tuple[Mqar, ...]
    metric = "accuracy"
    best: ClassVar[Literal["highest", "lowest"]] = "highest"

    def describe(self) -> dict[str, Any]:
        """Return what defines the task, for a checkpoint."""
        sides = {name: [asdict(each) for each in getattr(self, name)] for name in ("trained", "tested")}
        return {"task": "mqar mix", **sides}

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``size`` examples of the shortest length, or so many fewer longer ones; see ``Mqar.batch``."""
        setting = self.trained[int(torch.randint(len(self.trained), (), generator=generator))]
        shortest = min(each.length for each in self.trained)
        return setting.batch(max(1, size * shortest // setting.length), generator)

    def evaluate(self, model: Model) -> float:
        """Return the mean of the accuracies at the tested settings."""
        return sum(self.scores(model)) / len(self.tested)

    def scores(self, model: Model) -> list[float]:
        """Return the accuracy at each of the tested settings."""
        return [each.evaluate(model) for each in self.tested]


@torch.no_grad()
def count_right(model: Model, inputs: Tensor, labels: Tensor) -> float:
    """Count labels [B, T] other than IGNORED that are the most probable token; NaN if logits are not finite."""
    device = model.embedding.weight.device
    return float(right(model, model.hidden_states(inputs.to(device))[0], labels.to(device)).sum())


def right(model: Model, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return for each label [B, T] other than IGNORED, row by row, 1.0 if it is the most probable token and else 0.0.

    The result is float32, and NaN if the logits are not finite. ``hidden`` is [B, T, C]. ``LOGITS_AT_ONCE`` logits
    exist at a time.
    """
    asked = labels != IGNORED
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    best = [model.head(part).max(dim=-1) for part in hidden[asked].split(rows)]
    largest, likeliest = (torch.cat(each) for each in zip(*best, strict=True))
    # In float32, in which sums of ones are exact; those of a half-precision model's dtype are not.
    return (likeliest == labels[asked]).float() + (0 * largest).float()


def _distinct(rows: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw int64 [rows, count], each row ``count`` distinct numbers of 0..choices−1, uniformly."""
    return torch.rand(rows, choices, generator=generator, dtype=torch.float64).topk(count, dim=1).indices
