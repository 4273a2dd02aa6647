"""The RAM-Net layer, which takes the place of attention in this project's model or in any other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ramnet import ops
from ramnet.config import AddressBias, RamLayerConfig
from ramnet.sequences import Sequences
from ramnet.state import RamState
from ramnet.state_checks import check_no_gradients


class RamLayerOutput(NamedTuple):
    """Output of ``RamLayer``.

    Attributes:
        output: [B, T, C].
        state: the state after the last token.
    """

    output: Tensor
    state: RamState


# A named tuple is a pytree without registration; torch.export.save also needs a name to serialise it under.
_pytree._register_namedtuple(RamLayerOutput, serialized_type_name="ramnet.RamLayerOutput")


# The height of "offsets". A head puts 0.98 of its weight on one slot of 4³, and 0.96 on one of 4⁵. From 4, training
# blurs the addresses before a later layer of 256 slots has learned to use what they bring (docs/learning.md).
OFFSET_LOGIT = 6.0


class ModelsState(RamState):
    """A layer's part of a state that the model has checked and whose position the model advances."""


class RamLayer(nn.Module):
    """The RAM-Net mixer (paper, steps 1 to 8): a causal map from [B, T, C] to [B, T, C].

    It replaces an attention layer; norms and residual connections are left to the caller. Each of its ``num_heads``
    heads owns a memory of M = ``sub_dim ** order`` slots. Each token writes ``top_k`` of them and reads ``top_k``. The
    default order, sub_dim and top_k are those of the paper's language model.

    Args:
        hidden_size: C, the width of input and output.
        num_heads: H.
        value_dim: D, the width of a slot; ``hidden_size // num_heads`` when None.
        order: U, the number of sub-vectors in an address.
        sub_dim: P, the size of a sub-vector.
        top_k: K, from 1 to M.
        cape_heads: the number of heads, counted from the first, that use CAPE (paper, step 4).
        decay_power: γ of the memory's decay (paper, step 5).
        temperature: τ of the product softmax (paper, step 2).
        eps: ε, added to the mass before a read divides by it (paper, step 6).
        proxy_eps: ε' of the decay's proxy gradient (paper, step 7).
        address_bias: the initial values of a bias [2, H, U, P] of queries and keys, which e^α and τ scale as they scale
            W_q and W_k. None has no bias. "zeros" starts at 0. With "offsets", head h of those with CAPE begins by
            writing slot 0 and reading slot h mod M, which is what the token h steps before wrote: constant queries and
            keys act as a convolution over time.

    Raises:
        ValueError: if an argument is out of range or does not fit the others; the message names the value.
    """

    def __init__(  # noqa: PLR0913 - the settings of a layer, each a keyword, as of torch's own layers
        self,
        hidden_size: int,
        num_heads: int,
        *,
        value_dim: int | None = None,
        order: int = 5,
        sub_dim: int = 4,
        top_k: int = 8,
        cape_heads: int = 0,
        decay_power: float = 1.0,
        temperature: float = 1.0,
        eps: float = 1e-6,
        proxy_eps: float = 0.01,
        address_bias: AddressBias | None = None,
    ) -> None:
        super().__init__()
        if value_dim is None:
            if num_heads < 1 or hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size is {hidden_size}; without value_dim it must be a multiple of num_heads, {num_heads}"
                )
            value_dim = hidden_size // num_heads
        self.config = config = RamLayerConfig(
            hidden_size=hidden_size, num_heads=num_heads, value_dim=value_dim, order=order, sub_dim=sub_dim,
            top_k=top_k, decay_power=decay_power, temperature=temperature, eps=eps, proxy_eps=proxy_eps,
            address_bias=address_bias,
        )  # fmt: skip
        if not isinstance(cape_heads, int) or not 0 <= cape_heads <= num_heads:
            raise ValueError(f"cape_heads is {cape_heads}; it must be an int in 0..{num_heads}, the number of heads")
        self.cape_heads = cape_heads
        self.address_width = config.num_heads * config.order * config.sub_dim
        # W_q, W_k and W_v are one matrix, so that decoding runs one matrix product instead of three.
        self.query_key_value = nn.Linear(
            config.hidden_size, 2 * self.address_width + config.num_heads * config.value_dim, bias=False
        )
        self.log_scale = nn.Parameter(torch.empty(2, config.num_heads))  # α of W_q and of W_k
        shape = 2, config.num_heads, config.order, config.sub_dim
        self.address_bias = None if address_bias is None else nn.Parameter(torch.empty(shape))
        self.output = nn.Linear(config.num_heads * config.value_dim, config.hidden_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set α and the bias to their initial values; the matrices are torch's own modules, which have this method."""
        self.log_scale.zero_()
        if self.address_bias is None:
            return
        self.address_bias.zero_()
        c = self.config
        for h in range(self.cape_heads if c.address_bias == "offsets" else 0):
            for u in range(c.order):
                digit = h % c.slots // c.sub_dim**u % c.sub_dim
                self.address_bias[0, h, u, digit] = self.address_bias[1, h, u, 0] = OFFSET_LOGIT

    def forward(
        self,
        x: Tensor,
        state: RamState | None = None,
        *,
        in_place: bool = False,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        sequences: Sequences | None = None,
    ) -> RamLayerOutput:
        """Mix each token with the tokens before it.

        Args:
            x: [B, T, C], of the dtype of the weights; T = 0 returns the state unchanged.
            state: the state after the tokens before ``x``, of this layer alone (``RamState.zeros([layer], B)``). None
                starts from a fresh state, in float32 or wider. It is not modified unless ``in_place``.
            in_place: update ``state`` in place and return it, so that a token costs O(K·D) for any M. Needs T = 1 and
                no gradients.
            attention_mask: bool or integer [B, T], True or 1 for a token and False or 0 for padding, which may be
                anywhere in a row. Padding neither writes nor reads the memory and does not advance the position.
            cu_seqlens: int32 or int64 [S + 1], for x [1, T] that holds S documents one after another: the offset at
                which each document begins, then T. Each document is a sequence of its own; states have S rows.
            sequences: the result of ``Sequences.of`` for ``attention_mask`` or ``cu_seqlens``, given instead of them
                so that layers can share it.

        Returns:
            ``output`` [B, T, C], 0 for padding, and ``state``. A sequence may be split over several calls.

        Raises:
            ValueError: if ``x`` is not [B, T, C], ``in_place`` is set and T ≠ 1 or gradients are asked for,
                ``sequences`` is given beside what it replaces or is of another [B, T], the mask or the documents do not
                fit (``Sequences.padded``, ``Sequences.packed``), or ``state`` does not fit the layer, batch or device
                (``RamState.check``). ``state`` is not modified then.
            TypeError: if a mask, documents or a state have a wrong dtype.
        """
        c = self.config
        if x.dim() != 3 or x.shape[2] != c.hidden_size:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [B, T, {c.hidden_size}]")
        batch, tokens, _ = x.shape
        if in_place and tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        if in_place:
            check_no_gradients(self, x)
        if sequences is not None and (attention_mask is not None or cu_seqlens is not None):
            raise ValueError("sequences is given beside attention_mask or cu_seqlens; give one of them")
        if sequences is None:
            sequences = Sequences.of(attention_mask, cu_seqlens, (batch, tokens), x.device)
        elif sequences.row.shape != (batch, tokens):
            raise ValueError(f"sequences are of tokens {list(sequences.row.shape)}; x has {[batch, tokens]}")
        rows = batch if sequences is None else sequences.lengths.shape[0]
        of_model = isinstance(state, ModelsState)
        if state is None or not of_model:
            state = RamState.ready(state, [self], rows, self.log_scale, x.device, in_place)
        if sequences is not None:
            x = sequences.without_padding(x)
        address, value = self.query_key_value(x).split([2 * self.address_width, c.num_heads * c.value_dim], dim=-1)
        address = address.view(batch, tokens, 2, c.num_heads, c.order, c.sub_dim)
        if self.address_bias is not None:
            address = address + self.address_bias
        logits = address * (self.log_scale.exp() / c.temperature)[..., None, None]
        slots, weights = ops.address_decode(logits, c.top_k)  # [B, T, 2, H, K]
        value = value.view(batch, tokens, c.num_heads, c.value_dim)
        lengths: Tensor | int = tokens
        cu_seqlens = None
        if sequences is not None:
            weights, lengths, cu_seqlens = sequences.without_padding(weights), sequences.lengths, sequences.cu_seqlens
        if self.cape_heads:
            if sequences is None:
                at = state.position.unsqueeze(1) + torch.arange(tokens, device=x.device)  # [B, T]
            else:
                at = sequences.positions(state.position)
            uses_cape = torch.arange(c.num_heads, device=x.device) < self.cape_heads
            slots = ops.cyclic_shift(slots, (at.unsqueeze(-1) * uses_cape)[:, :, None, :, None], c.slots)
        (memory,), (mass,) = state.memory, state.mass
        if in_place and cu_seqlens is None:
            (read_slots, write_slots), (read_weights, write_weights) = slots[:, 0].unbind(1), weights[:, 0].unbind(1)
            out = ops.memory_step(
                write_slots, write_weights, read_slots, read_weights, value[:, 0], memory, mass, c.decay_power, c.eps,
                in_range=True,
            ).unsqueeze(1)  # fmt: skip  # [B, 1, H, D]
        else:
            read_slots, write_slots = slots.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, K]
            read_weights, write_weights = weights.permute(2, 0, 3, 1, 4).unbind(0)
            out, new_memory, new_mass = ops.memory_scan(
                write_slots, write_weights, read_slots, read_weights, value.transpose(1, 2),
                memory, mass, c.decay_power, c.eps, c.proxy_eps, cu_seqlens=cu_seqlens, in_range=True,
            )  # fmt: skip
            out = out.transpose(1, 2)  # [B, T, H, D]
            if in_place:  # a token among several documents, of which all but one are empty
                memory.copy_(new_memory)
                mass.copy_(new_mass)
            else:
                state = RamState([new_memory], [new_mass], [], state.position if of_model else state.position + lengths)
        if in_place and not of_model:
            state.position.add_(lengths)
        return RamLayerOutput(self.output(out.flatten(2)), state)
