"""Fixtures for all tests."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from unittest.mock import patch

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Cache compiled kernels between runs, apart from the user's; read neither the user's records nor the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The tests' own processes use all cores: a pool of compiling processes would cost more than it saves.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # The first model that torch generates code for takes 34 s instead of 42 with scalar C++: torch need not compile
    # programs that find out which vector instructions there are.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
    os.environ.setdefault("RAMNET_CACHE", str(config.rootpath / ".pytest_cache" / "kernels"))
    os.environ["RAMNET_RECORDS"] = str(config.rootpath / ".pytest_cache" / "no-records")


def pytest_collectstart() -> None:
    """Import what all tests use, before they do. The process that only gives tests to others does not collect them, and
    need not wait 3 seconds for these imports before it starts the others."""
    import hypothesis
    import torch

    # Triton reads TRITON_INTERPRET when a kernel's module is imported. Without a GPU, kernels are interpreted.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        if find_spec("triton") is not None:
            _quick_interpreter()
    # Examples are the same at each run; a kernel's first call compiles, so there is no deadline.
    hypothesis.settings.register_profile(
        "repeatable",
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=20,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("repeatable")


@functools.cache
def _quick_interpreter() -> None:
    """Let Triton's interpreter look up the names of the language's functions once, and not at each launch, which takes
    a fifth of the time of tests of interpreted kernels."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def functions(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch(package: object, builder: object, scope: object) -> None:
        for name in functions(package):
            if is_builtin(member := getattr(package, name)):  # else it is replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


def pytest_collection_finish() -> None:
    """Let the garbage collector run less often, and not on what imports have created: it would take up to a quarter of
    the time of tests that trace models."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, of which a search makes about twenty per trial: what tests write need not survive a power failure."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def kept_memory(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether this process was to keep freed memory, which it would do in all later tests. Empty if not."""
    asked: list[bool] = []
    monkeypatch.setattr("ramnet.allocator.keep_freed_memory", lambda: asked.append(True))
    return asked


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Run ``ramnet`` with these arguments in this process and return its exit status."""
    from ramnet.cli import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["ramnet", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    with patch.dict(os.environ):  # the command sets environment variables in its process
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Give torch, and with it the CPU kernels, two threads; ``make test`` gives a process one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["", "cpu"], ids=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the reference and on the CPU kernels of two threads, with every torch.empty filled with NaN."""
    import torch

    from ramnet import ops

    if request.param:
        pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")
        request.getfixturevalue("two_threads")
    torch.use_deterministic_algorithms(True)
    try:
        with ops.using(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)
