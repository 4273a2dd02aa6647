"""The Transformer++ that decoding is compared with: its graph of one token equals the model over all tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from autotune.bench.peers import transformer
from autotune.bench.peers.transformer import Session, Sizes, weights

SIZES = Sizes(vocabulary=31, width=32, inner=48, layers=2, heads=2)
CAPACITY, SCALE = 12, 0.3


def read_back(folder):
    values = np.fromfile(folder / transformer.WEIGHTS, np.float32)
    found = {}
    for name, shape in weights(SIZES).items():
        size = int(np.prod(shape))
        found[name], values = torch.from_numpy(values[:size].reshape(shape)), values[size:]
    assert len(values) == 0
    return found


def rotated(x, angles):
    """Rotate the pair of element i and element i + head / 2 by angle i. x is [heads, T, head]."""
    one, other = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def logits(w, ids):
    s = SIZES
    angles = torch.arange(len(ids))[:, None] / 10_000 ** (torch.arange(0, s.head, 2) / s.head)
    x = w["embedding"][ids]
    for i in range(s.layers):
        qkv = (F.rms_norm(x, [s.width], eps=1e-5) @ w[f"{i}.qkv"]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (s.heads, -1)).transpose(0, 1) for part in qkv)
        y = F.scaled_dot_product_attention(rotated(q, angles), rotated(k, angles), v, is_causal=True)
        x = x + y.transpose(0, 1).flatten(1) @ w[f"{i}.output"]
        gate, up = (F.rms_norm(x, [s.width], eps=1e-5) @ w[f"{i}.gate_up"]).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w[f"{i}.down"]
    return F.rms_norm(x, [s.width], eps=1e-5) @ w["head"]


def test_tokens_with_a_cache_are_those_of_the_whole_sequence(tmp_path):
    pytest.importorskip("onnxruntime", reason="the graph needs onnxruntime: pip install 'ramnet[export]'")
    session = Session(transformer.write(SIZES, tmp_path, CAPACITY, SCALE), threads=1)
    ids = torch.randint(SIZES.vocabulary, (CAPACITY,), generator=torch.Generator().manual_seed(0))
    expected = logits(read_back(tmp_path), ids)
    found = torch.stack([torch.from_numpy(session.token(int(id), i).copy()) for i, id in enumerate(ids)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    session.token(5, 3)  # overwrites token 3 and needs no other
    after = logits(read_back(tmp_path), torch.tensor([*ids[:3], 5]))[-1]
    torch.testing.assert_close(torch.from_numpy(session.token(5, 3)), after, rtol=1e-4, atol=1e-4)
