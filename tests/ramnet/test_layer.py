"""RamLayer on its own, and beside attention in a model of the user's."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ramnet import RamLayer, RamNetConfig, RamNetForCausalLM, RamState, Sequences
from ramnet.blocks import GatedConvBlock
from tests.brute_force import cape, keep_largest, pdma, product_softmax
from tests.ramnet.test_model import small_model, tokens
from tests.samples import relative_rmse

WIDTH = 12


def layer(seed: int = 0, **changes: Any) -> RamLayer:
    torch.manual_seed(seed)
    sizes = {"value_dim": 5, "order": 3, "sub_dim": 3, "top_k": 4, "cape_heads": 1, **changes}
    made = RamLayer(WIDTH, 3, **sizes)
    with torch.no_grad():
        made.log_scale.add_(0.3 * torch.randn(2, 3))
    return made


def sequence(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_definition(made: RamLayer, x: Tensor) -> Tensor:
    """The paper's steps 1 to 8 on addresses over all slots, in float64."""
    c, x = made.config, x.double()
    heads, width = c.num_heads, c.num_heads * c.order * c.sub_dim
    query, key, value = (x @ made.query_key_value.weight.double().T).split([width, width, heads * c.value_dim], -1)
    addresses = []
    for side, alpha in zip((query, key), made.log_scale.double(), strict=True):
        logits = side.unflatten(-1, (heads, c.order, c.sub_dim))
        if made.address_bias is not None:
            logits = logits + made.address_bias[len(addresses)].double()
        logits = logits * (alpha.exp() / c.temperature)[:, None, None]
        address = keep_largest(product_softmax(logits.transpose(1, 2)), c.top_k)  # [B, H, T, M]
        shifted = (torch.arange(heads) < made.cape_heads)[:, None, None]
        addresses.append(torch.where(shifted, cape(address), address))
    read, write = addresses
    memory = torch.zeros(len(x), heads, c.slots, c.value_dim, dtype=torch.float64)
    mass = torch.full(memory.shape[:3], 1 / c.slots, dtype=torch.float64)
    values = value.unflatten(-1, (heads, c.value_dim)).transpose(1, 2)
    out, _, _ = pdma(write, read, values, memory, mass, c.decay_power, c.eps, c.proxy_eps)
    return out.transpose(1, 2).flatten(2) @ made.output.weight.double().T


@pytest.mark.parametrize(
    "changes",
    [{}, {"cape_heads": 0}, {"cape_heads": 3, "decay_power": 2.0}, {"temperature": 0.7, "top_k": 27, "eps": 0.1},
     {"decay_power": 0.0, "value_dim": None, "proxy_eps": 0.3}, {"address_bias": "zeros", "cape_heads": 0},
     {"address_bias": "offsets", "cape_heads": 2}],
)  # fmt: skip
def test_output_and_gradients_equal_the_papers_definition(changes: dict[str, Any]) -> None:
    made = layer(**changes).double()
    x = sequence(2, 21).double().requires_grad_()
    out, right = made(x).output, by_definition(made, x)
    assert relative_rmse(out, right) <= 1e-12
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads, expected = (torch.autograd.grad(y, [x, *made.parameters()], cotangent) for y in (out, right))
    for grad, exact in zip(grads, expected, strict=True):
        assert relative_rmse(grad, exact) <= 1e-10


def test_its_defaults_are_the_papers_language_model() -> None:
    with torch.device("meta"):
        mine, papers = RamLayer(1024, 16), RamNetForCausalLM(RamNetConfig.preset("340m")).blocks[-1].mixer
    assert {name: x.shape for name, x in mine.state_dict().items()} == {
        name: x.shape for name, x in papers.state_dict().items()
    }
    assert mine.config == papers.config and mine.cape_heads == papers.cape_heads == 0


def test_a_call_without_a_state_starts_a_sequence_and_one_with_a_state_continues_it(kernels: str) -> None:
    made, x = layer(), sequence(2, 20)
    whole, parts, state = made(x), [], None
    for part in x.split([7, 0, 1, 12], dim=1):
        out, state = made(part, state)
        parts.append(out)
    assert relative_rmse(torch.cat(parts, 1), whole.output) <= 1e-6
    for name, tensor in state.tensors().items():
        assert relative_rmse(tensor, whole.state.tensors()[name]) <= 1e-6, name


@torch.no_grad()
def test_a_step_in_place_updates_the_state_that_it_is_given(kernels: str) -> None:
    made, x = layer(), sequence(2, 9)
    whole, state = made(x), RamState.zeros([made], 2)
    tensors = state.tensors()
    for t in range(9):
        out, same = made(x[:, t : t + 1], state, in_place=True)
        assert same is state
        assert relative_rmse(out[:, 0], whole.output[:, t]) <= 1e-6
    for name, tensor in state.tensors().items():
        assert tensor is tensors[name]
        assert relative_rmse(tensor, whole.state.tensors()[name]) <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_it_begins_with_is_float32_or_wider(dtype: torch.dtype) -> None:
    out, state = layer().to(dtype)(sequence(2, 3).to(dtype))
    assert out.dtype == dtype
    assert state.memory[0].dtype == state.mass[0].dtype == torch.promote_types(dtype, torch.float32)


class Hybrid(nn.Module):
    """A user's model: attention, then RAM-Net, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm, self.memory, self.head = nn.LayerNorm(WIDTH), layer(), nn.Linear(WIDTH, 17)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        x = x + self.attention(x, x, x, attn_mask=causal, need_weights=False)[0]
        return self.head(x + self.memory(self.norm(x)).output)


@pytest.mark.parametrize("kernels", ["cpu"], indirect=True)
def test_a_model_of_attention_and_ram_net_learns_compiled_or_not(kernels: str) -> None:
    torch.compiler.reset()
    text = torch.randint(17, (2, 13), generator=torch.Generator().manual_seed(0))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Hybrid()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(call(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[5:] == pytest.approx(losses[:5], rel=1e-4)
    assert losses[4] < losses[0] - 0.1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 28}, "RamLayerConfig: top_k is 28 but sub_dim**order has only 27 slots; use top_k <= 27"),
    ({"value_dim": 0}, "RamLayerConfig: value_dim = 0: Input should be greater than 0"),
    ({"cape_heads": 4}, "cape_heads is 4; it must be an int in 0..3, the number of heads"),
    ({"cape_heads": -1}, "cape_heads is -1; it must be an int in 0..3, the number of heads"),
    ({"decay_power": -1.0}, "RamLayerConfig: decay_power = -1.0: Input should be greater than or equal to 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_invalid_arguments_are_refused_with_their_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        layer(**changes)


@pytest.mark.parametrize("heads", [0, 5])
def test_a_width_that_heads_do_not_divide_needs_a_value_dim(heads: int) -> None:
    message = rf"^hidden_size is 12; without value_dim it must be a multiple of num_heads, {heads}$"
    with pytest.raises(ValueError, match=message):
        RamLayer(WIDTH, heads)


def test_input_that_does_not_fit_is_refused() -> None:
    made = layer()
    for x in (sequence(2, 3)[0], sequence(2, 3)[..., :7]):
        with pytest.raises(ValueError, match=re.escape(f"x has shape {list(x.shape)}; it must be [B, T, 12]")):
            made(x)
    with pytest.raises(ValueError, match="in_place takes one token at a time, not 2"):
        made(sequence(2, 2), in_place=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (RamState.zeros([layer()], 3), "state.memory[0] has shape [3, 3, 27, 5]; it must be [2, 3, 27, 5]"),
        (RamState.zeros([layer(order=2)], 2), "state.memory[0] has shape [2, 3, 9, 5]; it must be [2, 3, 27, 5]"),
        (RamState.zeros([layer(), layer()], 2), "state.memory has 2 layers; this model has 1"),
    ],
)
def test_a_state_of_another_layer_or_batch_is_refused(state: RamState, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer()(sequence(2, 3), state)


@torch.no_grad()
def test_a_state_is_checked_once_a_call_by_the_model_or_by_a_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = small_model(), RamLayer(12, 3, order=3, sub_dim=3, top_k=4)
    checked = []
    check = RamState.check
    monkeypatch.setattr(RamState, "check", lambda self, *args, **options: checked.append(check(self, *args, **options)))
    for in_place in (False, True):
        state = RamState.zeros(model.config, 1)
        model(tokens(1, 1), state, in_place=in_place)
        assert len(checked) == 1
        assert state.position.tolist() == [int(in_place)]
        state = RamState.zeros([layer], 1)
        after = layer(torch.randn(1, 1, 12), state, in_place=in_place).state
        assert len(checked) == 2
        assert (state.position.tolist(), after.position.tolist()) == ([int(in_place)], [1])
        checked.clear()


def test_offsets_make_head_h_read_what_the_token_h_steps_before_wrote() -> None:
    made = RamLayer(WIDTH, 3, value_dim=4, order=3, sub_dim=3, top_k=1, cape_heads=2, address_bias="offsets")
    with torch.no_grad():
        made.query_key_value.weight[: 2 * made.address_width] = 0
        made.output.weight.copy_(torch.eye(WIDTH))
    x = sequence(2, 20)
    values = made.query_key_value(x)[..., 2 * made.address_width :].unflatten(-1, (3, 4))
    read = made(x).output.unflatten(-1, (3, 4))
    weight = made.address_bias[1, 0].double().softmax(-1)[:, 0].prod()
    mass = weight + (1 - weight) / 27
    for head in range(2):
        want = values[:, : 20 - head, head].double() * weight**2 / (mass + 1e-6)
        assert relative_rmse(read[:, head:, head], want) < 1e-5
    assert made.address_bias[:, 2].count_nonzero() == 0


def test_sequences_of_other_tokens_are_refused() -> None:
    mask = torch.tensor([[1], [0]])
    of_a_step = Sequences.of(mask, None, (2, 1), mask.device)
    with pytest.raises(ValueError, match=r"^sequences are of tokens \[2, 1\]; x has \[2, 5\]$"):
        layer()(sequence(2, 5), sequences=of_a_step)


def test_parameters_that_were_made_without_values_are_given_the_initial_ones() -> None:
    def reset(module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    with torch.device("meta"):
        made = RamLayer(WIDTH, 3, address_bias="offsets", cape_heads=2)
    with torch.no_grad():
        for parameter in made.to_empty(device="cpu").parameters():
            parameter.fill_(float("nan"))
    made.apply(reset)
    right = RamLayer(WIDTH, 3, address_bias="offsets", cape_heads=2)
    assert torch.equal(made.address_bias, right.address_bias) and torch.equal(made.log_scale, right.log_scale)
    conv = GatedConvBlock(RamNetConfig.preset("tiny"))
    nn.init.constant_(conv.taps, float("nan"))
    conv.apply(reset)
    assert conv.taps.std().item() == pytest.approx(len(conv.taps) ** -0.5, rel=0.2)
    assert all(x.isfinite().all() for x in (*made.parameters(), *conv.parameters()))
