"""The memory ops as plain single-threaded C++ loops over runtime K and D."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from autotune.bench.inputs import ScanInputs
from autotune.measure import native

_SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

static float decay_of(float w, float gamma) { return gamma == 1.0f ? 1.0f - w : std::pow(1.0f - w, gamma); }

static void write(float* __restrict row, const float* __restrict v, float decay, float w, long D) {
  for (long d = 0; d < D; ++d) row[d] = decay * row[d] + w * v[d];
}

static void add(float* __restrict out, const float* __restrict row, float scale, long D) {
  for (long d = 0; d < D; ++d) out[d] += scale * row[d];
}

// One token of one head. `replaced` and `mass_was`, where not null, keep what each write replaced.
static void token(const int* ws, const float* ww, const int* rs, const float* rw, const float* v, float* S, float* z,
                  float* out, long K, long D, float gamma, float eps, float* replaced, float* mass_was) {
  for (long k = 0; k < K; ++k) {
    float decay = decay_of(ww[k], gamma);
    if (replaced) {
      std::memcpy(replaced + k * D, S + ws[k] * D, D * sizeof(float));
      mass_was[k] = z[ws[k]];
    }
    write(S + ws[k] * D, v, decay, ww[k], D);
    z[ws[k]] = decay * z[ws[k]] + ww[k];
  }
  for (long d = 0; d < D; ++d) out[d] = 0;
  for (long k = 0; k < K; ++k) {
    const float scaled = rw[k] / (z[rs[k]] + eps);
    add(out, S + rs[k] * D, scaled, D);
  }
}

extern "C" void scan(const int* ws, const float* ww, const int* rs, const float* rw, const float* v, float* S, float* z,
                     float* out, long N, long T, long K, long D, long M, float gamma, float eps,
                     float* replaced, float* mass_was) {
  for (long n = 0; n < N; ++n)
    for (long t = 0; t < T; ++t) {
      const long at = n * T + t;
      token(ws + at * K, ww + at * K, rs + at * K, rw + at * K, v + at * D, S + n * M * D, z + n * M, out + at * D,
            K, D, gamma, eps, replaced ? replaced + at * K * D : nullptr, replaced ? mass_was + at * K : nullptr);
    }
}

// Walks back from the final S and z, putting back what each write replaced; gS and gz come in as the gradients of the
// final state and leave as those of the first.
extern "C" void scan_backward(const int* ws, const float* ww, const int* rs, const float* rw, const float* v, float* S,
                              float* z, const float* replaced, const float* mass_was, const float* gout, float* gS,
                              float* gz, float* gw, float* gr, float* gv, long N, long T, long K, long D, long M,
                              float gamma, float eps, float proxy) {
  for (long at = N * T - 1; at >= 0; --at) {
    const long base = at / T * M;
    const float* go = gout + at * D;
    for (long k = 0; k < K; ++k) {
      const long slot = base + rs[at * K + k];
      const float inverse = 1.0f / (z[slot] + eps), r = rw[at * K + k];
      const float* row = S + slot * D;
      float* grad = gS + slot * D;
      float along = 0;
      for (long d = 0; d < D; ++d) {
        along += row[d] * go[d];
        grad[d] += r * inverse * go[d];
      }
      gr[at * K + k] = along * inverse;
      gz[slot] -= along * r * inverse * inverse;
    }
    float* gvalue = gv + at * D;
    for (long d = 0; d < D; ++d) gvalue[d] = 0;
    for (long k = 0; k < K; ++k) {
      const long slot = base + ws[at * K + k];
      const float w = ww[at * K + k], decay = decay_of(w, gamma);
      const float base = gamma == 1.0f ? 1.0f : std::pow(proxy + (1 - proxy) * (1 - w), gamma - 1);
      const float slope = -gamma * (1 - proxy) * base;
      const float *old = replaced + (at * K + k) * D, *value = v + at * D;
      float* grad = gS + slot * D;
      float to_value = 0, to_decay = 0;
      for (long d = 0; d < D; ++d) {
        to_value += grad[d] * value[d];
        to_decay += grad[d] * old[d];
        gvalue[d] += w * grad[d];
        grad[d] *= decay;
      }
      to_decay += gz[slot] * mass_was[at * K + k];
      gw[at * K + k] = to_value + gz[slot] + slope * to_decay;
      gz[slot] *= decay;
      std::memcpy(S + slot * D, old, D * sizeof(float));
      z[slot] = mass_was[at * K + k];
    }
  }
}

extern "C" void step(const int* ws, const float* ww, const int* rs, const float* rw, const float* v, float* S, float* z,
                     float* out, long N, long K, long D, long M, float gamma, float eps) {
  scan(ws, ww, rs, rw, v, S, z, out, N, 1, K, D, M, gamma, eps, nullptr, nullptr);
}

extern "C" void decode(const float* logits, int* slots, float* weights, long rows, long U, long P, long K) {
  struct Prefix { float score; int slot; };
  std::vector<Prefix> best, next;
  std::vector<float> log_p(P);
  for (long i = 0; i < rows; ++i) {
    best.assign(1, {0.0f, 0});
    for (long u = 0, power = 1; u < U; ++u, power *= P) {
      const float* x = logits + (i * U + u) * P;
      const float top = *std::max_element(x, x + P);
      float sum = 0;
      for (long p = 0; p < P; ++p) sum += std::exp(x[p] - top);
      for (long p = 0; p < P; ++p) log_p[p] = x[p] - top - std::log(sum);
      next.clear();
      for (const Prefix& prefix : best)
        for (long p = 0; p < P; ++p) next.push_back({prefix.score + log_p[p], prefix.slot + int(p * power)});
      const auto end = next.begin() + std::min<long>(K, next.size());
      std::partial_sort(next.begin(), end, next.end(),
                        [](const Prefix& a, const Prefix& b) { return a.score > b.score; });
      best.assign(next.begin(), end);
    }
    for (long k = 0; k < K; ++k) {
      slots[i * K + k] = best[k].slot;
      weights[i * K + k] = std::exp(best[k].score);
    }
  }
}
"""


@cache
def library() -> ctypes.CDLL:
    """Build and load the loops. Raises NoCompilerError if there is no compiler."""
    return native.load("loops", _SOURCE)


def scan(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, decay_power: float = 1.0, eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``ramnet.ops.memory_scan`` for contiguous float32 tensors."""
    inputs = (write_slots, write_weights, read_slots, read_weights, values)
    output, memory, mass = torch.empty_like(values), memory.clone(), mass.clone()
    library().scan(
        *map(_pointer, (*inputs, memory, mass, output)), *_sizes(write_slots, memory), *_floats(decay_power, eps),
        None, None,
    )  # fmt: skip
    return output, memory, mass


def scan_forward_backward(
    inputs: ScanInputs, grads: Sequence[Tensor], decay_power: float = 1.0, eps: float = 1e-6, proxy_eps: float = 0.01
) -> tuple[Tensor, ...]:
    """Output, memory and mass, and the gradients of write_weights, read_weights, values, memory and mass.

    ``grads`` are those of output, memory and mass.
    """
    operands, (grad_output, grad_memory, grad_mass) = inputs[:5], grads
    output, memory, mass = torch.empty_like(inputs.values), inputs.memory.clone(), inputs.mass.clone()
    shape = inputs.write_slots.shape
    replaced, mass_was = torch.empty(*shape, inputs.values.shape[-1]), torch.empty(shape)
    sizes = _sizes(inputs.write_slots, memory)
    library().scan(
        *map(_pointer, (*operands, memory, mass, output)), *sizes, *_floats(decay_power, eps),
        _pointer(replaced), _pointer(mass_was),
    )  # fmt: skip
    before, mass_before = memory.clone(), mass.clone()
    grad_state, grad_z = grad_memory.clone(), grad_mass.clone()
    grad_w, grad_r, grad_v = (torch.empty_like(x) for x in (inputs.write_weights, inputs.read_weights, inputs.values))
    kept = (replaced, mass_was)
    tensors = (*operands, before, mass_before, *kept, grad_output, grad_state, grad_z, grad_w, grad_r, grad_v)
    library().scan_backward(*map(_pointer, tensors), *sizes, *_floats(decay_power, eps, proxy_eps))
    return output, memory, mass, grad_w, grad_r, grad_v, grad_state, grad_z


def step(
    write_slots: Tensor, write_weights: Tensor, read_slots: Tensor, read_weights: Tensor,
    values: Tensor, memory: Tensor, mass: Tensor, decay_power: float = 1.0, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """``ramnet.ops.memory_step`` for contiguous float32 tensors."""
    output = torch.empty_like(values)
    tensors = (write_slots, write_weights, read_slots, read_weights, values, memory, mass, output)
    heads, _, top_k, dim, slots = _sizes(write_slots.unsqueeze(2), memory)
    library().step(*map(_pointer, tensors), heads, top_k, dim, slots, *_floats(decay_power, eps))
    return output


def decode(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``ramnet.ops.address_decode`` for contiguous float32 logits [rows, U, P]: a scalar beam."""
    rows, order, sub_dim = logits.shape
    slots, weights = torch.empty(rows, top_k, dtype=torch.int32), torch.empty(rows, top_k)
    library().decode(*map(_pointer, (logits, slots, weights)), *map(ctypes.c_long, (rows, order, sub_dim, top_k)))
    return slots, weights


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor has strides {list(tensor.stride())}; the C++ loops need it contiguous")
    return ctypes.c_void_p(tensor.data_ptr())


def _sizes(write_slots: Tensor, memory: Tensor) -> list[ctypes.c_long]:
    """N, T, K, D, M of slots [B, H, T, K] and memory [B, H, M, D]."""
    batch, heads, tokens, top_k = write_slots.shape
    return [ctypes.c_long(n) for n in (batch * heads, tokens, top_k, memory.shape[3], memory.shape[2])]


def _floats(*numbers: float) -> list[ctypes.c_float]:
    return [ctypes.c_float(x) for x in numbers]
