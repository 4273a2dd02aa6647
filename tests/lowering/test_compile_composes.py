"""What people do to a model around ``lowering.compile``: weights replaced, adapters, hooks, copies, threads, types.

Whatever is done to the model, before or afterwards, the compiled face of it gives the numbers that the model gives.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowering
from ramnet import RamNetConfig, RamNetForCausalLM, RamState, ops
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")

CONFIG = RamNetConfig(
    vocab_size=61, hidden_size=24, num_layers=2, num_heads=2, value_dim=12, order=3, sub_dim=3, top_k=4,
    cape_full_layers=1, cape_half_layers=1, intermediate_size=40, conv_layers=1,
)  # fmt: skip
LINEARS = ("blocks.1.mixer.query_key_value", "blocks.0.mixer.output", "blocks.1.ffn.gate_up", "blocks.0.ffn.down",
           "head", "convs.0.gate")  # fmt: skip
NORMS = ("blocks.0.mixer_norm", "blocks.1.ffn_norm", "norm")
OTHERS = ("blocks.1", "blocks.0.mixer", "blocks.1.ffn", "convs.0", "embedding")


def fresh(seed: int = 0) -> RamNetForCausalLM:
    torch.manual_seed(seed)
    return RamNetForCausalLM(CONFIG)


@pytest.fixture(scope="module")
def pair() -> tuple[RamNetForCausalLM, RamNetForCausalLM]:
    """A model, and its compiled face after it was called in prefill and in tokens, before anything was done to it."""
    model = fresh()
    compiled = lowering.compile(model, backend="eager")
    for batch in (1, 2):
        outputs(compiled, batch)
    return model, compiled


@pytest.fixture
def model(pair: tuple[RamNetForCausalLM, RamNetForCausalLM]) -> Iterator[RamNetForCausalLM]:
    """The pair's model, which a test may do anything to: it is put back."""
    model = pair[0]
    kept = [(module, type(module), {k: copy.copy(v) for k, v in module.__dict__.items()}) for module in model.modules()]
    weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    yield model
    for module, kind, own in kept:
        module.__class__ = kind
        for name in set(module.__dict__) - set(own):
            del module.__dict__[name]
        for name, value in own.items():
            if isinstance(value, dict):  # the dictionary stays the one that others hold
                module.__dict__[name].clear()
                module.__dict__[name].update(value)
            else:
                module.__dict__[name] = value
    with torch.no_grad():
        for parameter, value in weights:
            parameter.copy_(value)
            parameter.grad = None


@pytest.fixture
def fast(pair: tuple[RamNetForCausalLM, RamNetForCausalLM], model: RamNetForCausalLM) -> RamNetForCausalLM:
    """The pair's compiled face."""
    return pair[1]


def ids(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(model: RamNetForCausalLM, batch: int = 1) -> Tensor:
    """Logits of a prompt and of the tokens after it, each taken in place."""
    out = model(ids(batch, 7))
    steps = [model(ids(batch, 1, seed), out.state, in_place=True).logits for seed in range(5)]
    return torch.cat([out.logits, *steps], dim=1)


def assert_alike(fast: RamNetForCausalLM, model: RamNetForCausalLM) -> None:
    for batch in (1, 2):
        assert relative_rmse(outputs(fast, batch), outputs(model, batch)) < 1e-5


class LowRank(nn.Module):
    """An adapter in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def put_in_place(model: RamNetForCausalLM, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def load_replaced(model: RamNetForCausalLM) -> None:
    model.load_state_dict(fresh(seed=1).state_dict(), assign=True)


def load_copied(model: RamNetForCausalLM) -> None:
    model.load_state_dict(fresh(seed=1).state_dict())


def load_unaligned(model: RamNetForCausalLM) -> None:
    """Weights from memory that no allocator of torch's made."""

    def moved(tensor: Tensor) -> Tensor:
        place = torch.empty(tensor.numel() + 1)[1:]
        return place.view(tensor.shape).copy_(tensor)

    model.load_state_dict({name: moved(x) for name, x in fresh(seed=1).state_dict().items()}, assign=True)


def swap_parameters(model: RamNetForCausalLM) -> None:
    for block in model.blocks:
        block.mixer.log_scale = nn.Parameter(torch.full_like(block.mixer.log_scale, 0.7))
        block.ffn.down.weight = nn.Parameter(2 * block.ffn.down.weight.detach())


def transpose_storage(model: RamNetForCausalLM) -> None:
    for name in LINEARS:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())


def change_constants(model: RamNetForCausalLM) -> None:
    model.blocks[0].mixer_norm.eps = 0.5
    model.blocks[1].mixer.cape_heads = 2


def parametrise(name: str) -> Callable[[RamNetForCausalLM], None]:
    def change(model: RamNetForCausalLM) -> None:
        layer = parametrizations.weight_norm(model.get_submodule(name))
        layer.parametrizations.weight.original0.data *= 2

    return change


def adapt(name: str) -> Callable[[RamNetForCausalLM], None]:
    return lambda model: put_in_place(model, name, LowRank(model.get_submodule(name)))


def first_doubled(result: object) -> object:
    return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


def hook(name: str) -> Callable[[RamNetForCausalLM], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(lambda _m, _i, out: first_doubled(out))


def pre_hook(name: str) -> Callable[[RamNetForCausalLM], None]:
    return lambda model: model.get_submodule(name).register_forward_pre_hook(lambda _m, given: first_doubled(given))


def own_forward(name: str) -> Callable[[RamNetForCausalLM], None]:
    def patch(model: RamNetForCausalLM) -> None:
        module = model.get_submodule(name)
        module.forward = lambda *given, inner=module.forward, **named: first_doubled(inner(*given, **named))

    return patch


CHANGES = {
    "weights copied": load_copied, "weights replaced": load_replaced, "weights unaligned": load_unaligned,
    "parameters swapped": swap_parameters, "storage transposed": transpose_storage, "constants": change_constants,
    **{f"adapter {name}": adapt(name) for name in LINEARS},
    **{f"parametrised {name}": parametrise(name) for name in LINEARS},
    **{f"hook {name}": hook(name) for name in LINEARS + NORMS + OTHERS},
    **{f"pre-hook {name}": pre_hook(name) for name in ("blocks.1.mixer.query_key_value", "blocks.0", "head")},
    **{f"forward {name}": own_forward(name) for name in ("blocks.0.ffn.down", "blocks.1.mixer", "blocks.0", "head")},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_done_to_the_model_afterwards_is_heard(
    change: Callable[[RamNetForCausalLM], None], model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    before = outputs(model)
    change(model)
    assert relative_rmse(outputs(model), before) > 1e-6 or change is transpose_storage, "the change changes nothing"
    assert_alike(fast, model)


@pytest.mark.parametrize("kind", ["weights", "adapter", "parametrised", "hook", "forward"])
def test_what_was_done_to_the_model_before_is_heard(kind: str) -> None:
    model = fresh()
    for name, change in CHANGES.items():
        if name.startswith(kind):
            change(model)
    assert_alike(lowering.compile(model, backend="eager"), model)


def test_a_hook_on_every_module_is_heard(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    doubled = nn.modules.module.register_module_forward_hook(
        lambda module, _given, out: 2 * out if isinstance(module, nn.Linear) else None
    )
    try:
        assert_alike(fast, model)
    finally:
        doubled.remove()


def test_hooks_that_are_gone_leave_the_kernels_in_use(
    model: RamNetForCausalLM, fast: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowering.cpu.backend import CpuKernels

    layers: list[int] = []
    run = CpuKernels.decode_layer
    monkeypatch.setattr(CpuKernels, "decode_layer", lambda self, *given: (layers.append(1), run(self, *given))[1])
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    outputs(fast)
    assert len(layers) == 5  # the other block's tokens
    handle.remove()
    outputs(fast)
    assert len(layers) == 15


def test_functional_call_takes_the_weights_it_is_given(fast: RamNetForCausalLM) -> None:
    other = fresh(seed=1)
    given = {name: x.detach() for name, x in other.named_parameters()}
    state, right = RamState.zeros(CONFIG, 1), RamState.zeros(CONFIG, 1)
    with torch.no_grad():
        for seed in range(3):
            token = ids(1, 1, seed)
            got = torch.func.functional_call(fast, given, (token, state), {"in_place": True}).logits
            assert relative_rmse(got, other(token, right, in_place=True).logits) < 1e-5
        assert (
            relative_rmse(torch.func.functional_call(fast, given, (ids(1, 9),)).logits, other(ids(1, 9)).logits) < 1e-5
        )


@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_reach_what_the_models_reach(
    adapted: bool, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    if adapted:
        adapt("blocks.1.mixer.query_key_value")(model)

    def gradients(call: RamNetForCausalLM) -> dict[str, Tensor]:
        model.zero_grad()
        call(ids(2, 19)).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    got, expected = gradients(fast), gradients(model)
    assert got.keys() == expected.keys()
    assert all(relative_rmse(got[name], expected[name]) < 1e-4 for name in expected)


def test_backward_hooks_are_called(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    called = []
    model.blocks[1].mixer.output.register_full_backward_hook(lambda *_: called.append(1))
    fast(ids(2, 19)).logits.sum().backward()
    assert called == [1]


def test_a_sub_class_keeps_what_it_overrides() -> None:
    class Doubled(RamNetForCausalLM):
        def forward(self, *args: object, **options: object):
            out = super().forward(*args, **options)
            return out._replace(logits=2 * out.logits)

    torch.manual_seed(0)
    model = Doubled(CONFIG)
    fast = lowering.compile(model, backend="eager")
    assert isinstance(fast, Doubled)
    assert_alike(fast, model)


def test_the_model_itself_stays_as_it_was(model: RamNetForCausalLM) -> None:
    modules, kinds = dict(model.named_modules()), {name: type(m) for name, m in model.named_modules()}
    limit = torch._dynamo.config.recompile_limit
    fast = lowering.compile(model, backend="eager")
    outputs(fast)
    assert dict(model.named_modules()) == modules
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert torch._dynamo.config.recompile_limit == limit
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "twice"])
def test_copies_are_compiled_models_with_weights_of_their_own(how: str, fast: RamNetForCausalLM) -> None:
    expected = outputs(fast)
    if how == "deepcopy":
        again = copy.deepcopy(fast)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = lowering.compile(fast, backend="eager")
    assert type(again).__name__ == type(fast).__name__
    assert torch.equal(outputs(again), expected)
    with torch.no_grad():
        again.head.weight.zero_()
    assert torch.equal(outputs(fast), expected) == (how != "twice")


def test_eight_threads_at_once_get_what_each_gets_alone(fast: RamNetForCausalLM) -> None:
    alone = [fast.generate(ids(1, 5, seed), 12, temperature=0.8, seed=seed) for seed in range(8)]
    together = Barrier(8)

    def run(seed: int) -> list[Tensor]:
        together.wait()
        return [fast.generate(ids(1, 5, seed), 12, temperature=0.8, seed=seed) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for seed, said in enumerate(pool.map(run, range(8))):
            assert all(torch.equal(each, alone[seed]) for each in said)


def test_threads_compile_as_often_as_one_may(model: RamNetForCausalLM) -> None:
    """More kinds of graphs than torch's limit for one function, met in a thread other than the one that compiled."""
    fast = lowering.compile(model, backend="eager")

    def train_and_prefill(batch: int) -> float:
        model.requires_grad_(batch % 2 == 0)
        with torch.set_grad_enabled(batch % 3 == 0):
            return relative_rmse(fast(ids(batch, 3 * batch)).logits, model(ids(batch, 3 * batch)).logits)

    with ThreadPoolExecutor(1) as pool:
        assert all(error < 1e-5 for error in pool.map(train_and_prefill, range(1, 9)))


def test_overlapping_blocks_of_two_threads_keep_each_its_kernels() -> None:
    first_in, second_in, first_out = Barrier(2), Barrier(2), Barrier(2)
    seen = {}

    def first() -> None:
        with lowering.use("cpu", check=True):
            first_in.wait(), second_in.wait()
            seen["first"] = ops.backend.active()
        seen["first after"] = ops.backend.active()
        first_out.wait()

    def second() -> None:
        first_in.wait()
        with lowering.use("cpu"):
            second_in.wait(), first_out.wait()
            seen["second"] = ops.backend.active()
        seen["second after"] = ops.backend.active()

    with ThreadPoolExecutor(2) as pool:
        for running in [pool.submit(first), pool.submit(second)]:
            running.result(60)
    assert seen == {"first": "cpu:check", "first after": "", "second": "cpu", "second after": ""}
    assert ops.backend.active() == ""


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_new_tensors_changes_nothing(
    default: torch.dtype, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    expected = outputs(fast), outputs(model), fast.generate(ids(1, 5), 6)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(outputs(fast), expected[0])
        assert torch.equal(outputs(model), expected[1])
        assert torch.equal(fast.generate(ids(1, 5), 6), expected[2])
    finally:
        torch.set_default_dtype(torch.float32)


@torch.no_grad()
def test_positions_in_int32_are_taken_by_every_path(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    for batch in (1, 2):
        narrow, wide = (model(ids(batch, 7)).state for _ in range(2))
        narrow.position = narrow.position.to(torch.int32)
        for seed in range(3):
            token = ids(batch, 1, seed)
            expected = model(token, wide, in_place=True).logits
            assert relative_rmse(fast(token, narrow, in_place=True).logits, expected) < 1e-5
        assert narrow.position.tolist() == [10] * batch


@pytest.mark.parametrize("compiled", [False, True])
def test_an_inference_state_outside_of_inference_mode_is_refused_before_anything_is_written(
    compiled: bool, model: RamNetForCausalLM, fast: RamNetForCausalLM
) -> None:
    step = fast if compiled else model
    with torch.inference_mode():
        state = step(ids(1, 7)).state
        before = state.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.memory\[0\] was made in torch\.inference_mode\(\)"):
        step(ids(1, 1), state, in_place=True)
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before.tensors()[name]), name
    with torch.inference_mode():
        expected = step(ids(1, 1), before, in_place=True).logits
    with torch.no_grad():
        assert torch.equal(step(ids(1, 1), state.clone(), in_place=True).logits, expected)
