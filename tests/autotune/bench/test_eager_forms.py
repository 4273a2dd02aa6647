"""Every baseline computes what the ops' reference does, at odd sizes."""

import pytest
import torch

from autotune.bench import eager_scan_gradients
from autotune.bench.cpu import eager_address_decode, eager_memory_step, plain_cpp
from autotune.bench.inputs import decode_logits, scan_inputs
from autotune.bench.run import check
from autotune.measure import eager_scan
from ramnet import ops

SMALL = {"heads": 3, "tokens": 45, "top_k": 3, "order": 2, "sub_dim": 4, "value_dim": 5}
SCANS = [
    eager_scan.scan_by_slots,
    eager_scan.scan_in_place,
    eager_scan.scan_chunked,
    eager_scan_gradients.scan_sorted,
    plain_cpp.scan,
]
GAMMAS = [0.0, 0.5, 1.0, 2.0]


pytestmark = pytest.mark.usefixtures("cpp")


def name(form):
    return getattr(form, "__name__", "ScanChunked")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scan", SCANS, ids=name)
def test_scans(scan, gamma):
    inputs = scan_inputs(**SMALL)
    check("scan", scan(*inputs, gamma), ops.memory_scan(*inputs, gamma), 1e-6)


@pytest.mark.parametrize("scan", [*SCANS, eager_scan_gradients.ScanChunked.apply], ids=name)
def test_scans_of_a_slot_that_every_token_overwrites(scan):
    inputs = scan_inputs(**SMALL)
    inputs.write_slots[..., 0] = 0
    inputs.write_slots[..., 1:] = inputs.write_slots[..., 1:].clamp_min(1)
    inputs.write_slots[..., 1], inputs.write_slots[..., 2] = 1, 2
    inputs.write_weights[..., 0] = 1.0
    check("scan", scan(*inputs), ops.memory_scan(*inputs), 1e-6)


@pytest.mark.parametrize("scan", SCANS, ids=name)
def test_scans_do_not_change_their_inputs(scan):
    inputs = scan_inputs(**SMALL)
    before = [x.clone() for x in inputs]
    scan(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("form", ["sorted", "chunked", "cpp"])
def test_gradients(form, gamma):
    inputs = scan_inputs(**SMALL)
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator) for x in (inputs.values, inputs.memory, inputs.mass)]

    def differentiated(scan):
        leaves = inputs.requiring_grad()
        outputs = scan(*leaves, gamma)
        wanted = [x for x in leaves if x.requires_grad]
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, wanted, grads)]

    expected = differentiated(ops.memory_scan)
    got = {
        "sorted": lambda: differentiated(eager_scan_gradients.scan_sorted),
        "chunked": lambda: differentiated(eager_scan_gradients.ScanChunked.apply),
        "cpp": lambda: plain_cpp.scan_forward_backward(inputs, grads, gamma),
    }[form]()
    check(form, got, expected, 1e-5)


@pytest.mark.parametrize("form", ["by_slots", "in_place", "one_gather", "cpp"])
def test_steps_are_the_scan(form):
    inputs = scan_inputs(**SMALL)
    expected, memory, mass = ops.memory_scan(*inputs)
    one = plain_cpp.step if form == "cpp" else getattr(eager_memory_step, form)
    steps = eager_memory_step.Steps(
        inputs, one, eager_memory_step.beside_mass(inputs) if form == "one_gather" else None
    )
    check(form, [steps.outputs()], [expected], 1e-6)
    if form == "one_gather":
        check("state", [steps.state[0]], [torch.cat([memory, mass.unsqueeze(-1)], -1).flatten(0, 2)], 1e-6)
    else:
        check("state", steps.state, [memory, mass], 1e-6)


@pytest.mark.parametrize(
    ("order", "sub_dim", "top_k"), [(5, 4, 8), (1, 4, 2), (1, 4, 4), (2, 4, 16), (6, 2, 16), (3, 2, 1)]
)
@pytest.mark.parametrize(
    "form",
    [
        eager_address_decode.decode_full,
        eager_address_decode.decode_beams,
        eager_address_decode.decode_merged,
        plain_cpp.decode,
    ],
    ids=name,
)
def test_decoders(form, order, sub_dim, top_k):
    logits = decode_logits(77, order, sub_dim)
    slots, weights = form(logits, top_k)
    right_slots, right_weights = ops.address_decode(logits, top_k)
    assert slots.dtype == torch.int32
    check("weights", [weights], [right_weights], 1e-6)
    assert torch.equal(slots, right_slots)


def test_the_inputs_are_those_of_the_goals():
    inputs = scan_inputs()
    assert inputs.write_slots.shape == (1, 16, 1024, 8)
    assert inputs.memory.shape == (1, 16, 1024, 64)
    for slots in (inputs.write_slots, inputs.read_slots):
        assert all(len(set(token)) == 8 for token in slots[0, 0, :50].tolist())
    assert (inputs.write_weights.sum(-1) <= 1).all()


def test_a_wrong_result_is_detected():
    right = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[7] += 0.01
    with pytest.raises(ValueError, match="eager is wrong: its result 0 is off by"):
        check("eager", [wrong], [right])
    with pytest.raises(ValueError, match="off by nan"):
        check("eager", [right * torch.nan], [right])
    with pytest.raises(ValueError, match="shape"):
        check("eager", [right[:10]], [right])
