"""What happens to a weight when it meets `u = scale * sum_q coeff_q z_q + weight_decay * w`.

    sgd       w -= lr u
    momentum  b = momentum b + u;  w -= lr (u + momentum b if nesterov else b)
    adam      m = beta1 m + (1 - beta1) u;  v = beta2 v + (1 - beta2) u^2
              w -= lr (m / correction1) / (sqrt(v / correction2) + epsilon)
    sign      w -= lr sign(u)

Adam's `correction` is `1 - beta^t`, made by the caller; `decoupled` takes the decay out of `u` and
shrinks the weight by `lr weight_decay` instead (AdamW). State has the names torch's optimisers give
it, and begins as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels.layout import layout_of
from zo_kernels.registry import check_in_place, check_tensor


class Rule(NamedTuple):
    """What happens to w when it meets u = scale * sum_q coeff_q z_q + weight_decay * w.

    Attributes:
        state: tensors kept for a weight, by torch's names.
        settings: numbers, in order, of a row of `settings`; read on the device.
    """

    name: str
    state: tuple[str, ...]
    settings: tuple[str, ...]


RULES = {
    rule.name: rule
    for rule in (
        Rule("sgd", (), ()),
        Rule("momentum", ("momentum_buffer",), ("momentum", "nesterov")),
        Rule(
            "adam",
            ("exp_avg", "exp_avg_sq"),
            ("beta1", "beta2", "epsilon", "correction1", "correction2", "decoupled"),
        ),
        Rule("sign", (), ()),
    )
}


By = tuple[str, Sequence[Tensor], Tensor | None]  # rule, state, settings


def check_rule(
    rule: str,
    state: Sequence[Tensor],
    settings: Tensor | None,
    params: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Raise where state or settings are not those that the rule has for these weights."""
    if rule == "sgd" and not state and settings is None:
        return
    if rule not in RULES:
        raise ValueError(f"rule must be one of {tuple(RULES)}, got {rule!r}")
    count, kept, numbers = len(params), len(RULES[rule].state), len(RULES[rule].settings)
    if len(state) != kept * count:
        raise ValueError(
            f"state must have {kept * count} tensors, {kept} a weight with rule {rule!r}, "
            f"got {len(state)}"
        )
    for i, s in enumerate(state):
        w = params[i % count]
        check_tensor(f"state[{i}]", s, shape=w.shape, dtype=[w.dtype], device=device)
        check_in_place(f"state[{i}]", s)
    if not numbers:
        if settings is not None:
            raise ValueError(f"settings must be None with rule {rule!r}")
        return
    shape = [count, numbers]
    check_tensor("settings", settings, shape=shape, dtype=[torch.float64], device=device)
    assert settings is not None
    if not settings.is_contiguous():
        raise ValueError(
            f"settings must be contiguous, got shape {shape} with strides {[*settings.stride()]}"
        )


def walked(w: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
    """A weight and its state as one walk serves all of them: themselves, or contiguous copies
    where a weight cannot be walked or its state lies otherwise; `write_back` follows."""
    layout = layout_of(w)
    if layout is not None and all(layout_of(s) == layout for s in state):
        return [w, *state]
    return [t.contiguous() for t in (w, *state)]


def kept_of(
    rule: str, rows: Sequence[int], states: Sequence[Sequence[Tensor]]
) -> list[tuple[int, ...]]:
    """For each weight: where its row of settings begins, and the addresses of its state."""
    width = len(RULES[rule].settings)
    if not width:
        return []
    return [
        (row * width, *(s.data_ptr() for s in own)) for row, own in zip(rows, states, strict=True)
    ]


def write_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for t, copied in zip(tensors, copies, strict=True):
        if copied is not t:
            t.copy_(copied)
