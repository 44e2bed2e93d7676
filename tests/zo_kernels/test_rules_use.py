"""Rules of the update as they are called: tables, launches, `apply_rule_`, the ops as torch sees
them, wrong use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._noise_model import model
from tests.zo_kernels._rules import (
    CASES,
    DECAY,
    DTYPES,
    LR,
    SEED,
    STEP,
    copies,
    settings_of,
    state_of,
    total,
    update,
)
from tests.zo_kernels._weights import FEW, f64, same_bits
from tests.zo_kernels.test_stage import halves_of, key_of, names, staged, update_of
from zo_kernels import RULES, apply_rule_, update_
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")


@needs_triton
def test_a_table_follows_the_state(device: Any) -> None:
    table = import_module("zo_kernels.triton.table")
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
    table = import_module("zo_kernels.triton.table")

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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_apply_rule_in_one_pass(
    case: str, threads: int, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    """Contiguous float32 on the CPU: three steps as in plain torch, their versions rise, and a
    skipped one moves nothing."""
    rules = pytest.importorskip("zo_kernels.cpu.rules")
    monkeypatch.setattr(rules, "PARALLEL_FROM", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    w = torch.randn(7, 33)
    ours, go = [w, *state_of(case, [w])], torch.zeros(())
    plain = copies(ours)
    for step in range(3):
        u, settings = torch.randn(7, 33), settings_of(case, step + 1, 1, torch.device("cpu"))
        row = None if settings is None else settings[0]
        rates = (f64(LR[0], "cpu"), f64(DECAY[0], "cpu"))
        for (p, *state), backend in ((ours, "numba"), (plain, "reference")):
            version = p._version
            apply_rule_(p, u, *rates, go, CASES[case][0], state, row, backend=backend)
            assert p._version > version
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    before = copies(ours)
    apply_rule_(ours[0], u, *rates, go + 1, CASES[case][0], ours[1:], row, backend="numba")
    assert all(same_bits(a, b) for a, b in zip(ours, before, strict=True))


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
    params = [FEW[name](torch.float32, device) for name in ("3x129", "channels-last")]
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
        {"rule": "none"},
        ValueError,
        f"rule must be one of {tuple(RULES)}, got 'none'",
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
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'nope'"):
        apply_rule_(W.double(), W.double(), one, one, torch.zeros(()), backend="nope")
    with pytest.raises(ValueError, match=r"u_noise must have shape \[3, 4\], got \[3\]"):
        apply_rule_(W, torch.zeros(3), one, one, one)
    with pytest.raises(TypeError, match=r"w must be torch\.float32 or"):
        apply_rule_(W.half(), W, one, one, one)
