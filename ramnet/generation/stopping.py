"""Watching for stop tokens and stop strings."""

from __future__ import annotations

import torch
from torch import Tensor

from ramnet.generation.options import Stops


class Watch:
    """Checks the generated tokens of each row for stops."""

    def __init__(self, stops: Stops, rows: int, device: torch.device) -> None:
        self.stops = stops
        self.tokens = torch.tensor(stops.tokens, dtype=torch.int64, device=device)
        self.generated: list[list[int]] = [[] for _ in range(rows)]

    def after(self, token: Tensor) -> Tensor:
        """Return bool [B], whether the tokens, int64 [B], end their rows. Stop strings synchronise with the device."""
        ended = torch.isin(token, self.tokens)
        if self.stops.strings:
            for row, each in zip(self.generated, token.tolist(), strict=True):
                row.append(each)
            found = [self.stops.found_in(row) for row in self.generated]
            ended = ended | torch.tensor(found, device=token.device)
        return ended

    def reorder(self, index: Tensor) -> None:
        """Give row i the tokens of row ``index[i]``."""
        if self.stops.strings:
            self.generated = [list(self.generated[i]) for i in index.tolist()]
