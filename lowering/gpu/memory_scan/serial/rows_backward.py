"""The rows of a scan's backward: tokens are recomputed from copies of the state, then visited in reverse.

As in the forward, a program handles a tile of channels of a head, and every thread only its own columns of what is both
loaded and stored: the state, its copies, the rows that writes replace and the state's gradient. Dot products over the
channels are summed over the threads; one number per tile is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowering.gpu.triton.arithmetic import decay, decay_slope, load_each, load_inside, load_rows, store_inside
from lowering.gpu.triton.ranked import side_by_side


@triton.jit(do_not_specialize=["T", "CHECKPOINT"])
def scan_rows_backward(
    grad_output, write_slots, write_weights, read_slots, factors, values, states, history, grad_state, grad_values,
    along_reads, along_writes, T, CHECKPOINT, M: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, POWER: tl.constexpr, PROXY_EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Update grad_state [N, M, D] in place from the gradient of the state after all tokens to that before them; compute
    grad_values [N, T, D], and along_reads and along_writes [N, tiles, T, K]: ⟨∂o, S⟩ of each read, and
    ⟨∂S, v + slope · S⟩ of each write, where S is the row before it.

    Args:
        factors: r / (z + ε) at each read, [N, T, K].
        states: scratch for a copy of the state every CHECKPOINT tokens, [copies, N, M, D]; the first must be given.
        history: scratch for the rows that the writes of CHECKPOINT tokens replace, [N, CHECKPOINT, K, D].
        ROUNDS: K is at most 2^ROUNDS.
    """
    head = tl.program_id(0).to(tl.int64)
    heads = tl.num_programs(0)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = None if D % TILE == 0 else channel < D
    along_at = (head * tl.num_programs(1) + tl.program_id(1)) * T * K
    past = history + head * CHECKPOINT * K * D + channel
    copies = (T + CHECKPOINT - 1) // CHECKPOINT
    for copy in range(copies - 1):
        rows = states + (copy * heads + head) * M * D + channel
        next_rows = states + ((copy + 1) * heads + head) * M * D + channel
        _copy(rows, next_rows, inside, M, D)
        _forward(grad_output, write_slots, write_weights, read_slots, values, next_rows, past, along_reads + along_at,
                 head * T, channel, inside, copy * CHECKPOINT, (copy + 1) * CHECKPOINT, False, K, ROUNDS, D, TILE,
                 POWER, ACC)  # fmt: skip
    for i in range(copies):
        copy = copies - 1 - i
        start, stop = copy * CHECKPOINT, tl.minimum((copy + 1) * CHECKPOINT, T)
        rows = states + (copy * heads + head) * M * D + channel
        _forward(grad_output, write_slots, write_weights, read_slots, values, rows, past, along_reads + along_at,
                 head * T, channel, inside, start, stop, True, K, ROUNDS, D, TILE, POWER, ACC)  # fmt: skip
        _backward(grad_output, write_slots, write_weights, read_slots, factors, values, past,
                  grad_state + head * M * D + channel, grad_values, along_writes + along_at, head * T, channel, inside,
                  start, stop, K, ROUNDS, D, TILE, POWER, PROXY_EPS, ACC)  # fmt: skip


@triton.jit
def _copy(source, target, inside, M: tl.constexpr, D: tl.constexpr):
    """Copy a thread's columns of M rows, eight rows at a time so that their loads overlap."""
    for _ in range(M // 8):
        _copy_rows(source, target, inside, 8, D)
        source += 8 * D
        target += 8 * D
    _copy_rows(source, target, inside, M % 8, D)


@triton.jit
def _copy_rows(source, target, inside, COUNT: tl.constexpr, D: tl.constexpr):
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (load_inside(source + i * D, inside),)
    for i in tl.static_range(COUNT):
        store_inside(target + i * D, rows[i], inside)


@triton.jit
def _dots(products, K: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr):
    """Sum each of K tiles over the channels, [2^ROUNDS], in a single reduction across threads."""
    for _ in tl.static_range(K, 1 << ROUNDS):
        products = products + (tl.zeros_like(products[0]),)
    return tl.sum(side_by_side(products, TILE, ROUNDS), 0)


@triton.jit
def _forward(
    grad_output, write_slots, write_weights, read_slots, values, rows, past, along_reads, head_tokens, channel, inside,
    start, stop, KEEP: tl.constexpr, K: tl.constexpr, ROUNDS: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    POWER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run tokens start to stop forward on ``rows``. With KEEP, save replaced rows and the products of reads with ∂o."""
    lane = tl.arange(0, 1 << ROUNDS)
    at = (head_tokens + start) * K
    value_at = (head_tokens + start) * D + channel
    one = tl.minimum(stop - 1 - start, 1)
    write_slot, weight = load_each(write_slots + at, K), load_each(write_weights + at, K)
    next_write_slot = load_each(write_slots + at + one * K, K)
    value = load_inside(values + value_at, inside)
    held = load_rows(rows, write_slot, D, inside)
    for t in range(start, stop):
        # Operands are prefetched, as in the forward scan.
        one = tl.minimum(stop - 1 - t, 1)
        two = tl.minimum(stop - 1 - t, 2)
        far_write_slot = load_each(write_slots + at + two * K, K)
        next_weight = load_each(write_weights + at + one * K, K)
        next_value = load_inside(values + value_at + one * D, inside)
        if KEEP:
            read_slot = load_each(read_slots + at, K)
            grad = load_inside(grad_output + value_at, inside)
        for k in tl.static_range(K):
            w = weight[k].to(ACC)
            if KEEP:
                store_inside(past + ((t - start) * K + k).to(tl.int64) * D, held[k], inside)
            store_inside(rows + write_slot[k].to(tl.int64) * D, decay(w, POWER) * held[k] + w * value.to(ACC), inside)
        if KEEP:
            read = load_rows(rows, read_slot, D, inside)
        held = load_rows(rows, next_write_slot, D, inside)
        if KEEP:
            products = ()
            for k in tl.static_range(K):
                products = products + (read[k] * grad.to(ACC),)
            tl.store(along_reads + (at - head_tokens * K) + lane, _dots(products, K, ROUNDS, TILE), mask=lane < K)
        write_slot, next_write_slot, weight = next_write_slot, far_write_slot, next_weight
        value = next_value
        at += K
        value_at += D


@triton.jit
def _backward(
    grad_output, write_slots, write_weights, read_slots, factors, values, past, grads, grad_values, along_writes,
    head_tokens, channel, inside, start, stop, K: tl.constexpr, ROUNDS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, POWER: tl.constexpr, PROXY_EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Run tokens stop to start in reverse on ``grads``, the gradient of the state's rows."""
    lane = tl.arange(0, 1 << ROUNDS)
    at = (head_tokens + stop - 1) * K
    value_at = (head_tokens + stop - 1) * D + channel
    read_slot, factor = load_each(read_slots + at, K), load_each(factors + at, K)
    write_slot, weight = load_each(write_slots + at, K), load_each(write_weights + at, K)
    replaced = _replaced(past, stop - 1 - start, inside, K, D)
    grad, value = load_inside(grad_output + value_at, inside), load_inside(values + value_at, inside)
    for i in range(stop - start):
        t = stop - 1 - i
        one = tl.minimum(t - start, 1)
        next_read_slot, next_factor = load_each(read_slots + at - one * K, K), load_each(factors + at - one * K, K)
        next_write_slot = load_each(write_slots + at - one * K, K)
        next_weight = load_each(write_weights + at - one * K, K)
        next_replaced = _replaced(past, t - one - start, inside, K, D)
        next_grad = load_inside(grad_output + value_at - one * D, inside)
        next_value = load_inside(values + value_at - one * D, inside)
        read = load_rows(grads, read_slot, D, inside)
        for k in tl.static_range(K):
            store_inside(grads + read_slot[k].to(tl.int64) * D, read[k] + factor[k] * grad.to(ACC), inside)
        written = load_rows(grads, write_slot, D, inside)
        grad_value = weight[0].to(ACC) * written[0]
        products = ()
        for k in tl.static_range(K):
            w = weight[k].to(ACC)
            store_inside(grads + write_slot[k].to(tl.int64) * D, decay(w, POWER) * written[k], inside)
            before = value.to(ACC) + decay_slope(w, POWER, PROXY_EPS) * replaced[k]
            products = products + (written[k] * before,)
            if k > 0:
                grad_value += w * written[k]
        store_inside(grad_values + value_at, grad_value, inside)
        tl.store(along_writes + (at - head_tokens * K) + lane, _dots(products, K, ROUNDS, TILE), mask=lane < K)
        read_slot, factor, write_slot, weight = next_read_slot, next_factor, next_write_slot, next_weight
        replaced, grad, value = next_replaced, next_grad, next_value
        at -= K
        value_at -= D


@triton.jit
def _replaced(past, token, inside, K: tl.constexpr, D: tl.constexpr):
    """Load the rows that the writes of a token replaced."""
    rows = ()
    for k in tl.static_range(K):
        rows = rows + (load_inside(past + (token * K + k).to(tl.int64) * D, inside),)
    return rows
