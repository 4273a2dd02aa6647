"""The library tells which slots the last token read and wrote."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from ramnet import RamNetConfig, ops
from ramnet.ops import Accesses
from tests.lowering.aot.c_library import OTHER_SIZES, TINY, CLibrary, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


def accesses_of(library: CLibrary, state: ctypes.c_void_p, layer: int) -> list[np.ndarray]:
    """Return slots and weights [2, H, K] of the last token, reads first."""
    heads, top_k = library.c.ramnet_heads(layer), library.c.ramnet_top_k(layer)
    shape = (2, heads, top_k)
    found = [np.empty(shape, np.int32), np.empty(shape, np.float32)]
    library.call("state_accesses", state, layer, *(x.ctypes.data_as(ctypes.c_void_p) for x in found))
    return found


@pytest.mark.parametrize("config", [TINY, OTHER_SIZES], ids=["tiny", "layers of other sizes"])
@torch.no_grad()
def test_accesses_are_those_of_the_eager_model(
    config: RamNetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(config)
    calls: list[Accesses[torch.Tensor]] = []
    scan = ops.memory_scan

    def recorded(*tensors: torch.Tensor, **settings: object) -> object:
        calls.append(Accesses(*tensors[:4]))
        return scan(*tensors, **settings)

    monkeypatch.setattr(ops, "memory_scan", recorded)
    ids = ids_of(50, config.vocab_size)  # further than a block
    model(torch.from_numpy(ids.astype(np.int64))[None])
    library = CLibrary(model, tmp_path)
    state, copy = library.state(), ctypes.c_void_p()
    with pytest.raises(RuntimeError, match="has read no token"):
        accesses_of(library, state, 0)
    library.tokens(state, ids, 0)
    library.call("state_clone", state, ctypes.byref(copy))
    assert len(calls) == config.num_layers
    for layer, want in enumerate(calls):
        for each in (state, copy):
            (read, written), (read_weights, write_weights) = accesses_of(library, each, layer)
            assert np.array_equal(read, want.read_slots[0, :, -1].numpy())
            assert np.array_equal(written, want.write_slots[0, :, -1].numpy())
            assert np.allclose(read_weights, want.read_weights[0, :, -1].numpy(), atol=1e-6)
            assert np.allclose(write_weights, want.write_weights[0, :, -1].numpy(), atol=1e-6)
        sizes = [getattr(library.c, f"ramnet_{name}")(layer) for name in ("heads", "slots", "top_k")]
        assert sizes == [config.layers[layer].num_heads, config.layers[layer].slots, config.layers[layer].top_k]
    last = config.num_layers - 1
    with pytest.raises(RuntimeError, match=rf"layer is {last + 1}; it must be in 0\.\.{last}"):
        accesses_of(library, state, last + 1)
    assert library.c.ramnet_heads(last + 1) == library.c.ramnet_slots(-1) == 0
    library.c.ramnet_state_reset(state)
    with pytest.raises(RuntimeError, match="has read no token"):
        accesses_of(library, state, 0)
