"""Making the steps of a log again: the optimiser that the log names, given what it was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from elasticzo.module import ZOModule
from elasticzo.optim import OPTIMIZERS
from elasticzo.optim.head import FORMAT, HeadOptimizer


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
    skips = model.session.skips.clone()
    zo = _optimizer(model, header)
    model.session.skips.copy_(skips)  # a replay is no run of its own
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
    """As the run had it: its groups hold the weights that the log updates."""
    names = dict(model.named_head_parameters())
    logged = header["head"]
    missing = [h["name"] for h in logged if h["name"] not in names]
    if missing:
        raise ValueError(f"the log updates {missing[0]!r}, which is not in this model's head")
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
    members = range(_groups(header))
    groups = [[names[h["name"]] for h in logged if h["group"] == i] for i in members]
    how: dict[str, Any] = {"momentum": 0.5} if rule == "momentum" else {}  # each record has its own
    zo = OPTIMIZERS[rule](
        model, lr=0.0, groups=[{"params": g} for g in groups], clip=header["clip"], **how
    )
    asked = header.get("directions", {}).get("kinds", {})
    for name, kind in model.head.kinds.items():  # no forward has settled these
        if kind.name == "auto" and name in asked:
            model.head.kinds[name] = replace(kind, name=asked[name], automatic=True)
    ours = zo.header()
    kept = ("eps", "noise", "queries", "estimator", "directions")
    different = [k for k in kept if header.get(k) != ours.get(k)]
    mine = {h["name"]: (h["index"], h["scale"], h["still_row"]) for h in ours["head"]}
    for h in logged:
        at = (h["index"], h["scale"], h["still_row"])
        if mine.get(h["name"], at) != at:
            different.append(f"index, scale or padding row of {h['name']!r}")
    if different:
        raise ValueError(f"the log is of another model: {', '.join(different)} differ")
    return zo
