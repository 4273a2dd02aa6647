"""address_decode and its backward in Triton against the whole product softmax of M entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowering.gpu.address_decode import triton as address_decode
from lowering.gpu.address_decode import triton_backward as address_decode_backward
from lowering.targets import Gpu
from schedules.gpu.address import AddressDecode, AddressDecodeBackward
from schedules.workload import Workload
from tests.brute_force import product_softmax
from tests.lowering.gpu.compiled import ARCHITECTURES, compile_plan
from tests.samples import TOLERANCE, relative_rmse

# (U, P, K): K not a power of two, K = 1, K = M, P = 1, 3, 5, more digits than slots kept and fewer.
SIZES = [(1, 5, 5), (1, 37, 6), (2, 3, 9), (3, 1, 1), (3, 5, 1), (3, 3, 7), (4, 2, 16), (5, 4, 8)]


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def decode(logits: Tensor, top_k: int, gpu: Gpu, unroll: int) -> tuple[Tensor, Tensor]:
    slots, weights = address_decode.plan(logits, top_k, AddressDecode(threads=64, unroll=unroll)).run(gpu)
    assert slots.dtype == torch.int32 and weights.dtype == logits.dtype
    assert slots.shape == weights.shape == (len(logits), top_k)
    return slots, weights


def check(logits: Tensor, top_k: int, gpu: Gpu, unroll: int = 1) -> None:
    """Check slots, weights and the gradient; slots of equal weights are undetermined."""
    tolerance = TOLERANCE[logits.dtype]
    slots, weights = decode(logits, top_k, gpu, unroll)
    exact = logits.cpu().double().requires_grad_()
    full = product_softmax(exact)
    assert relative_rmse(weights.cpu(), full.topk(top_k, dim=-1).values) <= tolerance
    assert bool((weights[..., 1:] <= weights[..., :-1]).all()), "weights must descend"
    ordered = slots.sort(dim=-1).values
    assert bool((ordered[..., 1:] > ordered[..., :-1]).all()), "slots must be distinct"
    picked = full.gather(-1, slots.cpu().long())
    assert relative_rmse(weights.cpu(), picked) <= tolerance

    cotangent = random_logits(*weights.shape, dtype=logits.dtype, seed=1)
    plan = address_decode_backward.plan(
        cotangent.to(logits.device), logits, slots, weights, AddressDecodeBackward(threads=64)
    )
    (grad,) = plan.run(gpu)
    (expected,) = torch.autograd.grad(picked, exact, cotangent.double())
    assert grad.dtype == logits.dtype
    # The factor is for cancellation: the gradient is the rounded weight times a difference of two close numbers.
    assert relative_rmse(grad.cpu(), expected) <= 4 * tolerance


@pytest.mark.parametrize("unroll", [0, 1, 2])
@pytest.mark.parametrize(("order", "sub_dim", "top_k"), SIZES)
def test_equals_the_full_product_softmax(
    device: str, gpu: Gpu, order: int, sub_dim: int, top_k: int, unroll: int
) -> None:
    check(random_logits(67, order, sub_dim).to(device), top_k, gpu, unroll)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("order", "sub_dim", "top_k"), [(3, 5, 6), (5, 4, 8)])
def test_every_type(device: str, gpu: Gpu, dtype: torch.dtype, order: int, sub_dim: int, top_k: int) -> None:
    check(random_logits(130, order, sub_dim, dtype=dtype).to(device), top_k, gpu)


def test_many_digits_and_sixty_four_slots(device: str, gpu: Gpu) -> None:
    check(random_logits(3, 1, 150).to(device), 64, gpu, unroll=0)


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_ties_give_distinct_slots_and_the_right_weights(device: str, gpu: Gpu, unroll: int) -> None:
    for logits in (torch.zeros(7, 5, 4), random_logits(63, 5, 4).round()):
        check(logits.to(device), 8, gpu, unroll)


@pytest.mark.parametrize("unroll", [0, 1])
def test_more_slots_than_fit_in_memory(device: str, gpu: Gpu, unroll: int) -> None:
    """M = 4^15: each weight is the product of its digits' probabilities, and the first is that of the best digits."""
    logits = random_logits(7, 15, 4)
    slots, weights = (x.cpu() for x in decode(logits.to(device), 8, gpu, unroll))
    digits = slots.long().unsqueeze(-1) // 4 ** torch.arange(15) % 4  # [7, 8, 15]
    probability = logits.double().softmax(-1).unsqueeze(1).expand(7, 8, 15, 4)
    assert relative_rmse(weights, probability.gather(-1, digits.unsqueeze(-1)).squeeze(-1).prod(-1)) <= 1e-5
    assert torch.equal(digits[:, 0], logits.argmax(-1))


def test_the_first_sub_vector_is_the_least_significant_digit(device: str, gpu: Gpu) -> None:
    logits = torch.zeros(1, 5, 4)
    for u, digit in enumerate([3, 1, 0, 2, 1]):
        logits[0, u, digit] = 50.0
    slots, _ = decode(logits.to(device), 8, gpu, 1)
    assert int(slots[0, 0]) == 3 + 1 * 4 + 0 * 16 + 2 * 64 + 1 * 256


def test_a_saturated_softmax_gives_exactly_one_and_never_more(device: str, gpu: Gpu) -> None:
    """A write weight above 1 would make the decay (1 − w)^γ NaN."""
    sure = torch.full((1, 5, 4), -200.0)
    sure[..., 2] = 200.0
    _, weights = decode(sure.to(device), 8, gpu, 1)
    assert weights[0, 0] == 1 and float(weights[0, 1:].max()) <= 1e-37
    _, weights = decode(20 * random_logits(300, 5, 4).to(device), 8, gpu, 1)
    assert float(weights.max()) <= 1 and float(weights.min()) >= 0


@pytest.mark.parametrize("unroll", [0, 1, 2])
def test_a_logit_of_minus_infinity_rules_its_digit_out(device: str, gpu: Gpu, unroll: int) -> None:
    """If fewer than K slots have a non-zero probability, the others are distinct slots with weight 0."""
    logits = random_logits(63, 3, 4)
    logits[..., 1, 2] = -torch.inf
    check(logits.to(device), 8, gpu, unroll)
    slots, _ = decode(logits.to(device), 8, gpu, unroll)
    assert bool((slots // 4 % 4 != 2).all())
    logits[..., 1:] = -torch.inf
    check(logits.to(device), 8, gpu, unroll)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_of_the_papers_sizes_have_no_spills(arch: str) -> None:
    logits = torch.empty(4096, 5, 4, dtype=torch.bfloat16)
    slots, weights = torch.empty(4096, 8, dtype=torch.int32), torch.empty(4096, 8, dtype=torch.bfloat16)
    workload = Workload(op="address_decode", shape={"R": 4096, "U": 5, "P": 4, "K": 8}, dtype="bfloat16")
    schedule = AddressDecode.default(workload)
    assert schedule.unroll == 1 and schedule.refusal(workload) is None
    forward = compile_plan("lowering.gpu.address_decode.triton", [logits, 8], schedule, arch)
    backward = compile_plan(
        "lowering.gpu.address_decode.triton_backward", [weights, logits, slots, weights], AddressDecodeBackward(), arch
    )
    for binary in forward + backward:
        assert binary.resources.spilled == binary.resources.local == 0, binary.name


@pytest.mark.parametrize(("order", "sub_dim", "top_k", "straight"), [(5, 4, 8, 1), (1, 1024, 8, 0), (5, 4, 64, 0)])
def test_unrolled_code_that_would_be_too_long_is_refused(order: int, sub_dim: int, top_k: int, straight: int) -> None:
    shape = {"R": 4096, "U": order, "P": sub_dim, "K": top_k}
    workload = Workload(op="address_decode", shape=shape, dtype="bfloat16")
    assert AddressDecode.default(workload).unroll == straight
    assert AddressDecode(unroll=0).refusal(workload) is None
    if not straight:
        assert "compare-exchanges; at most" in (AddressDecode(unroll=1).refusal(workload) or "")
