"""Launches through NVIDIA's driver, recorded by a fake driver."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowering.gpu.cuda import driver
from lowering.gpu.cuda.driver import Cubin
from lowering.gpu.resources import Work
from lowering.gpu.tir import Kernels, TirLaunch
from lowering.targets import gpu_of
from schedules.gpu import MemoryStep

FUNCTIONS = {
    "scale": {
        "arguments": [["X", ["N", 4]], ["Y", ["N", 4]]], "parameters": ["Y_ptr", "X_ptr", "N"],
        "shared": 4096,
    }
}  # fmt: skip


class Listener:
    """Records every call and returns ``status``."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.calls, self.context = status, {}, 0x1000

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls[name] = arguments
            if name == "cuCtxGetCurrent":
                arguments[0]._obj.value = self.context
            if name == "cuLaunchKernel":
                pointers = arguments[9]
                self.values = [ctypes.cast(p, ctypes.POINTER(ctypes.c_int64)).contents.value for p in pointers]
            return self.status

        return call


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Listener:
    found = Listener()
    monkeypatch.setattr(driver, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return found


def test_a_launch_has_its_grid_its_memory_and_its_parameters_in_the_kernels_order(listener: Listener) -> None:
    x, y = torch.zeros(5, 4), torch.zeros(5, 4)
    Cubin(b"cubin", FUNCTIONS).run("scale", (x, y), (3, 3), 64)
    assert listener.calls["cuModuleGetFunction"][2] == b"scale_kernel"
    assert listener.calls["cuFuncSetAttribute"][1:] == (8, 4096)
    _, *sizes, stream, _, _ = listener.calls["cuLaunchKernel"]
    assert sizes == [3, 3, 1, 64, 1, 1, 4096] and stream.value == 77
    assert listener.values == [y.data_ptr(), x.data_ptr(), 5]


def test_a_thread_without_a_context_gets_the_devices_context_before_loading(listener: Listener) -> None:
    Cubin(b"cubin", FUNCTIONS).run("scale", (torch.zeros(5, 4), torch.zeros(5, 4)), (3, 3), 64)
    assert "cuCtxSetCurrent" not in listener.calls
    listener.calls.clear()
    listener.context = 0
    Cubin(b"cubin", FUNCTIONS).run("scale", (torch.zeros(5, 4), torch.zeros(5, 4)), (3, 3), 64)
    assert listener.calls["cuDevicePrimaryCtxRetain"][1] == 0
    order = list(listener.calls)
    assert order.index("cuCtxSetCurrent") < order.index("cuModuleLoadData") < order.index("cuLaunchKernel")


def test_nothing_is_launched_for_no_heads(listener: Listener) -> None:
    kernels = Kernels(
        lambda: None, "memory_step", (0, 8, 64, 4), torch.float32, torch.float32, MemoryStep(compiler="tir")
    )
    empty = torch.zeros(0, 4)
    TirLaunch(kernels, "scale", (0,), (empty, empty), 64, Work(0, 64, 0, 0, 0)).run(gpu_of("h100"))
    assert listener.calls == {}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ((torch.zeros(5, 4), torch.zeros(6, 4)), r"scale: Y is \[6, 4\]; it must be contiguous"),
        ((torch.zeros(5, 4), torch.zeros(4, 5).T), r"scale: Y is \[5, 4\]; it must be contiguous"),
        ((torch.zeros(5, 4),), "scale takes 2 tensors, not 1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(listener: Listener, tensors: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cubin(b"cubin", FUNCTIONS).run("scale", tensors, (3, 3), 64)
    assert "cuLaunchKernel" not in listener.calls


def test_errors_of_the_driver_are_raised(listener: Listener) -> None:
    listener.status = 209
    with pytest.raises(RuntimeError, match="209"):
        Cubin(b"cubin", FUNCTIONS).run("scale", (torch.zeros(5, 4), torch.zeros(5, 4)), (3, 3), 64)


def test_a_binary_is_read_as_it_was_written(tmp_path: Any) -> None:
    Cubin(b"\n\x00cubin\n", FUNCTIONS).write(tmp_path / "kernel")
    again = Cubin.read(tmp_path / "kernel")
    assert again.cubin == b"\n\x00cubin\n" and again.functions == FUNCTIONS
