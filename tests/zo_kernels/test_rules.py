"""Momentum, Adam and sign in the update: against float64 and torch's optimisers, state in every
layout and dtype, skipped and deferred steps; and `apply_rule_`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import zo_kernels
from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import FEW, LAYOUTS, SHAPES, f64, same_bits
from tests.zo_kernels.test_stage import halves_of, key_of, names, staged, update_of
from zo_kernels import RULES, apply_rule_, perturbed_weights, update_
from zo_kernels._triton import HAS_TRITON

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")

SEED, STEP = 2**40 + 7, 2**31 + 9
COEFF, LR, DECAY = [0.5, -2.0, 0.75], [0.1, 0.02], [0.3, 0.0]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
BETAS, EPSILON = (0.9, 0.999), 1e-8
# The rule and its settings, but for Adam's corrections.
CASES: dict[str, tuple[str, list[float]]] = {
    "sgd": ("sgd", []),
    "momentum": ("momentum", [0.9, 0.0]),
    "nesterov": ("momentum", [0.9, 1.0]),
    "adam": ("adam", [*BETAS, EPSILON, 1.0, 1.0, 0.0]),
    "adamw": ("adam", [*BETAS, EPSILON, 1.0, 1.0, 1.0]),
    "sign": ("sign", []),
}
MANY = LAYOUTS | {name: SHAPES[name] for name in ("3x0", "1d-1040", "conv2d-1x1", "3x1024")}


def settings_of(case: str, t: int, weights: int, device: Any) -> Tensor | None:
    row = list(CASES[case][1])
    if CASES[case][0] == "adam":
        row[3:5] = [1 - beta**t for beta in BETAS]
    return f64([row], device).repeat(weights, 1) if row else None


def state_of(case: str, params: list[Tensor]) -> list[Tensor]:
    """As after some steps: random, a second moment positive; each lies as its weight does."""
    kept = []
    for name in RULES[CASES[case][0]].state:
        for w in params:
            s = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device)
            s.copy_(torch.randn(w.shape, dtype=torch.float64))
            kept.append(s.square_().add_(0.1) if name == "exp_avg_sq" else s)
    return kept


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones with the same strides, also where these leave gaps."""
    found = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in tensors]
    return [c.to(t.device).copy_(t) for c, t in zip(found, tensors, strict=True)]


def update(
    params: list[Tensor], state: list[Tensor], case: str, backend: str, t: int = 3, **kwargs: Any
) -> None:
    """`update_` with a value for everything a test does not name."""
    device, count = params[0].device, len(params)
    args: dict[str, Any] = {
        "tensors": [*range(count)],
        "groups": [i % 2 for i in range(count)],
        "scales": [0.7 + 0.1 * i for i in range(count)],
        "noise": "rademacher",
        "settings": settings_of(case, t, count, device),
    } | kwargs
    update_(
        params,
        torch.tensor([SEED, STEP + t], device=device),
        f64(args.pop("coeff", COEFF), device),
        f64(LR, device),
        f64(DECAY, device),
        torch.tensor(args.pop("skip", 0.0), device=device),
        rule=CASES[case][0],
        state=state,
        backend=backend,
        **args,
    )


def total(w: Tensor, i: int, t: int = 3, noise: str = "rademacher") -> Tensor:
    """What `update` makes of the directions of weight i, in float64."""
    drawn = [
        c * model(w.shape, SEED, STEP + t, tensor=i, query=q, noise=noise).double()
        for q, c in enumerate(COEFF)
    ]
    return (0.7 + 0.1 * i) * torch.stack(drawn).sum(0)


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
    for i, w in enumerate(before):
        args = (LR[i % 2], DECAY[i % 2])
        old = [s.cpu() for s in then[i::count]]
        u = total(w, i)
        exact = moved(case, w.cpu().double(), u, [s.double() for s in old], *args)
        low = moved(case, w.cpu().float(), u.float(), [s.float() for s in old], *args)
        for j, now in enumerate([params[i], *state[i::count]]):
            if dtype == torch.bfloat16:
                assert_rounded(now, exact[j], 0.5 if j else 1.0, 1e-5)
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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
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


def stage(
    outs: list[Tensor],
    params: list[Tensor],
    state: list[Tensor],
    case: str,
    backend: str,
    pending: dict[str, Any],
    **kwargs: Any,
) -> None:
    device = params[0].device
    zo_kernels.stage_(
        *(outs, params, key_of(STEP, device), f64(0.5, device)),
        **(names(params) | pending | kwargs),
        rule=CASES[case][0],
        state=state,
        settings=settings_of(case, 3, len(params), device),
        backend=backend,
    )


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_a_deferred_step_is_the_step(
    case: str, dtype: torch.dtype, noise: str, backend: str, device: Any
) -> None:
    """Bit for bit: weights, state, and the halves of the new weights."""
    params = [make(dtype, device) for make in MANY.values()]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
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
    kinds = [*DTYPES.values()] * len(MANY)
    params = [make(d, device) for make, d in zip(MANY.values(), kinds, strict=False)]
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
    params = [make(torch.float32, device) for make in MANY.values()]
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


@needs_triton
def test_a_table_follows_the_state(device: Any) -> None:
    table = import_module("zo_kernels._table")
    w = torch.randn(4, 16, device=device)
    with table.hold_tables() as held:
        for _ in range(2):
            state = state_of("adam", [w])
            before, then = copies([w]), copies(state)
            update([w], state, "adam", "triton")
            update(before, then, "adam", "reference")
            torch.testing.assert_close((w, *state), (*before, *then))
            assert held[-1].kept[0].tolist() == [0, *(s.data_ptr() for s in state)]
    assert len(held) == 2 and held[0] is not held[1]


@needs_triton
def test_launches_do_not_show(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = import_module("zo_kernels._table")

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        table._TABLES.clear()
        params = [make(torch.bfloat16, device) for make in FEW.values()]
        state = state_of("adam", params)
        update(params, state, "adam", "triton")
        return params + state

    first = run()
    for name, value in (("INT32_MAX", 0), ("BLOCK", 256), ("BLOCK", 2048)):
        monkeypatch.setattr(table, name, value)
        assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True)), (name, value)


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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_apply_rule_(case: str, dtype: torch.dtype, device: Any) -> None:
    """The reference's update, given the sum; and it reads nothing on the host."""
    w = FEW["channels-last"](dtype, device)
    state = state_of(case, [w])
    other, *kept = copies([w, *state])
    update([w], state, case, "reference")
    wide = torch.promote_types(dtype, torch.float32)
    u = total(w, 0).to(device, wide)
    words = model(w.shape, SEED, STEP + 3, tensor=0, noise="bits", purpose="rounding").to(device)
    settings = settings_of(case, 3, 1, device)
    row = None if settings is None else settings[0]
    rates = (f64(LR[0], device), f64(DECAY[0], device), torch.zeros((), device=device))
    apply_rule_(other, u, *rates, CASES[case][0], kept, row, words)
    torch.testing.assert_close(
        other, w, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    torch.testing.assert_close(kept, state)
    given = [t.to("meta") for t in (other, u, *rates)]
    row = None if row is None else row.to("meta")
    apply_rule_(*given, CASES[case][0], [s.to("meta") for s in kept], row, words.to("meta"))


@pytest.mark.parametrize("case", CASES)
def test_apply_rule_skips(case: str, device: Any) -> None:
    w = torch.randn(3, 5, device=device).bfloat16()
    state = state_of(case, [w])
    before = copies([w, *state])
    settings = settings_of(case, 3, 1, device)
    rates = (f64(LR[0], device), f64(DECAY[0], device), torch.ones((), device=device))
    u = torch.full((3, 5), float("nan"), device=device)
    apply_rule_(w, u, *rates, CASES[case][0], state, None if settings is None else settings[0])
    assert all(same_bits(a, b) for a, b in zip((w, *state), before, strict=True))


def test_apply_rule_rounds_to_nearest_without_words(device: Any) -> None:
    w, u = torch.ones(8, device=device).bfloat16(), torch.full((8,), 1e-3, device=device)
    one = f64(1.0, device)
    apply_rule_(w, u, one, 0 * one, torch.zeros((), device=device))
    assert w.eq(1).all()


def test_opcheck(backend: str, device: Any) -> None:
    params = [make(torch.float32, device) for make in FEW.values()]
    state, settings = state_of("adam", params), settings_of("adam", 3, len(params), device)
    pending, named = update_of(params), names(params)
    key, eps = key_of(STEP, device), f64(0.5, device)
    given = [pending[k] for k in ("before", "coeff", "lr", "weight_decay", "skip")]
    by = ("adam", state, settings, backend)
    ops, groups = torch.ops.zo_kernels, pending["groups"]
    args = (named["tensors"], groups, named["scales"], "normal", *by)
    torch.library.opcheck(ops.update_.default, (params, key, *given[1:], *args))
    span = (named["tensors"], named["scales"], 0, 2, 0, "normal")
    outs = halves_of(params, 2)
    args = (outs, params, key, eps, *span, *given, groups, *by)
    torch.library.opcheck(ops.stage_.default, args)


W, ROW = torch.zeros(3, 4), torch.ones(1, 2, dtype=torch.float64)
MOMENTUM: dict[str, Any] = {"rule": "momentum", "state": [torch.zeros(3, 4)], "settings": ROW}
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rule": (
        {"rule": "lion"},
        ValueError,
        "rule must be one of ('sgd', 'momentum', 'adam', 'sign'), got 'lion'",
    ),
    "none-kept": (
        {"rule": "momentum", "settings": ROW},
        ValueError,
        "state must have 1 tensors, 1 a weight with rule 'momentum', got 0",
    ),
    "too-many": (
        {"state": [W]},
        ValueError,
        "state must have 0 tensors, 0 a weight with rule 'sgd', got 1",
    ),
    "shape": (
        {"state": [torch.zeros(4, 3)]},
        ValueError,
        "state[0] must have shape [3, 4], got [4, 3]",
    ),
    "dtype": (
        {"state": [torch.zeros(3, 4).double()]},
        TypeError,
        "state[0] must be torch.float32, got torch.float64",
    ),
    "device": (
        {"state": [torch.zeros(3, 4, device="meta")]},
        ValueError,
        "state[0] must be on cpu, got meta",
    ),
    "expanded": (
        {"state": [torch.zeros(3, 1).expand(3, 4)]},
        ValueError,
        "state[0] is changed in place and must not be expanded",
    ),
    "no-settings": ({"settings": None}, TypeError, "settings must be a Tensor, got NoneType"),
    "settings": (
        {"settings": torch.ones(1, 3, dtype=torch.float64)},
        ValueError,
        "settings must have shape [1, 2], got [1, 3]",
    ),
    "settings-dtype": (
        {"settings": torch.ones(1, 2)},
        TypeError,
        "settings must be torch.float64, got torch.float32",
    ),
    "settings-device": (
        {"settings": torch.ones(1, 2, dtype=torch.float64, device="meta")},
        ValueError,
        "settings must be on cpu, got meta",
    ),
    "settings-gaps": (
        {"settings": torch.ones(1, 4, dtype=torch.float64)[:, ::2]},
        ValueError,
        "settings must be contiguous, got shape [1, 2] with strides [4, 2]",
    ),
    "settings-of-none": (
        {"rule": "sign", "state": []},
        ValueError,
        "settings must be None with rule 'sign'",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("op", ["update_", "stage_"])
def test_errors(op: str, name: str) -> None:
    given, error, message = ERRORS[name]
    given = ({} if name in ("none-kept", "too-many") else MOMENTUM) | given
    with pytest.raises(error) as caught:
        if op == "stage_":
            staged([W], "auto", **(update_of([W]) | given))
        else:
            one, key = f64([1.0], "cpu"), torch.tensor([1, 2])
            named: Any = {"tensors": [0], "groups": [0], "scales": [1.0]}
            update_([W], key, one, one, one, torch.zeros(()), **named, **given)
    assert message in str(caught.value)


def test_state_without_an_update_is_refused() -> None:
    with pytest.raises(ValueError, match="a pending update needs before"):
        staged([W], "auto", **MOMENTUM)


def test_errors_of_apply_rule_() -> None:
    one = f64(1.0, "cpu")
    with pytest.raises(ValueError, match=r"u_noise must have shape \[3, 4\], got \[3\]"):
        apply_rule_(W, torch.zeros(3), one, one, one)
    with pytest.raises(TypeError, match=r"w must be torch\.float32 or"):
        apply_rule_(W.half(), W, one, one, one)
