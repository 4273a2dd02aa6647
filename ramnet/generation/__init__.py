"""Text from a model: ``generate`` (call.py) samples token by token (sampled.py) or searches with beams (beams.py).

Both read tokens in parts of bounded size (reading.py) and end where a stop was said (stopping.py); sampling.py turns
logits into a token.
"""

from ramnet.generation.call import generate

__all__ = ["generate"]
