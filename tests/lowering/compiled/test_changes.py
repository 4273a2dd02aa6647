"""A compiled model gives its model's results after any change of the model: weights, adapters, hooks, constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowering
from ramnet import RamNetForCausalLM, RamState
from tests.lowering.compiled.models import (
    LINEARS,
    NORMS,
    OTHERS,
    adapt,
    assert_alike,
    fresh,
    ids,
    outputs,
)
from tests.samples import relative_rmse

pytest.importorskip("tvm", reason="the CPU kernels need tvm: pip install 'ramnet[tvm]'")


def load_replaced(model: RamNetForCausalLM) -> None:
    model.load_state_dict(fresh(seed=1).state_dict(), assign=True)


def load_copied(model: RamNetForCausalLM) -> None:
    model.load_state_dict(fresh(seed=1).state_dict())


def load_unaligned(model: RamNetForCausalLM) -> None:
    """Load weights whose memory is not aligned as torch's allocator aligns it."""

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


OF_WEIGHTS = {
    "weights copied": load_copied, "weights replaced": load_replaced, "weights unaligned": load_unaligned,
    "parameters swapped": swap_parameters, "storage transposed": transpose_storage, "constants": change_constants,
}  # fmt: skip
OF_MODULES = {
    **{f"adapter {name}": adapt(name) for name in LINEARS},
    **{f"parametrised {name}": parametrise(name) for name in LINEARS},
    **{f"hook {name}": hook(name) for name in LINEARS + NORMS + OTHERS},
    **{f"pre-hook {name}": pre_hook(name) for name in ("blocks.1.mixer.query_key_value", "blocks.0", "head")},
    **{f"forward {name}": own_forward(name) for name in ("blocks.0.ffn.down", "blocks.1.mixer", "blocks.0", "head")},
}  # fmt: skip
CHANGES = OF_WEIGHTS | OF_MODULES
# A changed module is traced again, for one row and for more rows apart, in a second each; so these take turns.
ROWS = {**dict.fromkeys(OF_WEIGHTS, (1, 2)), **{name: (1 + i % 2,) for i, name in enumerate(OF_MODULES)}}


@pytest.mark.parametrize(("change", "rows"), [(CHANGES[name], ROWS[name]) for name in CHANGES], ids=CHANGES.keys())
def test_later_changes_of_the_model_take_effect(
    change: Callable[[RamNetForCausalLM], None], rows: tuple[int, ...], model: RamNetForCausalLM,
    fast: RamNetForCausalLM,
) -> None:  # fmt: skip
    before = outputs(model)
    with torch.no_grad():  # what this token has looked up must be looked up again
        fast(ids(1, 1), RamState.zeros(model.config, 1), in_place=True)
    change(model)
    assert relative_rmse(outputs(model), before) > 1e-6 or change is transpose_storage, "the change changes nothing"
    assert_alike(fast, model, rows)


@pytest.mark.parametrize("kind", ["weights", "adapter", "parametrised", "hook", "forward"])
def test_earlier_changes_of_the_model_take_effect(kind: str) -> None:
    model = fresh()
    for name, change in CHANGES.items():
        if name.startswith(kind):
            change(model)
    assert_alike(lowering.compile(model, backend="eager"), model)


def test_a_global_hook_is_called(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    doubled = nn.modules.module.register_module_forward_hook(
        lambda module, _given, out: 2 * out if isinstance(module, nn.Linear) else None
    )
    try:
        assert_alike(fast, model)
    finally:
        doubled.remove()


def test_kernels_are_used_again_after_a_hook_is_removed(
    model: RamNetForCausalLM, fast: RamNetForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowering.aot.library import Library

    def counted(kind: type, method: str) -> list[int]:
        calls, run = [], getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda self, *given: (calls.append(1), run(self, *given))[1])
        return calls

    blocks, steps, prompts = (counted(Library, name) for name in ("block", "step", "tokens"))
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    outputs(fast, 2)
    assert (len(blocks), len(steps), len(prompts)) == (5, 0, 0)  # the other block, for each of five tokens
    handle.remove()
    outputs(fast)
    assert (len(blocks), len(steps), len(prompts)) == (5, 5, 1)
    model.double()
    outputs(fast)
    model.float()
    assert (len(blocks), len(steps), len(prompts)) == (5, 5, 1)
    outputs(fast)
    assert (len(blocks), len(steps), len(prompts)) == (5, 10, 2)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_weight_of_another_shape_is_an_error_as_in_the_model(replaced: bool) -> None:
    model = fresh()
    fast, layer = lowering.compile(model, backend="eager"), model.blocks[1].mixer.output
    with torch.no_grad():
        fast(ids(1, 1), in_place=True)
    if replaced:
        layer.weight = nn.Parameter(torch.zeros(24, 5))
    else:
        layer.weight.data = torch.zeros(24, 5)
    for call in (model, fast):
        with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be multiplied"):
            call(ids(1, 1), in_place=True)


def test_backward_hooks_are_called(model: RamNetForCausalLM, fast: RamNetForCausalLM) -> None:
    called = []
    model.blocks[1].mixer.output.register_full_backward_hook(lambda *_: called.append(1))
    fast(ids(2, 19)).logits.sum().backward()
    assert called == [1]


def test_compiling_does_not_modify_the_model(model: RamNetForCausalLM) -> None:
    modules, kinds = dict(model.named_modules()), {name: type(m) for name, m in model.named_modules()}
    limit = torch._dynamo.config.recompile_limit
    fast = lowering.compile(model, backend="eager")
    outputs(fast)
    assert dict(model.named_modules()) == modules
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert torch._dynamo.config.recompile_limit == limit
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
