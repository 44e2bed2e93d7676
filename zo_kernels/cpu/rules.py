"""The sweep of an update that keeps state: numba's twin of `zo_kernels.rules`, but for SGD, whose
sweep (`update_sweep`) stands alone; and any rule for an estimate that is given."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numba import carray
from torch import Tensor

from zo_kernels.cpu.compiled import njit
from zo_kernels.cpu.kernels import CHUNK, _pointer_to, fill_float
from zo_kernels.cpu.sweeps import PARALLEL_FROM, memory_of, pool_of

SGD, MOMENTUM, ADAM, SIGN = 0, 1, 2, 3
CODES = {"sgd": SGD, "momentum": MOMENTUM, "adam": ADAM, "sign": SIGN}


@njit(nogil=True, fastmath={"contract"}, cache=True)
def sgd_run(w, total, lr, decay):
    for i in range(w.shape[0]):
        w[i] -= lr * (total[i] + decay * w[i])


@njit(nogil=True, fastmath={"contract"}, cache=True)
def momentum_run(w, buffer, total, lr, decay, settings):
    momentum, nesterov = np.float32(settings[0]), settings[1] != 0
    for i in range(w.shape[0]):
        u = total[i] + decay * w[i]
        b = momentum * buffer[i] + u
        buffer[i] = b
        w[i] -= lr * (u + momentum * b if nesterov else b)


@njit(nogil=True, fastmath={"contract"}, cache=True)
def adam_run(w, m, v, total, lr, decay, settings):
    beta1, more1 = np.float32(settings[0]), np.float32(1.0 - settings[0])
    beta2, more2 = np.float32(settings[1]), np.float32(1.0 - settings[1])
    epsilon = np.float32(settings[2])
    correction1, correction2 = np.float32(settings[3]), np.float32(settings[4])
    coupled = decay if settings[5] == 0 else np.float32(0.0)
    shrink = lr * (decay - coupled)
    for i in range(w.shape[0]):
        x = w[i]
        u = total[i] + coupled * x
        m[i] = beta1 * m[i] + more1 * u
        v[i] = beta2 * v[i] + more2 * (u * u)
        step = (m[i] / correction1) / (np.sqrt(v[i] / correction2) + epsilon)
        w[i] = x - shrink * x - lr * step


@njit(nogil=True, fastmath={"contract"}, cache=True)
def sign_run(w, total, lr, decay):
    for i in range(w.shape[0]):
        u = total[i] + decay * w[i]
        w[i] -= lr * np.float32(np.int32(u > 0) - np.int32(u < 0))


@njit(nogil=True, cache=True)
def move(rule, w, first, second, total, lr, decay, settings):
    """One run of weights by a rule, with the sum of their directions."""
    if rule == MOMENTUM:
        momentum_run(w, first, total, lr, decay, settings)
    elif rule == ADAM:
        adam_run(w, first, second, total, lr, decay, settings)
    elif rule == SIGN:
        sign_run(w, total, lr, decay)
    else:
        sgd_run(w, total, lr, decay)


@njit(nogil=True, fastmath={"contract"}, cache=True)
def rule_sweep(
    rule, w, first, second, settings, coeff, scale, lr, decay, layout, noise, begin, end
):
    """`update_sweep` with the state `first`, `second`, walked as `w`; `w` where a rule has less."""
    cols, inner, s_row, s_outer, s_inner, first_row = layout
    kind, lanes, w1, w2, w3, w4, w5 = noise
    c1, c2, c3 = np.uint32(w1), np.uint32(w2), np.uint32(w3)
    k0, k1 = np.uint32(w4), np.uint32(w5)
    per_row = (cols + lanes - 1) // lanes
    z = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, np.float32)
    for g0 in range(begin, end, CHUNK // lanes):
        g_stop = min(g0 + CHUNK // lanes, end)
        n = (g_stop - g0) * lanes
        total[:n] = 0
        for q in range(coeff.shape[0]):
            fill_float(z, kind, g0, g_stop - g0, c1, c2, np.uint32(c3 + np.uint32(q)), k0, k1)
            c = scale * coeff[q]
            for i in range(n):
                total[i] += c * z[i]
        g = g0
        while g < g_stop:
            row = g // per_row
            g_end = min((row + 1) * per_row, g_stop)
            col = (g - row * per_row) * lanes
            stop = min(cols, (g_end - row * per_row) * lanes)
            at = (g - g0) * lanes
            while col < stop:
                run = min(inner - col % inner, stop - col)
                a = (row - first_row) * s_row + (col // inner) * s_outer + (col % inner) * s_inner
                t = total[at : at + run]
                if s_inner == 1:
                    b = a + run
                    move(rule, w[a:b], first[a:b], second[a:b], t, lr, decay, settings)
                else:
                    b, s = a + (run - 1) * s_inner + 1, s_inner
                    move(rule, w[a:b:s], first[a:b:s], second[a:b:s], t, lr, decay, settings)
                col += run
                at += run
            g = g_end


@njit(nogil=True, cache=True)
def rule_all(rule, table, kept, settings, scales, coeff, lr, decay, words):
    """`rule_sweep` over many weights in one call; a row of `table` as in `update_all`, of `kept`
    [T, 3] int64: the weight's row of `settings`, the addresses of `first` and `second`."""
    c2, c3, k0, k1 = words
    for t in range(table.shape[0]):
        row, own = table[t], kept[t]
        w = carray(_pointer_to(row[0]), (row[1],), np.float32)
        first = carray(_pointer_to(own[1]), (row[1],), np.float32)
        second = carray(_pointer_to(own[2]), (row[1],), np.float32)
        layout = (row[2], row[3], row[4], row[5], row[6], 0)
        noise = (row[7], row[8], row[10], c2, c3, k0, k1)
        g, numbers = row[11], settings[own[0]]
        # fmt: off
        rule_sweep(rule, w, first, second, numbers, coeff, scales[t], lr[g], decay[g], layout,
                   noise, 0, row[9])
        # fmt: on


@njit(nogil=True, cache=True)
def move_part(rule, w, first, second, total, lr, decay, settings, begin, end):
    """`move` of the elements `begin` to `end - 1`."""
    a, b = begin, end
    move(rule, w[a:b], first[a:b], second[a:b], total[a:b], lr, decay, settings)


def apply_rule_(
    w: Tensor,
    u_noise: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    rule: str,
    state: Sequence[Tensor],
    settings: Tensor | None,
) -> None:
    """A weight and its state, all float32 and contiguous, in one pass."""
    if skip.item() != 0 or w.numel() == 0:
        return
    size = w.numel()
    memory = [memory_of(t.detach(), size) for t in (w, *state)]
    memory += [memory[0]] * (3 - len(memory))  # a rule does not look at what it does not keep
    numbers = np.zeros(1) if settings is None else settings.numpy()
    rates = (np.float32(lr.item()), np.float32(weight_decay.item()))
    args = (CODES[rule], *memory, memory_of(u_noise.detach(), size), *rates, numbers)
    workers = torch.get_num_threads() if size >= PARALLEL_FROM else 1
    bounds = [size * i // workers for i in range(workers + 1)]
    if workers == 1:
        move_part(*args, 0, size)
        return
    for job in [pool_of(workers).submit(move_part, *args, a, b) for a, b in pairwise(bounds)]:
        job.result()
