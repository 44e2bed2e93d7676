"""Momentum, Adam and sign in the update: against float64 and torch's optimisers, state in every
layout and dtype, skipped and deferred steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._rules import (
    BETAS,
    CASES,
    COEFF,
    DECAY,
    DTYPES,
    EPSILON,
    FLAT,
    LR,
    MANY,
    SOME,
    STEP,
    copies,
    settings_of,
    stage,
    state_of,
    total,
    update,
)
from tests.zo_kernels._weights import FEW, f64, same_bits
from tests.zo_kernels.test_stage import halves_of, key_of, names, update_of
from zo_kernels import RULES, perturbed_weights, update_
from zo_kernels.registry import interpreted

pytestmark = pytest.mark.usefixtures("poison")


def moved(case: str, w: Tensor, u: Tensor, state: list[Tensor], lr: float, decay: float) -> Any:
    """The new weight and state at the third step, in the dtype of its arguments."""
    rule, numbers = CASES[case]
    if case != "adamw":
        u = u + decay * w
    if rule == "sgd":
        return [w - lr * u]
    if rule == "sign":
        return [w - lr * u.sign()]
    if rule == "momentum":
        b = numbers[0] * state[0] + u
        return [w - lr * (u + numbers[0] * b if case == "nesterov" else b), b]
    assert rule == "adam"
    if case == "adamw":
        w = w - lr * decay * w
    m = BETAS[0] * state[0] + (1 - BETAS[0]) * u
    v = BETAS[1] * state[1] + (1 - BETAS[1]) * u * u
    root = (v / (1 - BETAS[1] ** 3)).sqrt() + EPSILON
    return [w - lr * (m / (1 - BETAS[0] ** 3)) / root, m, v]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_float64(
    case: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """Every layout in one call; bf16 is rounded to a neighbour, its state to the nearest."""
    params = [make(dtype, device) for make in MANY.values()]
    state, count = state_of(case, params), len(params)
    before, then = copies(params), copies(state)
    update(params, state, case, backend)
    nearest = 1.0 if backend == "triton" and interpreted() else 0.5  # whose cast truncates
    for i, w in enumerate(before):
        args = (LR[i % 2], DECAY[i % 2])
        old = [s.cpu() for s in then[i::count]]
        u = total(w, i)
        exact = moved(case, w.cpu().double(), u, [s.double() for s in old], *args)
        low = moved(case, w.cpu().float(), u.float(), [s.float() for s in old], *args)
        for j, now in enumerate([params[i], *state[i::count]]):
            if dtype == torch.bfloat16:
                assert_rounded(now, exact[j], nearest if j else 1.0, 1e-5)
            elif dtype == torch.float64:
                assert_within_budget(now, exact[j], exact[j])
            else:
                assert_within_budget(now, low[j], exact[j])


OPTIMISERS: dict[str, Any] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"betas": BETAS, "eps": EPSILON}),
    "adamw": (torch.optim.AdamW, {"betas": BETAS, "eps": EPSILON}),
}


@pytest.mark.parametrize("noise", ["rademacher", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", OPTIMISERS)
def test_steps_are_those_of_torch(
    case: str, dtype: torch.dtype, noise: str, backend: str, device: Any
) -> None:
    """From zeros, with the gradient materialised; the state is what torch keeps, by its name."""
    w = torch.randn(24, 40, dtype=torch.float64).to(device, dtype)
    optimiser, given = OPTIMISERS[case]
    others = []
    for kind in (dtype, torch.float64):
        p = torch.nn.Parameter(w.to("cpu", kind, copy=True))
        others.append((p, optimiser([p], lr=LR[0], weight_decay=DECAY[0], **given)))
    kept = RULES[CASES[case][0]].state
    state = [torch.zeros_like(w) for _ in kept]
    for t in range(1, 6):
        update([w], state, case, backend, t, noise=noise)
        for p, stepper in others:
            p.grad = total(w, 0, t, noise).to(p.dtype)
            stepper.step()
    (low, first), (exact, second) = others
    # Errors of five steps add up in momentum, and Adam divides them by what may be smaller than 1;
    # torch's order in float64 is another one.
    extra = 1e-14
    if noise == "normal":
        extra += 20 * 0.7 * sum(map(abs, COEFF)) * NORMAL_ERROR
    assert_within_budget(w, low.data, exact.data, LR[0] * extra)
    for name, s in zip(kept, state, strict=True):
        assert_within_budget(s, first.state[low][name], second.state[exact][name], extra)


# One case of every form of state; plain descent waits in test_stage.
FORMS = ("momentum", "adamw", "sign")
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@two_dtypes
@pytest.mark.parametrize("case", FORMS)
def test_a_skipped_step_leaves_all_bits(
    case: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    params = [make(dtype, device) for make in FEW.values()]
    state = state_of(case, params)
    for t in (*params, *state):
        t[(0,) * t.ndim] = -0.0
    before, then = copies(params), copies(state)
    nowhere = [float("nan"), float("inf")]
    update(params, state, case, backend, skip=1.0, coeff=nowhere)
    outs = halves_of(params, 2)
    pending = update_of(params, skip=1.0) | {"coeff": f64(nowhere, device)}
    stage(outs, params, state, case, backend, pending)
    for a, b in zip((*params, *state), (*before, *then), strict=True):
        assert same_bits(a, b)


@two_dtypes
@pytest.mark.parametrize("case", FORMS)
def test_a_deferred_step_is_the_step(
    case: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """Bit for bit: weights, state, and the halves of the new weights."""
    noise = "rademacher" if dtype == torch.bfloat16 else "normal"
    params = [make(dtype, device) for make in SOME.values()]
    state, pending = state_of(case, params), update_of(params)
    others, kept = copies(params), copies(state)
    outs = halves_of(params, 2)
    stage(outs, params, state, case, backend, pending, noise=noise)
    given = [pending[k] for k in ("before", "coeff", "lr", "weight_decay", "skip")]
    by = {"rule": CASES[case][0], "settings": settings_of(case, 3, len(params), device)}
    named = names(params) | {"groups": pending["groups"], "noise": noise, "backend": backend}
    update_(others, *given, **named, **by, state=kept)
    for a, b in zip((*params, *state), (*others, *kept), strict=True):
        assert same_bits(a, b)
    for i, (out, w) in enumerate(zip(outs, others, strict=True)):
        at = {"tensor": named["tensors"][i], "scale": named["scales"][i], "noise": noise}
        key = key_of(STEP, device)
        assert same_bits(out, perturbed_weights(w, key, f64(0.5, device), **at, backend=backend))


@two_dtypes
@pytest.mark.parametrize("case", FORMS)
def test_slices_of_rows(case: str, dtype: torch.dtype, backend: str, device: Any) -> None:
    """A weight in parts, with the same parts of its state, is the weight as a whole."""
    w = torch.randn(70, 33, dtype=torch.float64).to(device, dtype)
    state, pending = state_of(case, [w]), update_of([w])
    parts, kept = copies([w])[0], copies(state)
    (whole,) = halves_of([w], 2)
    stage([whole], [w], state, case, backend, pending)
    for a, b in ((0, 5), (5, 64), (64, 70)):
        outs, rows = halves_of([parts[a:b]], 2), [s[a:b] for s in kept]
        stage(outs, [parts[a:b]], rows, case, backend, pending, first_row=a)
        assert same_bits(outs[0], whole[:, a:b])
    assert all(same_bits(a, b) for a, b in zip((w, *state), (parts, *kept), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_large_weights_on_threads(case: str) -> None:
    pytest.importorskip("numba")
    w = torch.randn(600, 1030)
    state, pending = state_of(case, [w]), update_of([w])
    parts, kept = copies([w])[0], copies(state)
    stage(halves_of([w], 2), [w], state, case, "numba", pending)
    for a, b in ((0, 200), (200, 600)):
        outs, rows = halves_of([parts[a:b]], 2), [s[a:b] for s in kept]
        stage(outs, [parts[a:b]], rows, case, "numba", pending, first_row=a)
    assert all(same_bits(a, b) for a, b in zip((w, *state), (parts, *kept), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_together_is_one_by_one(case: str, backend: str, device: Any) -> None:
    """Each weight meets its own state and its own row of settings, whatever its dtype."""
    kinds = [*DTYPES.values()] * 4
    params = [make(d, device) for make, d in zip((FLAT | FEW).values(), kinds, strict=False)]
    state, count = state_of(case, params), len(params)
    settings = settings_of(case, 3, count, device)
    if settings is not None:
        settings[:, :2] -= torch.linspace(0, 0.3, count, dtype=torch.float64)[:, None].to(device)
    alone, kept = copies(params), copies(state)
    groups, scales = [i % 2 for i in range(count)], [0.7 + 0.1 * i for i in range(count)]
    update(params, state, case, backend, settings=settings)
    for i, w in enumerate(alone):
        row = None if settings is None else settings[i : i + 1]
        named = {"tensors": [i], "groups": groups[i : i + 1], "scales": scales[i : i + 1]}
        update([w], kept[i::count], case, backend, settings=row, **named)
    assert all(same_bits(a, b) for a, b in zip((*params, *state), (*alone, *kept), strict=True))


@pytest.mark.parametrize("case", ["momentum", "adam"])
def test_how_state_lies_does_not_show(case: str, backend: str, device: Any) -> None:
    """State as `zeros_like` makes it, in another memory format, or misaligned."""
    params = [make(torch.float32, device) for make in SOME.values()]
    state = state_of(case, params)
    outs, pending = halves_of(params, 2), update_of(params)
    forms: list[Any] = [
        lambda s: torch.zeros_like(s).copy_(s),
        lambda s: s.clone(memory_format=torch.contiguous_format),
        lambda s: s.new_zeros(s.numel() + 1)[1:].view(s.shape).copy_(s),
    ]
    runs = []
    for form in (None, *forms):
        ws, kept = copies(params), [form(s) for s in state] if form else copies(state)
        update(ws, kept, case, backend)
        stage(outs, ws, kept, case, backend, pending)
        runs.append([*ws, *kept, *copies(outs)])
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_sign_of_nothing_moves_nothing(backend: str, device: Any) -> None:
    w = torch.zeros(3, 5, device=device)
    update([w], [], "sign", backend, coeff=[0.0])
    assert w.eq(0).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_list_of_rules(rule: str, backend: str, device: Any) -> None:
    """Every rule has a case, moves weights and state, and counts its changes for autograd."""
    found = RULES[rule]
    cases = [case for case, (name, _) in CASES.items() if name == rule]
    assert found.name == rule and cases
    for case in cases:
        assert len(CASES[case][1]) == len(found.settings)
        w = torch.randn(3, 16, device=device)
        state = [torch.zeros_like(w) for _ in found.state]
        versions = [t._version for t in (w, *state)]
        before = w.clone()
        update([w], state, case, backend)
        assert not torch.equal(w, before) and all(s.ne(0).any() for s in state)
        now = [t._version for t in (w, *state)]
        assert all(a > b for a, b in zip(now, versions, strict=True))
