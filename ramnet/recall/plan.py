"""What the recall experiment trains at each scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ramnet.baselines import BaselineConfig
from ramnet.config import RamNetConfig
from ramnet.training.model import Config
from ramnet.training.mqar import Mix, Mqar
from ramnet.training.recipe import Recipe
from ramnet.training.sweep import Sweep

# Pairs and lengths that the paper tests.
PAPERS_SETTINGS = ((4, 64), (8, 64), (16, 64), (32, 128), (64, 256), (128, 512), (256, 1024))

# Every model has two mixers of width 64, tied embeddings and no FFN.
_SKELETON: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 64, "num_layers": 2, "tie_embeddings": True}
# Logits begin near 0 with either. Each kind of model has the better one: docs/learning.md has both of every mixer.
_RAM_NETS_START: dict[str, Any] = {"embedding_std": 1.0, "final_gain": 0.03}
_BASELINES_START: dict[str, Any] = {"embedding_std": 0.02, "final_gain": 1.0}
FINALISTS = 2  # learning rates that are trained to the end


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Attributes:
        trained: the settings (pairs, length) that training draws from, each batch from one.
        tested: the settings whose accuracy is measured.
        search_steps: steps of each of the four learning rates.
        steps: steps of the runs with the ``FINALISTS`` best of them.
        batch_size: examples of the shortest length in a step.
        seeds: seeds of those runs.
        memories: M and U of the RAM-Nets.
        key_dims: widths of the keys of the baselines' single head, whose values are 64 wide; a sliding window has half
            as many tokens, which is about the same state.
        ablations: train what ``ablations`` yields, instead of these RAM-Nets and the baselines.
    """

    trained: tuple[tuple[int, int], ...]
    tested: tuple[tuple[int, int], ...]
    search_steps: int
    steps: int
    batch_size: int
    seeds: tuple[int, ...]
    memories: tuple[tuple[int, int], ...]
    key_dims: tuple[int, ...]
    ablations: bool = False


def every_order(slots: int) -> list[tuple[int, int]]:
    """Return M = ``slots`` with every U for which P = M^(1/U) is a whole number of at least 2."""
    return [(slots, u) for u in range(1, slots.bit_length()) if round(slots ** (1 / u)) ** u == slots]


# The settings of the paper's training mix. Each has a fifth of the tokens here, and there 26, 11, 21, 21 and 21 %.
_MIX = ((4, 64), (8, 128), (16, 256), (32, 256), (64, 256))
# "quick" compares at equal state: M = 64 is 5440 numbers, and keys of width 40 are 5248 to 5376. "day" has the paper's
# Figure 4 at M = 256, and beyond it the best U of each M.
SCALES = {
    "quick": Scale(trained=PAPERS_SETTINGS[:4], tested=PAPERS_SETTINGS[:4], search_steps=200, steps=1200,
                   batch_size=64, seeds=(0,), memories=tuple(every_order(64)), key_dims=(40,)),
    "day": Scale(trained=_MIX, tested=PAPERS_SETTINGS, search_steps=300, steps=3000,
                 batch_size=128, seeds=(0,), memories=((64, 3), *every_order(256), (512, 3), (1024, 5)),
                 key_dims=(64,)),
    "ablations": Scale(trained=PAPERS_SETTINGS[:4], tested=PAPERS_SETTINGS[:4], search_steps=200,
                       steps=600, batch_size=64, seeds=(0,), memories=(), key_dims=(), ablations=True),
    "paper": Scale(trained=_MIX, tested=PAPERS_SETTINGS, search_steps=4000, steps=40000,
                   batch_size=256, seeds=(0, 1, 2), key_dims=(32, 64, 128),
                   memories=tuple(each for slots in (16, 64, 256, 1024, 4096) for each in every_order(slots))),
}  # fmt: skip


def ram_net(slots: int, order: int) -> RamNetConfig:
    """Return the RAM-Net whose second layer has M = ``slots`` and U = ``order``.

    Its first layer moves addresses; as it sees a few tokens back, 16 slots do for it. The second touches 16 slots, or
    32 of 256 and more, with which it begins to recall sooner (docs/learning.md).
    """
    sub_dim, top_k = round(slots ** (1 / order)), min(slots, 32 if slots >= 256 else 16)
    sizes: dict[str, Any] = {"order": (2, order), "sub_dim": (4, sub_dim), "top_k": (4, top_k)}
    return RamNetConfig.preset("mqar", **_SKELETON, **_RAM_NETS_START, **sizes)


def name_of(config: RamNetConfig) -> str:
    """Return the name of a RAM-Net, which is that of its last layer's memory."""
    return f"RAM-Net M={config.layers[-1].slots} U={config.layers[-1].order}"


def baseline(name: Any, key_dim: int, window: int | None = None) -> BaselineConfig:
    """Return a baseline whose layers have one head of this width, after one short convolution."""
    return BaselineConfig(**_SKELETON, **_BASELINES_START, mixer=name, num_heads=1, key_dim=key_dim, value_dim=64,
                          window=window, conv_layers=1)  # fmt: skip


def configurations(scale: Scale) -> Iterator[tuple[str, Config]]:
    """Yield a name, unique within the scale, and the configuration of everything that is trained."""
    if scale.ablations:
        yield from ablations()
        return
    for slots, order in scale.memories:
        config = ram_net(slots, order)
        yield name_of(config), config
    for key_dim in scale.key_dims:
        for name in ("linear", "gla", "deltanet", "gated_deltanet", "mamba2", "rwkv7"):
            yield f"{name} {key_dim}", baseline(name, key_dim)
        yield f"window {key_dim}", baseline("window", 64, window=key_dim // 2)
    yield "attention", baseline("attention", 64)


def ablations() -> Iterator[tuple[str, RamNetConfig]]:
    """Yield the RAM-Net with M = 64 and U = 3, and it with one default of its configuration changed, by name."""
    base = ram_net(64, 3)
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "embedding_std=0.02": {"embedding_std": 0.02},
        "final_gain=1": {"final_gain": 1.0},
        "address_bias=None": {"address_bias": None},
        "address_bias=None, conv_layers=1": {"address_bias": None, "conv_layers": 1},
        "conv_layers=1": {"conv_layers": 1},
        "one layer, conv_layers=1": {
            "num_layers": 1, "cape_full_layers": 0, "order": 3, "sub_dim": 4, "top_k": 16, "address_bias": None,
            "conv_layers": 1,
        },
        "first layer M=64": {"order": (3, 3)},
        "first layer K=8": {"top_k": (8, 16)},
        "K=8": {"top_k": (4, 8)},
        "γ=0": {"decay_power": 0.0},
        "γ=1": {"decay_power": 1.0},
        "γ=4": {"decay_power": 4.0},
        "τ=0.5": {"temperature": 0.5},
        "τ=2": {"temperature": 2.0},
    }  # fmt: skip
    for name, change in changes.items():
        yield f"RAM-Net {name}", base.model_copy(update=change)


def sweep(scale: Scale) -> Sweep:
    """Return what is trained at a scale."""
    mix = Mix(*(tuple(Mqar(*setting) for setting in settings) for settings in (scale.trained, scale.tested)))
    search, final = (
        Recipe(steps=steps, batch_size=scale.batch_size, weight_decay=0.1)
        for steps in (scale.search_steps, scale.steps)
    )
    return Sweep(dict(configurations(scale)), mix, search, final, scale.seeds, FINALISTS)
