"""RAM-Net: the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from ramnet.config import RamLayerConfig, RamNetConfig
from ramnet.files import written_aside
from ramnet.generation import generate
from ramnet.ids import check_range, check_type
from ramnet.layer import RamLayer
from ramnet.loss import IGNORED, check_labels, next_labels, summed_cross_entropy
from ramnet.sequences import Sequences
from ramnet.state import RamState, read_safetensors, write_safetensors

WEIGHT_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RamNetOutput(NamedTuple):
    """logits [B, T, V], the state after the last token, and the loss where labels were given."""

    logits: Tensor
    state: RamState
    loss: Tensor | None = None


# A named tuple is a pytree by itself; its name lets torch.export.save write a program that gives one.
_pytree._register_namedtuple(RamNetOutput, serialized_type_name="ramnet.RamNetOutput")


class SwiGLU(nn.Module):
    """The gated feed-forward network of width ``intermediate_size``."""

    def __init__(self, config: RamNetConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + RAM(LayerNorm(x)), then x + FFN(LayerNorm(x)) (paper, step 8)."""

    def __init__(self, config: RamNetConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        fields = {name: getattr(config, name) for name in RamLayerConfig.model_fields}
        self.mixer = RamLayer(**fields, cape_heads=config.cape_heads(layer))
        self.has_ffn = config.intermediate_size > 0
        if self.has_ffn:
            self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
            self.ffn = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        mass: Tensor,
        position: Tensor,
        in_place: bool,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The model counts the position of all its layers; in place, each would count it on.
        state = RamState([memory], [mass], [], position.clone() if in_place else position)
        mixed, state = self.mixer(self.mixer_norm(x), state, in_place=in_place, sequences=sequences)
        x = x + mixed
        if self.has_ffn:
            x = x + self.ffn(self.ffn_norm(x))
        return x, state.memory[0], state.mass[0]


class GatedConvBlock(nn.Module):
    """x + conv(h) · W h with h = LayerNorm(x), the conv depthwise, causal and short.

    The local mixer that the recall task's models put before the layer under test; the paper's model has none.
    """

    def __init__(self, config: RamNetConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)
        self.taps = nn.Parameter(torch.randn(config.conv_kernel, config.hidden_size) / config.conv_kernel**0.5)

    def forward(self, x: Tensor, recent: Tensor, sequences: Sequences | None = None) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        along = h if sequences is None else sequences.gather(h)
        tokens = along.shape[1]
        seen = torch.cat([recent.to(h.dtype), along], dim=1)  # [B, kernel − 1 + T, C]
        if tokens == 1:  # two operations take 7 µs where the dozen below take 45
            conv = (self.taps * seen).sum(1, keepdim=True)
        else:
            conv = sum(tap * seen[:, i : i + tokens] for i, tap in enumerate(self.taps))
        if sequences is None:
            last = seen[:, tokens:]
        else:
            conv = sequences.scatter(conv)
            at = sequences.lengths.unsqueeze(1) + torch.arange(recent.shape[1], device=x.device)
            last = seen.gather(1, at.unsqueeze(2).expand(-1, -1, seen.shape[2]))
        # A copy, or the state would hold the whole sequence's memory.
        recent = last.to(recent.dtype, copy=True, memory_format=torch.contiguous_format)
        return x + h + conv * self.gate(h), recent


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
        """Logits of every token, or of the last ones, the state after the last, and the loss where labels are given.

        Args:
            input_ids: int64 [B, T]; T = 0 returns the state unchanged.
            state: what came before; a fresh one when None. It is left as it was unless ``in_place``.
            attention_mask: bool or int64 [B, T], True or 1 for a token and False or 0 for padding, which may be
                anywhere in a row. Each row then gives what it gives without its padding, and ``state`` is that of its
                tokens alone. The ids of padding must be in the vocabulary; their logits mean nothing.
            cu_seqlens: int32 or int64 [D + 1], for ids [1, T] that hold D documents one after another: where each
                begins, and T. Each gives what it gives alone; ``state``, before and after, has D rows. The scan runs
                them side by side, each as long as the longest.
            in_place: for T = 1 without gradients, update ``state`` in place and return it, so that a token costs
                O(K·D) whatever M is.
            logits_to_keep: how many tokens to give logits of, counted from the last; 0 for all, and None for all
                without ``labels`` and for none with them.
            labels: int64 [B, T], ``input_ids`` itself for a language model; −100 counts for nothing. They are shifted
                inside: the logits of token t are to predict label t + 1, so that label 0 is not used. Neither are
                those of padding and of the first token of a document.

        Returns:
            ``logits`` [B, T, V], or [B, min(T, logits_to_keep), V], and ``state``. Splitting a sequence over several
            calls changes nothing. With ``labels`` also ``loss``, the mean cross entropy in nats of the labels that
            count (NaN where none does), float32 or float64. The logits that only the loss needs are made
            ``ramnet.loss.LOGITS_AT_ONCE`` numbers at a time.

        Raises:
            ValueError: for ids that are not [B, T] or, on the CPU, outside the vocabulary, labels likewise or of
                another shape, a state of another model, batch or device, a mask or documents that do not fit
                (``Sequences.padded``, ``.packed``), ``in_place`` with T ≠ 1, or a negative ``logits_to_keep``. On a
                GPU, where a look at the ids would wait for the device, torch's assertion stops it at an id outside the
                vocabulary, and a mask is not looked at. A state that is refused is as it was: see ``RamState.check``.
            TypeError: for ids that are not integers, and other types that do not fit.
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
        """Call a convolution block; this, ``run_block`` and ``run_head`` are what ``lowering.compile`` overrides."""
        return conv(x, recent, sequences)

    def run_block(
        self, block: nn.Module, x: Tensor, memory: Tensor, mass: Tensor, position: Tensor, in_place: bool,
        sequences: Sequences | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Call a RAM-Net block."""
        return block(x, memory, mass, position, in_place, sequences)

    def run_head(self, hidden: Tensor) -> Tensor:
        """Call the output head."""
        return self.head(hidden)

    def hidden_states(
        self,
        input_ids: Tensor,
        state: RamState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        in_place: bool = False,
    ) -> tuple[Tensor, RamState]:
        """What ``head`` turns into logits, [B, T, C], and the state; arguments and errors as in ``forward``."""
        check_type(input_ids)
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {list(input_ids.shape)}; it must be [B, T]")
        batch, tokens = input_ids.shape
        if in_place and tokens != 1:
            raise ValueError(f"in_place takes one token at a time, not {tokens}")
        sequences = Sequences.of(attention_mask, cu_seqlens, (batch, tokens), input_ids.device)
        rows, lengths = (batch, tokens) if sequences is None else (sequences.lengths.shape[0], sequences.lengths)
        state = RamState.ready(state, self.config, rows, self.embedding.weight, input_ids.device, in_place)
        try:
            x = self.embedding(input_ids)
        except IndexError:  # torch looks at every id anyway, but names none
            check_range(input_ids, self.config.vocab_size)
            raise
        memory, mass, conv = [], [], []
        for block, recent in zip(self.convs, state.conv, strict=True):
            x, recent = self.run_conv(block, x, recent, in_place, sequences)
            conv.append(recent)
        for block, layer_memory, layer_mass in zip(self.blocks, state.memory, state.mass, strict=True):
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
        """Write ``config.json`` and ``model.safetensors`` in ``directory``, whole or not at all.

        Each weight keeps its type. ValueError, before anything is written, for a weight that holds NaN or infinity, or
        a head of its own where the config ties it to the embedding. OSError, naming the file, where it cannot be
        written.
        """
        directory = Path(directory)
        tensors = {name: x.contiguous() for name, x in self.state_dict().items()}
        if (name := not_finite(tensors)) is not None:
            raise ValueError(f"{name} holds NaN or infinity; {directory} is left as it is")
        if self.config.tie_embeddings and not torch.equal(tensors.pop("head.weight"), tensors["embedding.weight"]):
            raise ValueError("head.weight differs from embedding.weight, but tie_embeddings is True in the config")
        # The new config waits aside until the weights are there, so that a full disk leaves the old pair.
        with written_aside(directory / "config.json") as aside:
            aside.write_text(self.config.to_json(), encoding="utf-8")
            write_safetensors(directory / "model.safetensors", tensors)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a model that ``save_pretrained`` wrote, each weight in the type that it has in the file.

        ValueError, naming the file, where it is none.
        """
        directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
        config = RamNetConfig.load(directory / "config.json")
        path = directory / "model.safetensors"
        tensors = read_safetensors(path)
        for name, tensor in tensors.items():
            if tensor.dtype not in WEIGHT_TYPES:
                raise ValueError(f"{path}: {name} is {tensor.dtype}; it must be a floating type of 16 to 64 bits")
        if config.tie_embeddings and "head.weight" in tensors:
            raise ValueError(f"{path} holds head.weight, but config.json ties the head to embedding.weight")
        with torch.device("meta"):
            model = cls(config)
        if config.tie_embeddings and "embedding.weight" in tensors:
            tensors["head.weight"] = tensors["embedding.weight"]
        needed, given = ({name: list(x.shape) for name, x in some.items()} for some in (model.state_dict(), tensors))
        unfit = sorted(name for name in needed | given if needed.get(name) != given.get(name))
        if unfit:
            name, others = unfit[0], f"; {len(unfit) - 1} others do not fit either" if unfit[1:] else ""
            raise ValueError(
                f"{path} does not fit its config.json: {name} is {given.get(name, 'missing')};"
                f" it must be {needed.get(name, 'absent')}{others}"
            )
        model.load_state_dict(tensors, assign=True)
        if config.tie_embeddings:
            model.head.weight = model.embedding.weight
        return model


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, if one does."""
    # The extremes carry a NaN along, and need no copy of the tensor.
    bad = (name for name, x in tensors.items() if x.numel() and not all(y.isfinite() for y in x.aminmax()))
    return next(bad, None)
