"""Parameter groups over the head, each with a learning rate and a weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from elasticzo.module import ZOModule
from elasticzo.settings import check_saved


def check_rates(groups: Sequence[Mapping[str, Any]]) -> None:
    for group in groups:
        lr, decay = group["lr"], group["weight_decay"]
        if not (_is_rate(lr) and _is_rate(decay)):
            raise ValueError(
                "lr and weight_decay must be finite numbers or 0-d tensors >= 0, got "
                f"{lr!r} and {decay!r}"
            )


def _is_rate(value: Any) -> bool:
    number = value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, Real)
    return number and not isinstance(value, bool) and 0.0 <= float(value) < float("inf")


def check_groups(of: str, saved: Any, entries: Iterable[str]) -> None:
    """Groups of a state, which may have what a schedule keeps in them, too."""
    if not isinstance(saved, (list, tuple)):
        raise ValueError(f"param_groups of a state of {of} must be a list, got {saved!r}")
    for i, group in enumerate(saved):
        check_saved(f"{of}, param_groups[{i}],", group, ("params", *entries), {}, more=True)
        if not isinstance(group["params"], (list, tuple)):
            raise ValueError(f"params of param_groups[{i}] must be a list, got {group['params']!r}")
    check_rates(saved)


def check_member(of: str, group: dict[str, Any], model: ZOModule) -> list[Tensor]:
    """The parameters of a group, all of the head."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    head = {id(p) for p in model.head_parameters()}
    if any(id(p) not in head for p in params):
        raise ValueError(f"{of} has a parameter that is not in the head")
    return params


def complete_groups(
    model: ZOModule, groups: Sequence[dict[str, Any]] | None, defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The given groups, and one of all head parameters that are in none of them."""
    complete, taken = [], set()
    for i, group in enumerate(groups or []):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"groups[{i}] must be a dictionary with 'params', got {group!r}")
        unknown = set(group) - {"params", "name", *defaults}
        if unknown:
            raise ValueError(f"groups[{i}] has unknown keys {sorted(unknown)}")
        params = check_member(f"groups[{i}]", group, model)
        taken |= {id(p) for p in params}
        complete.append({**group, "params": params})
    rest = [p for p in model.head_parameters() if id(p) not in taken]
    if rest or not complete:
        complete.append({"params": rest})
    return complete


def check_state(
    of: str,
    state: Any,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    counted: Sequence[str],
) -> None:
    """Of every weight that has a state, all that the rule keeps: tensors like it by `names`, and
    numbers that are `counted`."""
    params = [p for group in groups for p in group["params"]]
    if not isinstance(state, Mapping) or not all(at in range(len(params)) for at in state):
        raise ValueError(f"state of a state of {of} must be of {len(params)} weights at most")
    for at, kept in state.items():
        entries = [*counted, *names]
        check_saved(f"{of}, state[{at}],", kept, entries, {})
        shapes = [torch.Size()] * len(counted) + [params[at].shape] * len(entries)
        for name, shape in zip(entries, shapes, strict=False):
            t = kept[name]
            if not isinstance(t, Tensor) or t.shape != shape or not t.is_floating_point():
                came = f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else repr(t)
                wanted = f"a floating tensor of shape {list(shape)}"
                raise ValueError(f"{name} of state[{at}] must be {wanted}, got {came}")
