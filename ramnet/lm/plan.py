"""What the language-modelling experiment trains at each scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ramnet.baselines import BaselineConfig
from ramnet.config import RamNetConfig
from ramnet.lm.task import Compared
from ramnet.training.model import Config, parameter_count
from ramnet.training.recipe import Recipe
from ramnet.training.sweep import Sweep

MIXERS = {"attention": "Transformer++", "gla": "GLA", "gated_deltanet": "Gated DeltaNet"}
CONVOLUTIONS = 2
# Embeddings begin with a standard deviation of 1, but for these mixers and numbers of convolutions, which end lower
# from this one: docs/results.md has both.
_BASELINES_STARTS = {("attention", CONVOLUTIONS): 0.02, ("gated_deltanet", CONVOLUTIONS): 0.02}


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        hidden_size: C of all models; heads are 32 wide.
        num_layers: mixers of each model.
        length: bytes of a training window.
        contexts: bytes of the windows in which the same bytes are predicted at the end, ascending; one is ``length``.
        batch_size: windows in a step.
        search_steps: steps of each learning rate.
        steps: steps of the runs with the best of them.
        seeds: seeds of those runs.
        finalists: how many of the rates are trained to the end.
    """

    hidden_size: int
    num_layers: int
    length: int
    contexts: tuple[int, ...]
    batch_size: int
    search_steps: int
    steps: int
    seeds: tuple[int, ...]
    finalists: int = 1


SCALES = {
    "quick": Scale(128, 2, 256, (128, 256, 1024, 4096), 8, 200, 1400, (0, 1, 2)),
    "night": Scale(192, 4, 512, (128, 512, 2048, 8192), 8, 300, 2000, (0,), finalists=2),
}


def ram_net(scale: Scale, conv_layers: int) -> RamNetConfig:
    """Return the RAM-Net of a scale.

    Without convolutions, the first half of the layers moves addresses and begins with offsets, in place of one. With
    convolutions no layer does: bits per byte are 1.885 then, and 1.938 if half of the first layer's heads move
    (docs/results.md).

    A first layer of 16 slots does as well as one of 256. If half of the second layer's heads move, too, bits per byte
    are 2.36 after 300 steps, and 2.31 without (docs/learning.md).
    """
    size, moved = scale.hidden_size, 0 if conv_layers else scale.num_layers // 2
    others = scale.num_layers - moved
    return RamNetConfig(
        **_shared(scale, conv_layers), embedding_std=1.0, num_heads=size // 32, sub_dim=4,
        order=(2,) * moved + (4,) * others, top_k=(4,) * moved + (8,) * others, value_dim=32,
        cape_full_layers=moved, intermediate_size=2 * size, address_bias=None if conv_layers else "offsets",
    )  # fmt: skip


def baseline(scale: Scale, mixer: Any, conv_layers: int) -> BaselineConfig:
    """Return a baseline with as many parameters as the RAM-Net of the scale: its FFN is as much wider or narrower."""
    wanted = parameter_count(ram_net(scale, conv_layers))
    size, start = scale.hidden_size, _BASELINES_STARTS.get((mixer, conv_layers), 1.0)

    def of(intermediate_size: int) -> BaselineConfig:
        return BaselineConfig(
            **_shared(scale, conv_layers), embedding_std=start, mixer=mixer, num_heads=size // 32, key_dim=32,
            value_dim=32, intermediate_size=intermediate_size,
        )  # fmt: skip

    narrow = of(size)
    per_unit = (parameter_count(of(2 * size)) - parameter_count(narrow)) // size
    return of(size + round((wanted - parameter_count(narrow)) / per_unit))


def _shared(scale: Scale, conv_layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": scale.hidden_size, "num_layers": scale.num_layers}
    return {"vocab_size": 256, **sizes, "conv_layers": conv_layers}


def configurations(scale: Scale) -> dict[str, Config]:
    """Return every model, with and without short convolutions, by its name."""
    found: dict[str, Config] = {}
    for conv_layers in (0, CONVOLUTIONS):
        end = " + convolutions" if conv_layers else ""
        found[f"RAM-Net{end}"] = ram_net(scale, conv_layers)
        found |= {f"{name}{end}": baseline(scale, mixer, conv_layers) for mixer, name in MIXERS.items()}
    return found


def sweep(scale: Scale, files: Sequence[str]) -> Sweep:
    """Return what is trained at a scale on the text of ``files``; none is the standard library's sources.

    All models see the same windows in the same order. Raises what ``ramnet.training.text.Text`` does.
    """
    search, final = (
        Recipe(steps=steps, batch_size=scale.batch_size, weight_decay=0.1)
        for steps in (scale.search_steps, scale.steps)
    )
    task = Compared(files, scale.length, scale.contexts)
    return Sweep(configurations(scale), task, search, final, scale.seeds, scale.finalists)
