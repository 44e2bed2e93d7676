"""The rules of `zo_kernels.rules` on the device, for the kernels that update a weight.

A rule is chosen when a kernel is compiled. State is read and written where the update itself is
made, element by element as the weight is, and rounded to nearest.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from zo_kernels.triton.shim import jit, tl


@jit
def state_walk(p_kept, number: tl.constexpr, o_at, DTYPE: tl.constexpr, FLAT: tl.constexpr):
    """Pointers to elements of a state tensor, which lies as its weight does (`flat_walk`)."""
    address = tl.load(p_kept + 1 + number).to(tl.pointer_type(DTYPE))
    if FLAT:
        return tl.multiple_of(address, 16) + o_at
    else:
        return address + o_at


@jit
def with_momentum(b_u, p_kept, p_settings, o_at, m_e, DTYPE, WIDE, FLAT: tl.constexpr):
    """The step of `w -= lr * step`; the buffer is read and written."""
    momentum = tl.load(p_settings).to(WIDE)
    nesterov = tl.load(p_settings + 1).to(WIDE)
    p_buffer = state_walk(p_kept, 0, o_at, DTYPE, FLAT)
    b_buffer = momentum * tl.load(p_buffer, mask=m_e, other=0.0).to(WIDE) + b_u
    tl.store(p_buffer, b_buffer.to(DTYPE), mask=m_e)
    return tl.where(nesterov != 0, b_u + momentum * b_buffer, b_buffer)


@jit
def with_moments(b_u, p_kept, p_settings, o_at, m_e, DTYPE, WIDE, FLAT: tl.constexpr):
    """Adam's step; `1 - beta` is taken in float64, of which fp32 would keep a few digits."""
    beta1, beta2 = tl.load(p_settings), tl.load(p_settings + 1)
    p_m = state_walk(p_kept, 0, o_at, DTYPE, FLAT)
    b_m = beta1.to(WIDE) * tl.load(p_m, mask=m_e, other=0.0).to(WIDE)
    b_m += (1.0 - beta1).to(WIDE) * b_u
    tl.store(p_m, b_m.to(DTYPE), mask=m_e)
    p_v = state_walk(p_kept, 1, o_at, DTYPE, FLAT)
    b_v = beta2.to(WIDE) * tl.load(p_v, mask=m_e, other=0.0).to(WIDE)
    b_v += (1.0 - beta2).to(WIDE) * (b_u * b_u)
    tl.store(p_v, b_v.to(DTYPE), mask=m_e)
    epsilon = tl.load(p_settings + 2).to(WIDE)
    correction1 = tl.load(p_settings + 3).to(WIDE)
    correction2 = tl.load(p_settings + 4).to(WIDE)
    return (b_m / correction1) / (tl.sqrt(b_v / correction2) + epsilon)


@jit
def moved(
    b_w,
    b_total,
    lr,
    decay,
    p_kept,
    settings_ptr,
    o_at,
    m_e,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    RULE: tl.constexpr,
    FLAT: tl.constexpr,
):
    """The new weight by a rule: twin of `zo_kernels.reference.rules.moved`."""
    if RULE == "adam":
        p_settings = settings_ptr + tl.load(p_kept)
        decoupled = tl.load(p_settings + 5).to(WIDE) != 0
        coupled = tl.where(decoupled, 0.0, decay).to(WIDE)
        b_u = b_total + coupled * b_w
        b_step = with_moments(b_u, p_kept, p_settings, o_at, m_e, DTYPE, WIDE, FLAT)
        return b_w - lr * (decay - coupled) * b_w - lr * b_step
    elif RULE == "momentum":
        p_settings = settings_ptr + tl.load(p_kept)
        b_u = b_total + decay * b_w
        b_step = with_momentum(b_u, p_kept, p_settings, o_at, m_e, DTYPE, WIDE, FLAT)
        return b_w - lr * b_step
    elif RULE == "sign":
        b_u = b_total + decay * b_w
        return b_w - lr * ((b_u > 0).to(WIDE) - (b_u < 0).to(WIDE))
    else:
        return b_w - lr * (b_total + decay * b_w)
