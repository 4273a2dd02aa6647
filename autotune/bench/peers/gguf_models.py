"""Writes GGUF files of models with random weights, whose tensors are named as llama.cpp's converter names them.

The peers' interpreter runs this module, so it imports only the package gguf, numpy and the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

VOCABULARY, WIDTH, INNER, HEAD = 32_000, 1024, 2816, 64
# The numbers of layers with which a model has as many parameters as the preset "340m", or up to 1.3 % fewer.
LAYERS = {"llama": 24, "mamba2": 46, "rwkv7": 23}


class Weight(NamedTuple):
    """``scale`` is the standard deviation of a random tensor; ``constant`` is the value of one that is not random."""

    name: str
    shape: tuple[int, ...]
    scale: float = 0.02
    constant: float | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether a token reads the tensor in a matrix product."""
        return len(self.shape) == 2 and self.constant is None


def parameters(architecture: str, layers: int) -> int:
    """Return the number of parameters of a model of ``layers`` layers."""
    return sum(int(np.prod(weight.shape)) for weight in _weights(architecture, layers))


def write(path: str, architecture: str, kind: str, layers: int) -> None:
    """Write a model of ``layers`` layers.

    Args:
        architecture: a key of ``LAYERS``.
        kind: the type of matrices, "F32" or "Q8_0"; other tensors are float32.
    """
    import gguf

    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=False)
    writer.add_block_count(layers)
    writer.add_embedding_length(WIDTH)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    _ARCHITECTURES[architecture][0](writer)
    for weight in _weights(architecture, layers):
        if weight.is_matrix and kind == "Q8_0":
            writer.add_tensor(weight.name, _q8_0(weight, random), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        elif weight.constant is not None:
            writer.add_tensor(weight.name, np.full(weight.shape, weight.constant, np.float32))
        else:
            writer.add_tensor(weight.name, random.standard_normal(weight.shape, np.float32) * np.float32(weight.scale))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(architecture: str, layers: int) -> Iterator[Weight]:
    yield from _ends(architecture)
    for i in range(layers):
        yield from _ARCHITECTURES[architecture][1](i)


def _q8_0(weight: Weight, random: np.random.Generator) -> Any:
    """Return blocks of 32 random integers, each after its scale in float16, as bytes [rows, bytes of a row]."""
    rows, columns = weight.shape
    blocks = np.empty((rows, columns // 32), np.dtype([("scale", "<f2"), ("elements", "i1", 32)]))
    blocks["scale"] = weight.scale / 73  # the standard deviation of the integers
    blocks["elements"] = random.integers(-127, 128, blocks["elements"].shape, np.int8)
    return blocks.view(np.uint8)


def _ends(architecture: str) -> Iterator[Weight]:
    yield Weight("token_embd.weight", (VOCABULARY, WIDTH))
    yield Weight("output.weight", (VOCABULARY, WIDTH))
    norms = ("output_norm", "token_embd_norm") if architecture == "rwkv7" else ("output_norm",)
    for norm in norms:
        yield Weight(f"{norm}.weight", (WIDTH,), constant=1)
        if architecture == "rwkv7":
            yield Weight(f"{norm}.bias", (WIDTH,), constant=0)


def _llama_settings(writer: Any) -> None:
    writer.add_context_length(65_536)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(WIDTH // HEAD)
    writer.add_head_count_kv(WIDTH // HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)


def _llama(layer: int) -> Iterator[Weight]:
    at = f"blk.{layer}"
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield Weight(f"{at}.{name}.weight", (WIDTH, WIDTH))
    for name in ("ffn_gate", "ffn_up"):
        yield Weight(f"{at}.{name}.weight", (INNER, WIDTH))
    yield Weight(f"{at}.ffn_down.weight", (WIDTH, INNER))
    for name in ("attn_norm", "ffn_norm"):
        yield Weight(f"{at}.{name}.weight", (WIDTH,), constant=1)


# The proportions of Mamba-2's paper: an inner width of twice the model's, states of 128, one group, taps of 4.
_MAMBA_INNER, _MAMBA_STATE, _TAPS = 2 * WIDTH, 128, 4
_MAMBA_HEADS = _MAMBA_INNER // HEAD


def _mamba2_settings(writer: Any) -> None:
    writer.add_context_length(2**20)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(_TAPS)
    writer.add_ssm_inner_size(_MAMBA_INNER)
    writer.add_ssm_state_size(_MAMBA_STATE)
    writer.add_ssm_time_step_rank(_MAMBA_HEADS)
    writer.add_ssm_group_count(1)
    writer.add_layer_norm_rms_eps(1e-5)


def _mamba2(layer: int) -> Iterator[Weight]:
    at, mixed = f"blk.{layer}", _MAMBA_INNER + 2 * _MAMBA_STATE
    yield Weight(f"{at}.attn_norm.weight", (WIDTH,), constant=1)
    yield Weight(f"{at}.ssm_in.weight", (_MAMBA_INNER + mixed + _MAMBA_HEADS, WIDTH))
    yield Weight(f"{at}.ssm_conv1d.weight", (mixed, _TAPS), constant=0.25)
    yield Weight(f"{at}.ssm_conv1d.bias", (mixed,), constant=0)
    yield Weight(f"{at}.ssm_dt.bias", (_MAMBA_HEADS,), constant=0)
    yield Weight(f"{at}.ssm_a", (_MAMBA_HEADS, 1), constant=-1)
    yield Weight(f"{at}.ssm_d", (_MAMBA_HEADS, 1), constant=1)
    yield Weight(f"{at}.ssm_norm.weight", (1, _MAMBA_INNER), constant=1)
    yield Weight(f"{at}.ssm_out.weight", (WIDTH, _MAMBA_INNER))


# The ranks of the published RWKV-7 of 0.4 thousand million parameters.
_DECAY, _RATE, _RESIDUAL, _GATE = 64, 64, 32, 128


def _rwkv7_settings(writer: Any) -> None:
    writer.add_context_length(2**20)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(HEAD)
    writer.add_decay_lora_rank(_DECAY)
    writer.add_iclr_lora_rank(_RATE)
    writer.add_value_residual_mix_lora_rank(_RESIDUAL)
    writer.add_gate_lora_rank(_GATE)


def _rwkv7(layer: int) -> Iterator[Weight]:
    at = f"blk.{layer}"
    for norm in ("attn_norm", "attn_norm_2", "time_mix_ln"):
        yield Weight(f"{at}.{norm}.weight", (WIDTH,), constant=1)
        yield Weight(f"{at}.{norm}.bias", (WIDTH,), constant=0)
    yield Weight(f"{at}.time_mix_lerp_fused.weight", (6, 1, 1, WIDTH), constant=0.5)
    # The first layer has no residual of values; the file holds one that is not used.
    ranks = {"w": _DECAY, "a": _RATE, "v": _RESIDUAL if layer else _RATE, "g": _GATE}
    for name, rank in ranks.items():
        if name != "g":
            yield Weight(f"{at}.time_mix_{name}0.weight", (WIDTH,), constant=0)
        yield Weight(f"{at}.time_mix_{name}1.weight", (rank, WIDTH))
        yield Weight(f"{at}.time_mix_{name}2.weight", (WIDTH, rank))
    for name in ("k_k", "k_a", "r_k"):
        yield Weight(f"{at}.time_mix_{name}.weight", (WIDTH,), constant=0.5)
    for name in ("key", "value", "receptance", "output"):
        yield Weight(f"{at}.time_mix_{name}.weight", (WIDTH, WIDTH))
    yield Weight(f"{at}.channel_mix_lerp_k.weight", (1, 1, WIDTH), constant=0.5)
    yield Weight(f"{at}.channel_mix_key.weight", (4 * WIDTH, WIDTH))
    yield Weight(f"{at}.channel_mix_value.weight", (WIDTH, 4 * WIDTH))


_ARCHITECTURES: dict[str, tuple[Callable[[Any], None], Callable[[int], Iterator[Weight]]]] = {
    "llama": (_llama_settings, _llama),
    "mamba2": (_mamba2_settings, _mamba2),
    "rwkv7": (_rwkv7_settings, _rwkv7),
}
