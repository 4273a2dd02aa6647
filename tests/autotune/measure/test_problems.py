"""The inputs and expected results with which candidates are checked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autotune.measure.problems import TOLERANCE, Problem, _digits, checked
from ramnet.config import RamNetConfig
from ramnet.ops import reference
from schedules.of_model import of_model
from schedules.workload import AXES, Workload

SIZES = {"R": 33, "U": 3, "P": 3, "N": 2, "T": 7, "K": 4, "M": 27, "D": 5}


def workload(op: Any, **sizes: int) -> Workload:
    return Workload(op=op, shape={axis: (SIZES | sizes)[axis] for axis in AXES[op]}, constants=CONSTANTS[op])


CONSTANTS: dict[str, dict[str, float]] = {
    "address_decode": {}, "address_decode_backward": {},
    "memory_step": {"decay_power": 2.0, "eps": 1e-6},
    "memory_scan": {"decay_power": 2.0, "eps": 1e-6},
    "memory_scan_backward": {"decay_power": 2.0, "eps": 1e-6, "proxy_eps": 0.01},
}  # fmt: skip
OPS: tuple[Any, ...] = tuple(CONSTANTS)


class Off:
    """The reference with one element of one result changed."""

    def __init__(self, result: int, change: float) -> None:
        self.result, self.change = result, change

    def __getattr__(self, op: str) -> Any:
        def call(*arguments: Any) -> Any:
            found = getattr(reference, op)(*arguments)
            results = list(found) if isinstance(found, tuple) else [found]
            if op == "memory_step":
                results += arguments[2:4]
            results[self.result].view(-1)[-1] += self.change
            return found

        return call


@pytest.mark.parametrize("op", OPS)
def test_the_reference_in_float32_is_right(op: Any) -> None:
    assert Problem(workload(op)).error(reference) < TOLERANCE["float32"] / 10


@pytest.mark.parametrize(
    ("op", "results"),
    [("address_decode", 2), ("address_decode_backward", 1), ("memory_scan", 3), ("memory_scan_backward", 5),
     ("memory_step", 3)],
)  # fmt: skip
def test_one_wrong_number_in_any_result_is_seen(op: Any, results: int) -> None:
    problem = Problem(workload(op))
    for result in range(results):
        assert problem.error(Off(result, 1)) > TOLERANCE["float32"]
    if op != "address_decode":
        assert problem.error(Off(0, float("nan"))) == float("inf")


class Given:
    """A backend of address_decode whose result is given."""

    def __init__(self, slots: list[int], weights: list[float]) -> None:
        self.result = torch.tensor([slots], dtype=torch.int32), torch.tensor([weights])

    def address_decode(self, logits: torch.Tensor, top_k: int) -> Any:
        return self.result


HALF, QUARTER = [0.5, 0.5], [0.25] * 4


@pytest.mark.parametrize(
    ("logits", "right", "wrong"),
    [
        # All weights are equal: any distinct slots in range are right, in any order.
        ([[0.0] * 4], ([3, 1, 0, 2], QUARTER), ([0, 0, 1, 2], QUARTER)),
        ([[0.0] * 4], ([3, 1, 0, 2], QUARTER), ([0, 0, 0, 0], QUARTER)),
        ([[0.0] * 4], ([3, 1, 0, 2], QUARTER), ([-1, 1, 0, 2], QUARTER)),
        ([[0.0] * 4], ([3, 1, 0, 2], QUARTER), ([4, 1, 0, 2], QUARTER)),
        ([[0.0] * 4], ([3, 1, 0, 2], QUARTER), ([2**31 - 1, 1, 0, 2], QUARTER)),
        # The first digit is the least significant: slot 2 has the digits 0 and 1.
        ([[9.0, -9.0], [0.0, 0.0]], ([2, 0], HALF), ([1, 0], HALF)),
        ([[9.0, -9.0], [0.0, 0.0]], ([0, 2], HALF), ([0, 3], HALF)),
        ([[9.0, -9.0], [0.0, 0.0]], ([0, 2], HALF), ([0, 2], [0.5])),
    ],
)
def test_slots_are_right_by_their_weights_and_once_each(
    logits: list[list[float]], right: tuple[list[int], list[float]], wrong: tuple[list[int], list[float]]
) -> None:
    shape = {"R": 1, "U": len(logits), "P": len(logits[0]), "K": len(right[0])}
    problem = Problem(Workload(op="address_decode", shape=shape))
    problem.__dict__["arguments"] = (torch.tensor([logits]), shape["K"])
    assert problem.error(reference) < 1e-6
    assert problem.error(Given(*right)) < 1e-6
    assert problem.error(Given(*wrong)) > 0.1


@pytest.mark.parametrize(
    ("slots", "digits"),
    [(1024, (4, 5)), (4, (4, 1)), (27, (27, 1)), (1000, (10, 3)), (15625, (5, 6)), (3, (3, 1)), (4**10, (4, 10))],
)
def test_the_addresses_of_inputs_reach_all_slots(slots: int, digits: tuple[int, int]) -> None:
    assert _digits(slots) == digits


def test_inputs_are_those_of_a_model() -> None:
    accesses, _, memory, mass, *_ = Problem(workload("memory_scan")).arguments
    for slots, weights in (accesses[:2], accesses[2:]):
        assert all(len(set(row)) == 4 for row in slots.view(-1, 4).tolist())
        assert int(slots.min()) >= 0 and int(slots.max()) < 27
        assert bool((weights > 0).all()) and bool((weights.sum(-1) <= 1).all())
    assert bool((memory != 0).any()) and bool((mass > 0).all())


def test_a_seed_gives_the_same_inputs() -> None:
    first, same, other = (Problem(workload("memory_scan"), seed).arguments[1] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_steps_go_on_from_a_state_of_their_own() -> None:
    problem = Problem(workload("memory_step"))
    before = problem.arguments[2].clone()
    step = problem.call(reference)
    assert not torch.equal(step(), step())
    assert torch.equal(problem.arguments[2], before)


def test_the_check_runs_more_than_a_chunk_and_other_rows_than_lanes() -> None:
    assert checked(workload("memory_scan", N=16, T=7)).shape["T"] % 64
    assert checked(workload("memory_scan", T=7)).shape["T"] > 1024
    assert checked(workload("address_decode", R=32)).shape["R"] == 33
    same = workload("memory_step")
    assert checked(same) == same


def test_the_workloads_of_a_model_are_those_its_ops_meet() -> None:
    config = RamNetConfig.preset("340m")
    found = of_model(config, batch_size=1, length=1024)
    shapes = [(w.op, *w.shape.values()) for w in found]
    assert shapes == [
        ("address_decode", 32, 5, 4, 8), ("address_decode", 32768, 5, 4, 8),
        ("address_decode_backward", 32768, 5, 4, 8), ("memory_step", 16, 8, 1024, 64),
        ("memory_scan_backward", 16, 1024, 8, 1024, 64), ("memory_scan", 16, 1024, 8, 1024, 64),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="length is 0"):
        of_model(config, length=0)
