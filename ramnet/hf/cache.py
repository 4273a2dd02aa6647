"""The state of a RAM-Net as transformers' cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from ramnet.state import RamState


class HFRamNetCache(Cache):
    """A cache of fixed size, updated by each call of the model it is given to.

    Args:
        state: the state before the next token; None is a fresh one. Single tokens update its tensors in place.

    Attributes:
        state: the ``RamState`` after all tokens that the model has read, or None before the first.
        columns: T of all ``input_ids`` that the model has read with this cache, padding included; not the tokens that
            a given ``state`` had read before.
    """

    def __init__(self, state: RamState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.columns = 0
        self._masks: list[tuple[int, Tensor]] = []  # of inputs with a mask: the first column, and [B, T]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(columns={self.columns}, state={self.state})"

    def has_read(self, state: RamState, tokens: int, attention_mask: Tensor | None) -> None:
        """Take the state after ``tokens`` more columns, and their mask [B, T]."""
        if attention_mask is not None:
            self._masks.append((self.columns, attention_mask.bool()))
        self.state = state
        self.columns += tokens

    def check_mask(self, attention_mask: Tensor) -> None:
        """Raise ValueError if a mask of the columns before, [B, columns] or [B, 0], is not what they were read with.

        A cache that was made from a state knows of no columns.
        """
        columns = attention_mask.shape[1]
        if not self.columns or not columns:
            return
        if columns != self.columns:
            raise ValueError(
                f"attention_mask has {columns} columns before those of the input; the cache has read {self.columns}"
            )
        read = torch.ones_like(attention_mask, dtype=torch.bool)
        for first, mask in self._masks:
            read[:, first : first + mask.shape[1]] = mask
        differs = read != attention_mask.bool()
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            was, given = ("a token", 0) if bool(read[row, column]) else ("padding", 1)
            raise ValueError(
                f"attention_mask[{row}, {column}] is {given}, but the cache has read {was} there and cannot undo it"
            )

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.memory)

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return ``columns``, by which ``generate`` finds which of the ids that it is given are new."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return −1: the size of the state does not limit the length."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether the model has read anything."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """B, or −1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """False: what was written over is gone."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """[False], which tells ``generate`` that ``get_seq_length`` counts the ids."""
        return [False]

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.columns, self._masks = None, 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``beam_idx[i]`` row i; ``beam_idx`` is int64 [B']."""
        if self.state is not None:
            rows = beam_idx.to(self.state.position.device)
            self.state = self.state.reorder(rows)
            self._masks = [(first, mask[rows.to(mask.device)]) for first, mask in self._masks]

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times, the copies side by side."""
        if self.state is not None:
            rows = self.state.position.new_tensor(range(self.state.batch_size)).long()
            self.reorder_cache(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless ``tokens_to_remove`` is 0."""
        if tokens_to_remove:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}; a RAM-Net's state cannot forget its last tokens")
