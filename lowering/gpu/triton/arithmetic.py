"""Device functions that the memory kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power(x, EXPONENT: tl.constexpr):
    """Return x^EXPONENT for x ≥ 0, as products if the exponent is a small integer; 0^0 is 1."""
    if EXPONENT == 0:
        return tl.full(x.shape, 1, x.dtype)
    elif EXPONENT == 1:
        return x
    elif EXPONENT == 2:
        return x * x
    elif EXPONENT == 3:
        return x * x * x
    elif EXPONENT == 4:
        return (x * x) * (x * x)
    elif EXPONENT == 0.5:
        return tl.sqrt(x)
    else:
        return tl.exp2(EXPONENT * tl.log2(x))


@triton.jit
def decay(weight, POWER: tl.constexpr):
    """Return (1 − w)^γ (paper, step 5)."""
    return power(1 - weight, POWER)


@triton.jit
def decay_slope(weight, POWER: tl.constexpr, PROXY_EPS: tl.constexpr):
    """Return the derivative of the proxy (ε' + (1 − ε')(1 − w))^γ with respect to w (paper, step 7)."""
    SCALE: tl.constexpr = -POWER * (1 - PROXY_EPS)
    if SCALE == 0:
        return tl.zeros(weight.shape, weight.dtype)
    else:
        return SCALE * power(PROXY_EPS + (1 - PROXY_EPS) * (1 - weight), POWER - 1)


@triton.jit
def load_inside(pointers, inside):
    """Load where ``inside`` is true, with 0 elsewhere; None loads everything."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_inside(pointers, numbers, inside):
    """Store where ``inside`` is true; None stores everything."""
    if inside is None:
        tl.store(pointers, numbers)
    else:
        tl.store(pointers, numbers, mask=inside)


@triton.jit
def load_each(pointer, COUNT: tl.constexpr):
    """Load COUNT consecutive numbers as a tuple of scalars, which every thread holds."""
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers = numbers + (tl.load(pointer + k),)
    return numbers


@triton.jit
def load_rows(state, slots, WIDTH: tl.constexpr, inside):
    """Load columns of the rows ``slots`` of a state [M, WIDTH]; ``state`` points to these columns of row 0."""
    rows = ()
    for k in tl.static_range(len(slots)):
        rows = rows + (load_inside(state + slots[k].to(tl.int64) * WIDTH, inside),)
    return rows
