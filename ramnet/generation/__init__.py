"""Text generation: ``generate`` (call.py) samples token by token (sampled.py) or runs beam search (beams.py).

Both read tokens in chunks of bounded size (reading.py) and end at stop tokens or strings (stopping.py). sampling.py
draws a token from logits.
"""

from ramnet.generation.call import generate

__all__ = ["generate"]
