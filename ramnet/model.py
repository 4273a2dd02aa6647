"""The RAM-Net language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ramnet.blocks import Block, GatedConvBlock
from ramnet.config import RamNetConfig
from ramnet.files import written_aside
from ramnet.generation import generate
from ramnet.ids import check_range, check_type
from ramnet.loss import IGNORED, check_labels, next_labels, summed_cross_entropy
from ramnet.sequences import Sequences
from ramnet.state import RamState, read_safetensors, write_safetensors
from ramnet.state_checks import check_no_gradients

WEIGHT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_Model = TypeVar("_Model", bound=nn.Module)


class RamNetOutput(NamedTuple):
    """Output of ``RamNetForCausalLM``.

    Attributes:
        logits: [B, T, V].
        state: the state after the last token.
        loss: the mean cross entropy in nats, or None if no labels were given.
    """

    logits: Tensor
    state: RamState
    loss: Tensor | None = None


# A named tuple is a pytree without registration; torch.export.save also needs a name to serialise it under.
_pytree._register_namedtuple(RamNetOutput, serialized_type_name="ramnet.RamNetOutput")


class RamNetForCausalLM(nn.Module):
    """A language model of RAM-Net blocks."""

    def __init__(self, config: RamNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.convs = nn.ModuleList(GatedConvBlock(config) for _ in range(config.conv_layers))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        nn.init.constant_(self.norm.weight, config.final_gain)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        state: RamState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
        logits_to_keep: int | None = None,
        labels: Tensor | None = None,
    ) -> RamNetOutput:
        """Compute logits and the state after the last token, and the loss if ``labels`` are given.

        Args:
            input_ids: int64 [B, T]; T = 0 returns the state unchanged.
            state: the state after the tokens before ``input_ids``; None starts from a fresh one. It is not modified
                unless ``in_place``.
            attention_mask: bool or integer [B, T], True or 1 for a token and False or 0 for padding, which may be
                anywhere in a row. The logits and the state of a row are those of the row without its padding. The ids
                of padding must be in the vocabulary; their logits are meaningless.
            cu_seqlens: int32 or int64 [S + 1], for ids [1, T] that hold S documents one after another: the offset at
                which each document begins, then T. Each document is computed as if it were alone; states have S rows.
            in_place: update ``state`` in place and return it, so that a token costs O(K·D) for any M. Needs T = 1 and
                no gradients.
            logits_to_keep: return logits of this many last tokens only; 0 returns all. None returns all without
                ``labels``, and none with them.
            labels: int64 [B, T], usually ``input_ids`` itself. They are shifted internally: token t predicts label
                t + 1. Labels of −100, of padding and of the first token of each sequence are ignored.

        Returns:
            ``logits`` [B, T, V], or [B, min(T, logits_to_keep), V], and ``state``. A sequence may be split over several
            calls. With ``labels`` also ``loss``, the mean cross entropy in nats, float32 or float64; NaN if all labels
            are ignored. Logits that only the loss needs are computed ``ramnet.loss.LOGITS_AT_ONCE`` elements at a time.

        Raises:
            ValueError: if ids or labels are not [B, T] or, on the CPU, outside the vocabulary; if ``state`` does not
                fit the model, batch or device (``RamState.check``); if the mask or the documents do not fit
                (``Sequences.padded``, ``Sequences.packed``); if ``in_place`` is set and T ≠ 1 or gradients are asked
                for; or if ``logits_to_keep`` is negative. ``state`` is not modified then. On a GPU, torch's device-side
                assertion stops at an id outside the vocabulary, and the values of a mask are not checked.
            TypeError: if ids or labels are not integers, or a mask, documents or a state have a wrong dtype.
        """
        if logits_to_keep is not None and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; it must be >= 0")
        if labels is not None:
            check_labels(labels, input_ids, self.config.vocab_size)
        hidden, state = self.hidden_states(
            input_ids, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens, in_place=in_place
        )
        if labels is None:
            return RamNetOutput(self.run_head(hidden[:, -(logits_to_keep or 0) :]), state)
        wanted = next_labels(labels, attention_mask, cu_seqlens).flatten()
        before = hidden[:, :-1].flatten(0, 1)
        loss = summed_cross_entropy(self.run_head, before, wanted, self.config.vocab_size) / (wanted != IGNORED).sum()
        kept = hidden[:, :0] if logits_to_keep is None else hidden[:, -logits_to_keep:]
        return RamNetOutput(self.run_head(kept), state, loss)

    def run_conv(
        self, conv: nn.Module, x: Tensor, recent: Tensor, in_place: bool, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        """Call a convolution block. A subclass may override this, ``run_block`` and ``run_head``, also if compiled."""
        return self._call_conv(conv, x, recent, in_place, sequences)

    def run_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Call a RAM-Net block."""
        return self._call_block(block, x, memory, mass, position, in_place, sequences)

    def run_head(self, hidden: Tensor) -> Tensor:
        """Call the output head."""
        return self.head(hidden)

    # ``lowering.compile`` overrides these two, so that the methods above are left to subclasses.
    def _call_conv(
        self, conv: nn.Module, x: Tensor, recent: Tensor, in_place: bool, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        return conv(x, recent, sequences)

    def _call_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return block(x, memory, mass, position, in_place, sequences)

    def hidden_states(
        self,
        input_ids: Tensor,
        state: RamState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
        block_inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, RamState]:
        """Return the input of the output head, [B, T, C], and the state; arguments and errors as in ``forward``.

        The input of each block, [B, T, C], is added to ``block_inputs``.
        """
        check_type(input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T]")
        try:
            x = self.embedding(input_ids)
        except IndexError:  # torch checks every id, but its message does not name the wrong one
            check_range(input_ids, self.config.vocab_size)
            raise
        return self.run_layers(
            x, state, attention_mask=attention_mask, cu_seqlens=cu_seqlens, in_place=in_place, block_inputs=block_inputs
        )

    def run_layers(
        self,
        x: Tensor,
        state: RamState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
        block_inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, RamState]:
        """Return what ``hidden_states`` does, for embeddings ``x`` [B, T, C] instead of ids."""
        batch, tokens, _ = x.shape
        if in_place and tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        if in_place:
            check_no_gradients(self, x)
        sequences = Sequences.of(attention_mask, cu_seqlens, (batch, tokens), x.device)
        rows, lengths = (batch, tokens) if sequences is None else (sequences.lengths.shape[0], sequences.lengths)
        state = RamState.ready(state, self.config, rows, self.embedding.weight, x.device, in_place)
        memory, mass, conv = [], [], []
        for block, recent in zip(self.convs, state.conv, strict=True):
            if block_inputs is not None:
                block_inputs.append(x)
            x, recent = self.run_conv(block, x, recent, in_place, sequences)
            conv.append(recent)
        for block, layer_memory, layer_mass in zip(self.blocks, state.memory, state.mass, strict=True):
            if block_inputs is not None:
                block_inputs.append(x)
            x, layer_memory, layer_mass = self.run_block(
                block, x, layer_memory, layer_mass, state.position, in_place, sequences
            )
            memory.append(layer_memory)
            mass.append(layer_mass)
        if in_place:
            for old, new in zip(state.conv, conv, strict=True):
                old.copy_(new)
            state.position.add_(lengths)
            return self.norm(x), state
        return self.norm(x), RamState(memory, mass, conv, state.position + lengths)

    generate = generate

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to ``directory``, each atomically. Weights keep their dtype.

        Raises:
            ValueError: if a weight holds NaN or infinity, the head differs from the embedding although the config ties
                them, or the weights are not those of the config, as those of adapters are not. Nothing is written then.
            OSError: if a file cannot be written; the message names it.
        """
        directory = Path(directory)
        # A quantised module also keeps what is no tensor.
        tensors = {name: x for name, x in self.state_dict().items() if isinstance(x, Tensor)}
        if (name := not_finite(tensors)) is not None:
            raise ValueError(f"{name} holds NaN or infinity; {directory} is left as it is")
        head = tensors.pop("head.weight", None) if self.config.tie_embeddings else None
        if head is not None and not torch.equal(head, tensors["embedding.weight"]):
            raise ValueError("head.weight differs from embedding.weight, but tie_embeddings is True in the config")
        if type(self).__init__ is RamNetForCausalLM.__init__:  # a subclass may have weights of its own
            with torch.device("meta"):
                needed = type(self)(self.config)
            if (unfit := _unfit(needed, tensors)) is not None:
                raise ValueError(f"the model does not fit its config: {unfit}; {directory} is left as it is")
        # The new config stays in its temporary file until the weights are written, so that a full disk leaves both old
        # files.
        with written_aside(directory / "config.json") as aside:
            aside.write_text(self.config.to_json(), encoding="utf-8")
            write_safetensors(directory / "model.safetensors", tensors)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a model that ``save_pretrained`` wrote. Weights have the dtype that they have in the file.

        Raises ValueError if a file is missing or damaged or does not fit the config; the message names the file.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
        config = RamNetConfig.load(directory / "config.json")
        path = directory / "model.safetensors"
        return cls.read(config, read_safetensors(path), path)

    @classmethod
    def read(cls, config: RamNetConfig, tensors: dict[str, Tensor], path: Path) -> Self:
        """Return the model of the ``tensors`` that were read from ``path``.

        Raises ValueError, naming ``path``, if they do not fit ``config``.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_TYPES:
                raise ValueError(f"{path}: {name} is {tensor.dtype}; it must be a floating type of 16 to 64 bits")
        if config.tie_embeddings and "head.weight" in tensors:
            raise ValueError(f"{path} holds head.weight, but config.json ties the head to embedding.weight")
        with torch.device("meta"):
            model = cls(config)
        if (unfit := _unfit(model, tensors)) is not None:
            raise ValueError(f"{path} does not fit its config.json: {unfit}")
        return filled(model, tensors)

    @classmethod
    def of(cls, config: RamNetConfig, tensors: Mapping[str, Tensor]) -> Self:
        """Return the model whose parameters are ``tensors``, without copying them or drawing random weights."""
        with torch.device("meta"):
            model = cls(config)
        return filled(model, tensors)


def _unfit(model: RamNetForCausalLM, tensors: Mapping[str, Tensor]) -> str | None:
    """Return which of ``tensors``, without a head that is tied, are not the weights of ``model``, or None."""
    needed, given = ({name: list(x.shape) for name, x in some.items()} for some in (model.state_dict(), tensors))
    if model.config.tie_embeddings:
        del needed["head.weight"]
    unfit = sorted(name for name in needed | given if needed.get(name) != given.get(name))
    if not unfit:
        return None
    name, others = unfit[0], f"; {len(unfit) - 1} others do not fit either" if unfit[1:] else ""
    return f"{name} is {given.get(name, 'missing')}; it must be {needed.get(name, 'absent')}{others}"


def filled(model: _Model, tensors: Mapping[str, Tensor]) -> _Model:
    """Make ``tensors`` the parameters of a model on the meta device, without copying them, and return it."""
    parts: Any = model
    tied = {"head.weight": tensors["embedding.weight"]} if parts.config.tie_embeddings else {}
    model.load_state_dict({**tensors, **tied}, assign=True)
    if tied:
        parts.head.weight = parts.embedding.weight
    return model


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    # aminmax propagates NaN and, unlike isfinite, allocates no tensor of the same size.
    bad = (name for name, x in tensors.items() if x.numel() and not all(y.isfinite() for y in x.aminmax()))
    return next(bad, None)
