"""Text generation: ``generate`` (call.py) samples token by token (sampled.py) or runs beam search (beams.py).

Both read tokens in chunks of bounded size (reading.py) and end at stop tokens or strings (stopping.py). sampling.py
draws a token from logits. options.py checks what a caller asks for, without PyTorch.
"""

from typing import TYPE_CHECKING

from ramnet.lazy import attributes

if TYPE_CHECKING:
    from ramnet.generation.call import generate

__all__ = ["generate"]

# ``generate`` is imported on first use, so that options.py can be imported where torch is not installed.
__getattr__, __dir__ = attributes(__name__, {"generate": "ramnet.generation.call"})
