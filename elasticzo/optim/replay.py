"""Making the steps of a log again: the optimiser that the log names, given what it was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from elasticzo.module import ZOModule
from elasticzo.optim import OPTIMIZERS
from elasticzo.optim.head import FORMAT, HeadOptimizer
from elasticzo.optim.header import check_head


def replayer(model: ZOModule, header: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """What makes a step again from its record; the optimiser's state begins at zero.

    Raises: ValueError where the log is not of this model.
    """
    if header["format"] != FORMAT:
        raise ValueError(f"expected a log of format {FORMAT}, got {header['format']!r}")
    if header.get("estimator", {}).get("name") == "feedback":
        raise ValueError(
            "the run learnt by feedback: its updates depend on the batches and on the tail, which "
            "a log does not have; go on from a checkpoint instead"
        )
    zo = _optimizer(model, header)
    count = _groups(header)
    device = model.session.device

    def make_again(record: Mapping[str, Any]) -> None:
        rates, numbers = record["lr"], record.get("numbers", [])
        width = len(numbers) // len(rates)
        for i, group in enumerate(zo.param_groups[:count]):
            group["lr"], group["weight_decay"] = rates[i], record["weight_decay"][i]
            if width:
                zo.take_numbers(group, numbers[i * width : (i + 1) * width])
        found = torch.tensor(float(record["skipped"]), device=device)
        losses = torch.tensor(record["losses"], dtype=torch.float64, device=device)
        zo.update_from(losses, found)

    return make_again


def _groups(header: Mapping[str, Any]) -> int:
    """How many groups have weights that the log updates."""
    return 1 + max((h["group"] for h in header["head"]), default=0)


def _optimizer(model: ZOModule, header: Mapping[str, Any]) -> HeadOptimizer:
    """As the run had it, once all that a replay depends on is known to be the same."""
    _check_run(model, header)
    skips, kinds = model.session.skips.clone(), dict(model.head.kinds)
    asked = header.get("directions", {}).get("kinds", {})
    for name, kind in kinds.items():  # no forward has settled these
        if kind.name == "auto" and name in asked:
            model.head.kinds[name] = replace(kind, name=asked[name], automatic=True)
    try:
        zo = _built(model, header)
        ours = zo.header()
        check_head(header, ours)
        kept = ("eps", "noise", "queries", "estimator", "directions")
        different = [k for k in kept if header.get(k) != ours.get(k)]
        if different:
            raise ValueError(f"the log is of another model: {', '.join(different)} differ")
    except Exception:
        model.head.kinds.update(kinds)
        raise
    finally:
        model.session.skips.copy_(skips)  # a replay is no run of its own
    return zo


def _check_run(model: ZOModule, header: Mapping[str, Any]) -> None:
    if header["backend"] != model.backend:
        raise ValueError(
            f"the log was made on backend {header['backend']!r}, this model runs "
            f"{model.backend!r}: give backend={header['backend']!r}"
        )
    rule = header.get("rule", "sgd")
    if rule not in OPTIMIZERS:
        raise ValueError(f"the log has the rule {rule!r}, known are {', '.join(OPTIMIZERS)}")
    if not header.get("fresh", True):
        raise ValueError(
            f"the log begins at step {header['start']}, where the state of its rule ({rule}) was "
            "not zero: it cannot be replayed from its header"
        )


def _built(model: ZOModule, header: Mapping[str, Any]) -> HeadOptimizer:
    """Its groups hold those weights of the log that this model has."""
    names, rule = dict(model.named_head_parameters()), header.get("rule", "sgd")
    logged = [one for one in header["head"] if one["name"] in names]
    groups = [
        {"params": [names[one["name"]] for one in logged if one["group"] == i]}
        for i in range(_groups(header))
    ]
    how: dict[str, Any] = {"momentum": 0.5} if rule == "momentum" else {}  # each record has its own
    return OPTIMIZERS[rule](model, lr=0.0, groups=groups, clip=header["clip"], **how)
