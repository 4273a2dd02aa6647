"""The compiled token equals the eager model: alone, in blocks, for several sequences, on several threads."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowering.aot import build, weights
from ramnet import RamNetConfig
from tests.lowering.aot.c_library import OTHER_SIZES, TINY, CLibrary, as_stored, eager_logits, error, ids_of, model_of

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
from lowering.aot.machines import WASM, host
from lowering.aot.matrix import Tiling
from lowering.aot.token import default_tiling

ODD: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 18, "num_layers": 3, "num_heads": 3, "value_dim": 7, "order": [3, 1, 3],
    "sub_dim": [3, 7, 3], "top_k": 5, "cape_full_layers": 1, "cape_half_layers": 1, "decay_power": 2.5,
    "temperature": 0.7,
}  # fmt: skip
CONFIGS = {
    "tiny": TINY,
    "odd sizes, no FFN, tied": RamNetConfig(**ODD, tie_embeddings=True),
    "all sizes 1": RamNetConfig(
        vocab_size=3,
        hidden_size=1,
        num_layers=1,
        num_heads=1,
        value_dim=1,
        order=3,
        sub_dim=3,
        top_k=27,
        intermediate_size=1,
        decay_power=0.5,
    ),
    "layers of other sizes, long convolution, bias": OTHER_SIZES,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("threads", [1, 3])
def test_float32_equals_the_eager_model(name: str, threads: int, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = model_of(config)
    library = CLibrary(model, tmp_path, threads=threads)
    ids = ids_of(70, config.vocab_size)  # two full blocks and a part of one
    want = eager_logits(model, ids)
    state = library.state()
    assert error(np.stack([library.token(state, int(each)) for each in ids]), want) < 1e-5
    assert error(library.tokens(library.state(), ids, 70), want) < 1e-5
    state = library.state()
    library.tokens(state, ids[:3], 0)
    assert error(library.tokens(state, ids[3:], 40), want[30:]) < 1e-5
    assert library.c.ramnet_state_position(state) == 70


@pytest.mark.parametrize(("precision", "allowed"), [("bfloat16", 1e-5), ("int8", 0.05), ("int4", 0.05)])
def test_stored_weights_are_read_as_they_are_stored(precision: str, allowed: float, tmp_path: Path) -> None:
    """With integers the activations are rounded, too, so the logits differ from those of the rounded weights."""
    model = model_of(TINY)
    library = CLibrary(model, tmp_path, precision)
    ids = ids_of(45, TINY.vocab_size)
    want = eager_logits(as_stored(model, precision), ids)
    state = library.state()
    alone = np.stack([library.token(state, int(each)) for each in ids])
    assert error(alone, want) < allowed
    assert np.array_equal(library.tokens(library.state(), ids, 45), alone)


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float32", 1e-5), ("bfloat16", 1e-5), ("int8", 0.05), ("int4", 0.05)]
)
def test_rows_that_are_read_one_after_the_other(precision: str, allowed: float, tmp_path: Path) -> None:
    """They are what a model has whose weights do not stay in a cache."""
    model = model_of(TINY)
    loops = build.Loops(Tiling(rows=1, lanes=32))
    library = CLibrary(model, tmp_path, precision, path=build.shared_library(TINY, precision, loops))
    ids = ids_of(45, TINY.vocab_size)  # 32 tokens, 12, and one
    want = eager_logits(as_stored(model, precision), ids)
    state = library.state()
    assert error(np.stack([library.token(state, int(each)) for each in ids]), want) < allowed
    assert error(library.tokens(library.state(), ids, 45), want) < allowed


@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-5), ("int4", 0.05)])
def test_rows_in_the_form_for_processors_of_another_maker(
    precision: str, allowed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in turn on a processor that is not Intel's, and far apart on Intel's."""
    other = "AuthenticAMD" if host().rows_in_turn else "GenuineIntel"
    monkeypatch.setattr("lowering.targets.cpu_vendor", lambda: other)
    monkeypatch.setenv("RAMNET_CACHE", str(tmp_path / "cache"))
    assert host().rows_in_turn == (other == "GenuineIntel")
    model = model_of(TINY)
    library, ids = CLibrary(model, tmp_path, precision), ids_of(45, TINY.vocab_size)
    want = eager_logits(as_stored(model, precision), ids)
    state = library.state()
    assert error(np.stack([library.token(state, int(each)) for each in ids]), want) < allowed


def test_weights_of_floating_numbers_beyond_a_cache_are_read_by_rows_but_on_intels_processors() -> None:
    large, machine = RamNetConfig.preset("340m"), replace(host(), rows_in_turn=False)
    for precision in weights.FILE_TYPES:
        assert (default_tiling(large, precision, machine).rows == 1) == (precision not in weights.SCALED)
        assert default_tiling(large, precision, replace(machine, rows_in_turn=True)).rows > 1
        assert default_tiling(TINY, precision, machine).rows > 1
    assert default_tiling(large, "float32", WASM).lanes == 4


def test_sequences_of_a_step_are_independent(tmp_path: Path) -> None:
    library = CLibrary(model_of(TINY), tmp_path)
    ids = ids_of(30, TINY.vocab_size).reshape(6, 5)
    together = [library.state() for _ in range(5)]
    library.tokens(together[2], ids[0], 0)  # at another position than the others
    alone = library.state()
    library.tokens(alone, ids[0], 0)
    for tokens in ids:
        assert np.array_equal(library.step(together, tokens)[2], library.token(alone, int(tokens[2])))


def test_threads_share_a_model(tmp_path: Path) -> None:
    model = model_of(TINY)
    library = CLibrary(model, tmp_path, threads=2)
    ids = [ids_of(60, TINY.vocab_size, seed) for seed in range(4)]
    found: list[Any] = [None] * 4

    def read(i: int) -> None:
        state = library.state()
        found[i] = np.stack([library.token(state, int(each)) for each in ids[i]])

    workers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each, logits in zip(ids, found, strict=True):
        assert error(logits, eager_logits(model, each)) < 1e-5


def test_parallel_work_goes_to_the_hosts_runtime(tmp_path: Path) -> None:
    library = CLibrary(model_of(TINY), tmp_path)
    want = library.token(library.state(), 7)
    task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)
    calls = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, task, ctypes.c_void_p)
    def run(runtime: Any, tasks: int, body: Any, context: Any) -> None:
        calls.append(tasks)
        for i in reversed(range(tasks)):
            body(context, i)

    library.c.ramnet_use_runtime(library.model, run, None, 3)
    assert error(library.token(library.state(), 7), want) < 1e-6
    assert set(calls) == {3}


def test_nan_in_a_weight_comes_out_as_nan(tmp_path: Path) -> None:
    for precision in ("float32", "int8"):
        model = model_of(TINY)
        with torch.no_grad():
            model.blocks[0].mixer_norm.bias[3] = float("nan")
        library = CLibrary(model, tmp_path, precision)
        assert np.isnan(library.token(library.state(), 1)).all()


@pytest.mark.parametrize(
    ("change", "precision", "problem"),
    [
        ({"top_k": 129, "sub_dim": 6}, "float32", "at most 128"),
        ({"hidden_size": 72}, "int8", "multiple of 32"),
        ({}, "int3", "must be one of float32"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, int], precision: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        weights.check(TINY.model_copy(update=change), precision)
