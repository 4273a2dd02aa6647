"""What the ops refuse: an error in one sentence with the value and what would be valid; the state is unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ramnet import ops
from ramnet.ops import checks
from ramnet.ops.accesses import Accesses
from tests.samples import as_backends_take, scan_inputs, step_inputs

Change = Callable[[dict[str, Tensor]], object]


def with_slot(name: str, slot: int) -> Change:
    return lambda x: x[name].flatten().__setitem__(1, slot)


def repeated(x: dict[str, Tensor]) -> None:
    """Repeat a slot within a token, in places that are not adjacent."""
    x["write_slots"].view(-1, 3)[1] = torch.tensor([5, 0, 5])


# Changes of valid inputs with B = 1, H = 2, K = 3, M = 9, D = 5, and the resulting message.
CHANGES: list[tuple[str, Change, type[Exception], str]] = [
    ("slot above", with_slot("write_slots", 9), ValueError, r"write_slots\[0, 0, (0, )?1\] is 9; .* in 0\.\.8"),
    ("slot below", with_slot("read_slots", -1), ValueError, r"read_slots\[0, 0, (0, )?1\] is -1; .* in 0\.\.8"),
    ("slot repeated", repeated, ValueError, r"write_slots\[0, (0, )?1\] holds slot 5 twice; .* must be distinct"),
    ("slots of int64", lambda x: x.update(write_slots=x["write_slots"].long()), TypeError,
     r"write_slots is torch.int64; it must be torch.int32"),
    ("weights of int32", lambda x: x.update(write_weights=x["write_slots"]), TypeError,
     r"write_weights is torch.int32; it must be a floating type"),
    ("two types of weights", lambda x: x.update(read_weights=x["read_weights"].double()), TypeError,
     r"read_weights is torch.float64 but write_weights is torch.float32"),
    ("values of int64", lambda x: x.update(values=x["values"].long()), TypeError, r"values is torch.int64"),
    ("a state of int32", lambda x: x.update(memory=x["memory"].int(), mass=x["mass"].int()), TypeError,
     r"memory is torch.int32; it must be a floating type"),
    ("two types of state", lambda x: x.update(mass=x["mass"].half()), TypeError,
     r"mass is torch.float16 but memory is torch.float32"),
    ("values of another rank", lambda x: x.update(values=x["values"][0]), ValueError, r"values has shape \[2, .*5\]"),
    ("another K", lambda x: x.update(read_slots=x["read_slots"][..., :2]), ValueError,
     r"read_slots has shape \[1, 2, .*2\]; \[B, H.*, K\] is \[1, 2, .*3\] here"),
    ("another K of weights", lambda x: x.update(read_weights=x["read_weights"][..., :2]), ValueError,
     r"read_weights has shape \[1, 2, .*2\]; \[B, H.*, K\] is \[1, 2, .*3\] here"),
    ("no K", lambda x: x.update(write_slots=x["write_slots"][..., :0]), ValueError, r"write_slots .*0\].*K >= 1"),
    ("no D", lambda x: x.update(values=x["values"][..., :0], memory=x["memory"][..., :0]), ValueError,
     r"values has shape \[1, 2, .*0\]; .* D >= 1"),
    ("memory of another rank", lambda x: x.update(memory=x["memory"].unsqueeze(-1)), ValueError,
     r"memory has shape \[1, 2, 9, 5, 1\]; it must be \[B, H, M, D\]"),
    ("another head count", lambda x: x.update(memory=x["memory"][:, :1]), ValueError,
     r"memory has shape \[1, 1, 9, 5\]; \[B, H, M, D\] is \[1, 2, 9, 5\] here"),
    ("another D", lambda x: x.update(memory=x["memory"][..., :4]), ValueError, r"memory has shape \[1, 2, 9, 4\]"),
    ("another M", lambda x: x.update(mass=x["mass"][..., :8]), ValueError, r"mass has shape \[1, 2, 8\].*\[1, 2, 9\]"),
    ("K > M", lambda x: x.update(memory=x["memory"][:, :, :2].contiguous(), mass=x["mass"][..., :2].contiguous()),
     ValueError, r"K is 3 but there are only M = 2 slots"),
    ("another device", lambda x: x.update(mass=x["mass"].to("meta")), ValueError,
     r"mass is on meta but values is on cpu; use one device"),
]  # fmt: skip

SETTINGS = [
    ({"decay_power": -0.5}, "decay_power is -0.5; it must be finite and >= 0"),
    ({"decay_power": float("nan")}, "decay_power is nan; it must be finite and >= 0"),
    ({"decay_power": float("inf")}, "decay_power is inf; it must be finite and >= 0"),
    ({"eps": 0.0}, "eps is 0.0; it must be > 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_memory_ops(change: Change, error: type[Exception], message: str) -> None:
    inputs = scan_inputs(1, 2, 4, 3, 9, 5)
    for op, good in ((ops.memory_scan, inputs), (ops.memory_step, step_inputs(inputs, 0))):
        bad = {name: x.clone() for name, x in good.items()}
        change(bad)
        state = {name: bad[name].clone() for name in ("memory", "mass")}
        with pytest.raises(error, match=message):
            op(**bad)
        for name, before in state.items():
            assert before.is_meta or torch.equal(bad[name], before)


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings(kernels: str, settings: dict[str, float], message: str) -> None:
    inputs = scan_inputs(1, 2, 4, 3, 9, 5)
    for op, good in ((ops.memory_scan, inputs), (ops.memory_step, step_inputs(inputs, 0))):
        with pytest.raises(ValueError, match=re.escape(message)):
            op(**good, **settings)


@pytest.mark.parametrize("proxy_eps", [0.0, -1.0, 1.5, float("nan")])
def test_proxy_eps(kernels: str, proxy_eps: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"proxy_eps is {proxy_eps}; it must be in (0, 1]")):
        ops.memory_scan(**scan_inputs(1, 2, 4, 3, 9, 5), proxy_eps=proxy_eps)


def test_a_step_needs_contiguous_state(kernels: str) -> None:
    step = step_inputs(scan_inputs(1, 2, 1, 3, 9, 5), 0)
    step["memory"] = step["memory"].transpose(0, 1).contiguous().transpose(0, 1).expand(1, 2, 9, 5)
    step["mass"] = torch.stack([step["mass"]] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match=r"mass has strides \[36, 18, 2\]; memory_step updates only contiguous state"):
        ops.memory_step(**step)


@pytest.mark.parametrize(
    ("logits", "top_k", "error", "message"),
    [
        (torch.zeros(7, 3, 4), 65, ValueError, "top_k is 65; with U = 3 and P = 4 it must be in 1..64"),
        (torch.zeros(7, 3, 4), 0, ValueError, "top_k is 0; with U = 3 and P = 4 it must be in 1..64"),
        (torch.zeros(7, 3, 4), 2.5, TypeError, "top_k is 2.5; it must be an int"),
        (torch.zeros(12), 4, ValueError, "logits has shape [12]; it must be [..., U, P]"),
        (torch.zeros(7, 0, 4), 1, ValueError, "logits has shape [7, 0, 4]; it must be [..., U, P]"),
        (torch.zeros(7, 3, 0), 1, ValueError, "logits has shape [7, 3, 0]; it must be [..., U, P]"),
        (torch.zeros(1, 31, 2), 8, ValueError, "P^U is 2^31 slots; int32 numbers at most 2147483647"),
        (torch.zeros(1, 16, 4), 8, ValueError, "P^U is 4^16 slots; int32 numbers at most 2147483647"),
        (torch.zeros(1, 10**5, 4), 8, ValueError, "P^U is 4^100000 slots; int32 numbers at most 2147483647"),
        (torch.zeros(7, 3, 4, dtype=torch.int32), 8, TypeError, "logits is torch.int32; it must be a floating type"),
    ],
)
def test_address_decode(kernels: str, logits: Tensor, top_k: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ops.address_decode(logits, top_k)


def test_address_decode_supports_as_many_slots_as_int32_can_number() -> None:
    slots, _ = ops.address_decode(torch.empty(1, 2**31 - 1, device="meta"), 1)
    assert slots.shape == (1,)


@pytest.mark.parametrize(("number", "where"), [("nan", 2), ("inf", 2), ("-inf", slice(None))])
def test_address_decode_refuses_logits_without_a_softmax(number: str, where: int | slice) -> None:
    logits = torch.zeros(7, 3, 4)
    logits[5, 1, where] = float(number)
    with pytest.raises(ValueError, match=re.escape(f"logits[5, 1] has {number} as its largest entry; it must be fin")):
        ops.address_decode(logits, 8)


def test_a_gpus_check_of_slots_asserts_on_the_device() -> None:
    """Tested on the CPU, where the same assertion raises immediately."""
    accesses, *_ = as_backends_take(scan_inputs(1, 1, 2, 2, 9, 1).values())
    checks.slots_in_range_on_device(accesses, 9)
    checks.slots_in_range_on_device(Accesses(*(x[:0] for x in accesses)), 1)
    for wrong in (-1, 9):
        accesses.read_slots[0, 0, 1, 1] = wrong
        with pytest.raises(RuntimeError, match=r"a slot of read_slots is outside 0\.\.8"):
            checks.slots_in_range_on_device(accesses, 9)


class Counting:
    """A backend that computes nothing."""

    calls = 0

    def memory_scan(self, accesses: Accesses[Tensor], *given: Any) -> tuple[Tensor, ...]:
        self.calls += 1
        return tuple(x.clone() for x in given[:3])

    def memory_step(self, accesses: Accesses[Tensor], values: Tensor, *given: Any) -> Tensor:
        self.calls += 1
        return values.clone()


@pytest.mark.parametrize("name", ["write_slots", "read_slots"])
def test_a_gpus_kernels_run_on_slots_that_were_checked_or_are_known_to_be_in_range(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tested with tensors on the CPU that are treated as if on a GPU."""
    backend: Any = Counting()
    ops.register_backend("counting", backend)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    inputs = scan_inputs(1, 2, 4, 3, 9, 5)
    inputs[name][:, :, 0, 2] = 9
    with ops.using("counting"):
        for op, given in ((ops.memory_scan, inputs), (ops.memory_step, step_inputs(inputs, 0))):
            before = backend.calls
            with pytest.raises(RuntimeError, match=rf"a slot of {name} is outside 0\.\.8"):
                op(**given)
            assert backend.calls == before
            op(**given, in_range=True)
            assert backend.calls == before + 1
