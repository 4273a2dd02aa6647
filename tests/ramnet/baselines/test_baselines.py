"""Each baseline equals its recurrence, written token by token, and is causal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ramnet.baselines import BaselineConfig, BaselineForCausalLM, mixers
from ramnet.baselines.model import MIXERS, Name
from ramnet.baselines.recurrence import linear_recurrence
from tests.samples import relative_rmse

B, T, C, H, K, V = 2, 37, 12, 3, 5, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_token(update: Callable[[Tensor, int], Tensor], q: Tensor) -> Tensor:
    """Outputs S_t q_t, where ``update`` returns S_t, [B, H, V, K], of S_(t−1) and t."""
    state, outputs = torch.zeros(B, H, V, K, dtype=torch.float64), []
    for t in range(q.shape[2]):
        state = update(state, t)
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, q[:, :, t]))
    return torch.stack(outputs, 2)


def outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("replaces", [False, True])
def test_chunks_compute_the_recurrence_and_its_gradients(channels: int, replaces: bool) -> None:
    q, k, a, b = (F.normalize(draw(B, H, T, K, seed=i), dim=-1).requires_grad_() for i in range(4))
    v, decay = draw(B, H, T, V, seed=4).requires_grad_(), -draw(B, H, T, channels, seed=5).exp()
    decay.requires_grad_()
    left, right = (-a, b) if replaces else (None, None)

    def update(state: Tensor, t: int) -> Tensor:
        kept = state * decay[:, :, t].exp().unsqueeze(-2)
        if replaces:
            kept = kept - outer(torch.einsum("bhvk,bhk->bhv", state, a[:, :, t]), b[:, :, t])
        return kept + outer(v[:, :, t], k[:, :, t])

    out, want = linear_recurrence(q, k, v, decay, left, right), by_token(update, q)
    assert relative_rmse(out, want) < 1e-12
    cotangent, leaves = draw(B, H, T, V, seed=6), [q, k, v, decay] + ([a, b] if replaces else [])
    found, exact = (torch.autograd.grad(y, leaves, cotangent) for y in (out, want))
    assert all(relative_rmse(x, y) < 1e-10 for x, y in zip(found, exact, strict=True))


def made(kind: type[mixers.Mixer], **options: int) -> tuple[mixers.Mixer, Tensor]:
    """A mixer with random parameters, so that none of its parts is hidden by a 0 or a 1."""
    torch.manual_seed(0)
    mixer = kind(C, H, K, V, **options).double()
    perturb(mixer, 0.3)
    return mixer, draw(B, T, C, seed=7)


@torch.no_grad()
def perturb(module: torch.nn.Module, size: float) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=size)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_sees_all_tokens_or_the_last_ones_at_relative_positions(window: int | None) -> None:
    mixer, x = made(mixers.Attention, **({} if window is None else {"window": window}))
    q, k, v = (mixer.heads(p(x)) for p in (mixer.query, mixer.key, mixer.value))
    want = torch.zeros(B, H, T, V, dtype=torch.float64)
    for t in range(T):
        seen = range(0 if window is None else max(0, t - window + 1), t + 1)
        scores = torch.stack([_turned(q[:, :, t], t - s).mul(k[:, :, s]).sum(-1) for s in seen], -1) / K**0.5
        want[:, :, t] = torch.einsum("bhs,bhsv->bhv", scores.softmax(-1), v[:, :, seen.start : seen.stop])
    assert relative_rmse(mixer(x), mixer.output(want.transpose(1, 2).flatten(2))) < 1e-6  # angles are float32


def _turned(x: Tensor, steps: int) -> Tensor:
    """Pairs (i, i + 2) of x [..., 5] as complex numbers, turned by their rate times ``steps``; the last stays."""
    pairs = torch.complex(x[..., :2], x[..., 2:4])
    turned = pairs * torch.exp(1j * steps * torch.tensor([1.0, 10000**-0.5], dtype=torch.float64))
    return torch.cat([turned.real, turned.imag, x[..., 4:]], -1)


def test_linear_attention_is_a_weighted_mean_of_values() -> None:
    mixer, x = made(mixers.LinearAttention)
    q, k = (F.elu(mixer.heads(p(x))) + 1 for p in (mixer.query, mixer.key))
    weights = (q @ k.mT).tril()
    want = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ mixer.heads(mixer.value(x))
    assert relative_rmse(mixer(x), mixer.output(want.transpose(1, 2).flatten(2))) < 1e-12


def test_linear_attention_of_features_that_round_to_0_is_finite() -> None:
    mixer, x = made(mixers.LinearAttention)
    with torch.no_grad():
        mixer.query.weight.zero_()
        mixer.query.weight[:, 0], x[..., 0] = -1000.0, 1.0
    assert mixer(x).isfinite().all()


def test_gla_decays_channels() -> None:
    mixer, x = made(mixers.GatedLinearAttention)
    q, k, v = (mixer.heads(p(x)) for p in (mixer.query, mixer.key, mixer.value))
    decay = mixer.heads(mixer.decay(x)).sigmoid() ** (1 / 16)

    def update(state: Tensor, t: int) -> Tensor:
        return state * decay[:, :, t].unsqueeze(-2) + outer(v[:, :, t], k[:, :, t])

    assert relative_rmse(mixer(x), mixer.gated(x, by_token(update, q) / K**0.5)) < 1e-12


@pytest.mark.parametrize("kind", [mixers.DeltaNet, mixers.GatedDeltaNet])
def test_delta_rules_replace_what_a_key_recalls(kind: type[mixers.Mixer]) -> None:
    mixer, x = made(kind)
    q, k = (F.normalize(F.silu(mixer.heads(p(x))), dim=-1) for p in (mixer.query, mixer.key))
    v, beta = mixer.heads(mixer.value(x)), mixer.heads(mixer.strength(x)).sigmoid()
    decay = torch.ones(B, H, T, 1, dtype=torch.float64)
    if kind is mixers.GatedDeltaNet:
        v, rate = F.silu(v), mixer.decays.log_rate.exp()[:, None]
        decay = (-rate * F.softplus(mixer.decays.project(x) + mixer.decays.bias).mT).exp().unsqueeze(-1)

    def update(state: Tensor, t: int) -> Tensor:
        state = state * decay[:, :, t].unsqueeze(-1)
        recalled = torch.einsum("bhvk,bhk->bhv", state, k[:, :, t])
        return state + outer(beta[:, :, t] * (v[:, :, t] - recalled), k[:, :, t])

    out = mixer.norm(by_token(update, q))
    if kind is mixers.GatedDeltaNet:
        out = out * F.silu(mixer.heads(mixer.gate(x)))
    assert relative_rmse(mixer(x), mixer.output(out.transpose(1, 2).flatten(2))) < 1e-11


def test_mamba2_discretises_its_inputs() -> None:
    mixer, x = made(mixers.Mamba2)
    q, k, v = (F.silu(mixer.heads(p(x))) for p in (mixer.query, mixer.key, mixer.value))
    step = F.softplus(mixer.decays.project(x) + mixer.decays.bias).mT
    rate = mixer.decays.log_rate.exp()

    def update(state: Tensor, t: int) -> Tensor:
        now = step[:, :, t, None, None]
        return (-rate[:, None, None] * now).exp() * state + now * outer(v[:, :, t], k[:, :, t])

    gated = (by_token(update, q) + mixer.skip[:, None, None] * v) * F.silu(mixer.heads(mixer.gate(x)))
    normed = gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    assert relative_rmse(mixer(x), mixer.output(mixer.joined(normed))) < 1e-12


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("places", [(7,), (3, 4, 5), tuple(range(33))])
def test_a_recurrence_forgets_at_once_and_stays_finite(removes: bool, places: tuple[int, ...]) -> None:
    """Within a chunk, decays multiply to less than float32 holds."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, a, b = (torch.randn(1, 2, 33, 5, generator=generator, dtype=torch.float64) / 3 for _ in range(5))
    log_decay = -torch.rand(1, 2, 33, 5, generator=generator, dtype=torch.float64)
    log_decay[:, :, places, :3] = -200.0
    state, expected = torch.zeros(1, 2, 5, 5, dtype=torch.float64), []
    for t in range(33):
        moved = state * log_decay[:, :, t].exp().unsqueeze(-2)
        if removes:
            moved = moved + (state @ a[:, :, t, :, None]) * b[:, :, t, None]
        state = moved + v[:, :, t, :, None] * k[:, :, t, None]
        expected.append((state @ q[:, :, t, :, None]).squeeze(-1))
    inputs = [x.float().requires_grad_() for x in (q, k, v, log_decay, *((a, b) if removes else ()))]
    found = linear_recurrence(*inputs)
    assert relative_rmse(found, torch.stack(expected, 2)) < 1e-5
    found.square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) for x in inputs)


def test_rwkv7_removes_and_replaces_along_a_direction() -> None:
    mixer, x = made(mixers.Rwkv7)
    shifted = torch.cat([torch.zeros(B, 1, C, dtype=torch.float64), x[:, :-1]], 1)
    r, w, k, v, a, g = (x * (1 - mix) + shifted * mix for mix in mixer.shift)
    decay = torch.exp(-math.exp(-0.5) * mixer.heads(mixer.decay(w)).sigmoid())
    rate, plain = mixer.rate(a).sigmoid(), mixer.key(k)
    direction = F.normalize(mixer.heads(plain * mixer.removal), dim=-1)
    key = mixer.heads(plain * (1 + (rate - 1) * mixer.blend))
    value, query, rate = mixer.heads(mixer.value(v)), mixer.heads(mixer.query(r)), mixer.heads(rate)

    def update(state: Tensor, t: int) -> Tensor:
        transition = torch.diag_embed(decay[:, :, t])
        transition = transition - outer(direction[:, :, t], rate[:, :, t] * direction[:, :, t])
        return state @ transition + outer(value[:, :, t], key[:, :, t])

    out = by_token(update, query)
    normal = F.layer_norm(out, (V,), eps=mixer.norm.eps) * mixer.norm.weight.view(H, 1, V) + mixer.norm.bias.view(
        H, 1, V
    )
    bonus = torch.einsum("bhtk,bhtk,hk->bht", query, key, mixer.bonus).unsqueeze(-1) * value
    want = mixer.output((normal + bonus).transpose(1, 2).flatten(2) * mixer.gate(g))
    assert relative_rmse(mixer(x), want) < 1e-11


def model(name: Name) -> BaselineForCausalLM:
    torch.manual_seed(0)
    window = 5 if name == "window" else None
    sizes = {"vocab_size": 17, "hidden_size": C, "num_layers": 2, "num_heads": 2, "key_dim": 6, "value_dim": 6}
    return BaselineForCausalLM(BaselineConfig(mixer=name, window=window, conv_layers=1, intermediate_size=9, **sizes))


@pytest.mark.parametrize("name", get_args(Name))
def test_a_model_is_causal_and_every_parameter_learns(name: Name) -> None:
    made = model(name)
    perturb(made, 0.1)  # RWKV-7 begins with matrices of zeros
    ids = torch.randint(17, (2, 33), generator=torch.Generator().manual_seed(0))
    logits = made(ids)
    assert torch.allclose(made(ids[:, :20]), logits[:, :20], atol=1e-5)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert all(p.grad is not None and p.grad.count_nonzero() for p in made.parameters())


def test_states_are_counted() -> None:
    convolution, heads = 2 * C, 2 * 6
    wanted = {"attention": 2 * 2 * heads * 100, "window": 2 * 2 * heads * 5, "linear": 2 * 2 * 6 * 7,
              "rwkv7": 2 * (2 * 36 + C)}  # fmt: skip
    for name in MIXERS:
        assert model(name).state_size(100) == wanted.get(name, 2 * 2 * 36) + convolution  # type: ignore[arg-type]


def test_a_window_belongs_to_its_mixer() -> None:
    sizes = {"vocab_size": 17, "hidden_size": C, "num_layers": 2, "num_heads": 2, "key_dim": 6, "value_dim": 6}
    for mixer, window in (("window", None), ("gla", 3)):
        with pytest.raises(ValueError, match=f"mixer is '{mixer}' and window {window}"):
            BaselineConfig(mixer=mixer, window=window, **sizes)


def small(mixer: Name) -> BaselineConfig:
    window = 4 if mixer == "window" else None
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "key_dim": 8, "value_dim": 8}
    return BaselineConfig(mixer=mixer, window=window, **sizes)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_baseline_computes_in_bfloat16(mixer: Name) -> None:
    config = small(mixer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = BaselineForCausalLM(config)(torch.arange(8).unsqueeze(0))
    logits.float().sum().backward()
    assert logits.isfinite().all()


def test_a_full_disk_leaves_both_files_of_a_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BaselineConfig(
        mixer="gla", vocab_size=8, hidden_size=16, num_layers=1, num_heads=2, key_dim=8, value_dim=8
    )
    BaselineForCausalLM(config).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ramnet.baselines.model.write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        BaselineForCausalLM(small("deltanet")).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 0)])
def test_no_tokens_have_no_logits(mixer: Name, shape: tuple[int, int]) -> None:
    assert BaselineForCausalLM(small(mixer))(torch.zeros(shape, dtype=torch.int64)).shape == (*shape, 8)


@pytest.mark.parametrize("mixer", MIXERS)
def test_positions_do_not_depend_on_the_default_dtype(mixer: Name) -> None:
    torch.manual_seed(0)
    model, ids = BaselineForCausalLM(small(mixer)), (torch.arange(300) % 8).unsqueeze(0)
    want = model(ids)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model(ids), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_strong_decays_of_channels_are_finite_in_float16() -> None:
    q, k, v, decay = (draw(B, H, T, n, seed=i) for i, n in enumerate((K, K, V, K)))
    decay = decay - 8
    want = linear_recurrence(q, k, v, decay.clamp(min=math.log(torch.finfo(torch.float32).eps)))
    assert relative_rmse(linear_recurrence(*(x.half() for x in (q, k, v, decay))).double(), want) < 2e-3
