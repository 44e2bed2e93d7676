"""A step by every rule: settings, state, and calls with a value for what a test does not name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zo_kernels
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import LAYOUTS, SHAPES, f64
from tests.zo_kernels.test_stage import key_of, names
from zo_kernels import RULES, update_

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
FLAT = {name: SHAPES[name] for name in ("3x0", "1d-1040", "conv2d-1x1")}
MANY = LAYOUTS | FLAT
SOME = {name: MANY[name] for name in (*FLAT, "channels-last", "some-columns", "sliced-kernel")}


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


__all__ = [
    "BETAS",
    "CASES",
    "COEFF",
    "DECAY",
    "DTYPES",
    "EPSILON",
    "FLAT",
    "LR",
    "MANY",
    "SEED",
    "SOME",
    "STEP",
    "copies",
    "settings_of",
    "stage",
    "state_of",
    "total",
    "update",
]
