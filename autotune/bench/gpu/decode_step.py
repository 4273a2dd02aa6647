"""One token of a batch in CUDA graphs: RAM-Net and other models, and late and early in a context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autotune.bench.gpu.peers import GatedDeltaNet, GatedLinearAttention, Peer
from autotune.bench.gpu.run import GpuRun, Make, finite
from autotune.bench.run import DEFAULT, TUNED, Candidate, Table, check
from autotune.measure.cuda_clock import captured
from ramnet import RamNetConfig, RamNetForCausalLM, RamState

NAME, LATE_NAME = "decode step", "decode step by position"
AS_CALLED = f"{TUNED}, as called"
GLA, DELTA = "GLA, fused_recurrent_gla", "Gated DeltaNet, fused_recurrent_gated_delta_rule"
COMPILED = ", torch.compile"
FEW, MANY = 1_000, 1_000_000
# For kernels with float32 weights against the reference; of two addresses of equal weight either may be chosen.
TOLERANCE = 1e-2

Capture = Callable[[Callable[[], object]], Candidate]


def steps(run: GpuRun, preset: str = "340m", batch: int = 64, capture: Capture = captured) -> list[Table]:
    """A token of each model, which differ only in their mixers, replayed from a CUDA graph.

    The new state of a peer is not copied to the old one, since a server would alternate two graphs.
    """
    config = RamNetConfig.preset(preset)
    forms: dict[str, Make] = {
        TUNED: partial(_ram_net, run, config, batch, True, capture),
    }
    for name, kind in ((GLA, GatedLinearAttention), (DELTA, GatedDeltaNet)):
        forms[name] = partial(_peer, run, config, batch, kind, False, capture)
        if run.compiling(name):
            forms[name + COMPILED] = partial(_peer, run, config, batch, kind, True, capture)
    # What the goals do not need is last, where time may be short.
    forms[AS_CALLED] = partial(_ram_net, run, config, batch, True, lambda call: call)
    forms[DEFAULT] = partial(_ram_net, run, config, batch, False, capture)
    table = run.table(f"{NAME} {preset}", f"batch {batch}, {_states(config)}", forms, base=TUNED)
    for row in table.rows:
        run.facts[f"{table.name}, {row.form}, tokens/s"] = batch / row.seconds
    return [table]


def by_position(run: GpuRun, preset: str = "340m", batch: int = 64, capture: Capture = captured) -> list[Table]:
    """A token after 1000 tokens, and one at position 10^6 on a random state."""
    config = RamNetConfig.preset(preset)
    model = _model(config, run.device)
    ids = torch.randint(config.vocab_size, (batch, FEW), device=run.device)
    with torch.no_grad(), run.kernels[TUNED]():
        early = model.hidden_states(ids)[1]
    late = RamState(
        [torch.randn_like(x) for x in early.memory], [0.5 + torch.rand_like(x) for x in early.mass],
        [x.clone() for x in early.conv], torch.full_like(early.position, MANY),
    )  # fmt: skip
    kernels = _compiled(model, run.target, True)
    forms: dict[str, Make] = {
        position(state): partial(_step, kernels, state, batch, run.device, capture) for state in (early, late)
    }
    what = f"batch {batch}, tuned schedules; at {MANY:,} the state holds random writes in every slot"
    return [run.table(f"{LATE_NAME} {preset}", what, forms, base=position(early))]


def position(state: RamState | int) -> str:
    """The form's name."""
    return f"at position {int(state.position[0]) if isinstance(state, RamState) else state:,}"


def _model(config: RamNetConfig, device: str, dtype: torch.dtype = torch.bfloat16) -> RamNetForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        return RamNetForCausalLM(config).to(dtype).eval()


def _compiled(model: RamNetForCausalLM, target: str, tuned: bool) -> Any:
    import lowering

    return lowering.compile(model, target=target, tuned=tuned)


def _ram_net(run: GpuRun, config: RamNetConfig, batch: int, tuned: bool, capture: Capture) -> Candidate:
    """Raise ValueError if, with float32 weights, the logits of the first tokens differ from the reference's.

    The check uses the batch size that is timed, so that torch.compile does not make it dynamic.
    """
    exact = _model(config, run.device, torch.float32)
    found, expected = (
        _logits(model, RamState.zeros(config, batch, device=run.device))
        for model in (_compiled(exact, run.target, tuned), exact)
    )
    check("RAM-Net", [found], [expected], TOLERANCE)
    del exact
    state = RamState.zeros(config, batch, device=run.device)
    return _step(_compiled(_model(config, run.device), run.target, tuned), state, batch, run.device, capture)


@torch.no_grad()
def _logits(model: Any, state: RamState) -> Tensor:
    """Return the logits of three tokens, [B, 3, V]."""
    tokens = torch.arange(3, device=state.position.device).expand(state.batch_size, 3)
    return torch.cat([model(tokens[:, i : i + 1], state, in_place=True).logits for i in range(3)], 1)


def _step(model: Any, state: RamState, batch: int, device: str, capture: Capture) -> Candidate:
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def step() -> Tensor:
        logits: Tensor = model(token, state, in_place=True).logits
        return logits

    finite("RAM-Net", [step()])
    return capture(step)


def _peer(run: GpuRun, config: RamNetConfig, batch: int, kind: Any, compiles: bool, capture: Capture) -> Candidate:
    torch.manual_seed(0)
    with torch.device(run.device):
        model = Peer(config, kind, compiles).bfloat16().eval()
    states = model.states(batch, run.device)
    token = torch.ones(batch, 1, dtype=torch.int64, device=run.device)

    @torch.no_grad()
    def step() -> Tensor:
        logits: Tensor = model(token, states)[0]
        return logits

    finite(kind.__name__, [step()])
    return capture(step)


def _states(config: RamNetConfig) -> str:
    """Describe the size of each model's state."""
    layer = config.layers[0]
    ram_net = layer.num_heads * layer.slots * (layer.value_dim + 1)
    peers = (kind(config.hidden_size).state(1, "meta").numel() for kind in (GatedLinearAttention, GatedDeltaNet))
    sizes = zip(("RAM-Net", "GLA", "Gated DeltaNet"), (ram_net, *peers), strict=True)
    return "float32 states of " + ", ".join(f"{name} {config.num_layers * n / 1e6:.1f} M" for name, n in sizes)
