"""Sample inputs and outputs that lie beside an exported model, so that anyone can repeat its verification."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ramnet import RamNetForCausalLM

FILENAME = "samples.safetensors"
TOKENS = 64

# Where the logarithms of an address's K-th and next weights are nearer than this, rounding may decide which slot is
# chosen. They are within this of one token in 40 of "tiny" and two of three of "340m", with random weights.
MARGIN = 5e-5
_TRIES = 16

# By precision: the largest relative L2 error of the logits. The samples are PyTorch's logits with the weights as they
# are stored, so that only integers, which round the activations too, are allowed more than float32's rounding. Near
# ties of slots, that changes which are read, all the more in a deep model without training: "340m" with random weights
# is off by 0.22 in int8, though its predictions lose 0.12 %. Unrelated logits are off by 1.4.
TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-4, "int8": 0.5, "int4": 0.5}


class Samples(NamedTuple):
    """Ids, int32 [T], and PyTorch's logits after each of them, float32 [T, V], from a state before the first token."""

    ids: NDArray[np.int32]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, model: RamNetForCausalLM) -> Self:
        """Run PyTorch on ``TOKENS`` random ids.

        Two right programs may choose different slots where two weights are equal up to rounding, and their logits then
        differ by far more than rounding. So a token is drawn again, up to 16 times, while an address of it has its K-th
        and next weights within ``MARGIN``.
        """
        import torch

        from export.margins import margins
        from ramnet import RamState

        generator, vocabulary = torch.Generator().manual_seed(0), model.config.vocab_size
        ids, logits = np.empty(TOKENS, np.int32), np.empty((TOKENS, vocabulary), np.float32)
        state = RamState.zeros(model.config, 1)
        with torch.no_grad(), margins() as smallest:
            for t in range(TOKENS):
                best = -1.0
                for _ in range(_TRIES):
                    token = torch.randint(vocabulary, (1, 1), generator=generator)
                    output = model(token, state)
                    if (margin := smallest()) > best:
                        best, ids[t], logits[t], after = margin, int(token), output.logits[0, 0].numpy(), output.state
                    if best >= MARGIN:
                        break
                state = after
        return cls(ids, logits)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the samples of an export. Raises ValueError if there are none."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = directory / FILENAME
        try:
            tensors = load_file(path)
            return cls(tensors["ids"], tensors["logits"])
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} does not hold samples: {error}") from None

    def save(self, directory: Path) -> None:
        import torch

        from ramnet.state import write_safetensors

        write_safetensors(directory / FILENAME, {name: torch.from_numpy(x) for name, x in self._asdict().items()})

    def error(self, logits: NDArray[np.float32]) -> float:
        """Return the relative L2 error of other logits: infinite if one of them is not finite, or if only these are
        all 0."""
        difference = float(np.linalg.norm((logits - self.logits).astype(np.float64)))
        size = float(np.linalg.norm(self.logits.astype(np.float64)))
        if size == 0:
            return 0.0 if difference == 0 else np.inf
        return difference / size if np.isfinite(difference) else np.inf
