"""What every cut will hold, before it runs: `python -m experiments.studies.plan --model lenet5`.

For each cut C, from Full BP (C = 0) to Full ZO (C = L, all layers): the peak of a training step by
the liveness model (`elasticzo.memory`), the paper's static formulas beside it, what fits a budget.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from elasticzo import ElasticZO
from elasticzo.cut import resolve_cut
from elasticzo.int8 import ElasticZOInt8, quantize
from elasticzo.int8.memory import int8_inference_memory, int8_training_memory
from elasticzo.memory import inference_memory
from elasticzo.memory.budget import Candidate, cuts, price
from experiments.commands import plain_console, run_command, tracked
from experiments.studies.networks import INT8_NETWORKS, NETWORKS, STATE_TENSORS
from experiments.studies.static_memory import sizes, static_bytes
from experiments.train.recipes import tail_of
from experiments.train.resolve import pick_device

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True)
class PlanConfig:
    """Predicted peak memory of every cut of a network."""

    model: Literal["lenet5", "resnet20", "vgg11", "pointnet"] = "lenet5"
    """Network; lenet5 and resnet20 take 28x28 grey images, vgg11 32x32 coloured ones, pointnet
    clouds of 1,024 points (40 classes)."""
    batch_size: int = 64
    """Samples a step, >= 1."""
    method: Literal["full-zo", "cls2", "cls1", "full-bp"] | None = None
    """Mark the cut of this method."""
    budget: str | None = None
    """Mark what fits: bytes, or 20MB, 18.5MiB, 1GB."""
    pairing: Literal["stacked", "sequential"] = "stacked"
    """Both halves as one batch, or one after the other."""
    tail_optimizer: Literal["sgd", "momentum", "adam"] = "adam"
    """Of the tail: it keeps 0, 1 or 2 tensors for a parameter."""
    queries: int = 1
    """Directions a step, Q >= 1."""
    precision: Literal["fp32", "int8"] = "fp32"
    """fp32, or int8: integers only, for lenet5 and pointnet (without BatchNorm)."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda or cuda:<n>."""


@dataclass(frozen=True)
class Plan:
    """Predictions for one network and batch.

    Attributes:
        inference: predicted peak of a plain pass.
        cuts: from Full BP to Full ZO.
        static: the paper's formulas, for each cut; None where they say nothing.
    """

    inference: int
    cuts: list[Candidate]
    static: list[int | None]

    def largest_within(self, budget: int) -> Candidate | None:
        """What tail="auto" takes: the largest tail that fits."""
        fitting = (c for c in self.cuts if c.memory and c.memory.peak.bytes <= budget)
        return next(fitting, None)


def parse_bytes(text: str) -> int:
    """Bytes of a size with a unit: MB is 10^6, MiB is 2^20.

    >>> parse_bytes("20MB"), parse_bytes("1.5 KiB"), parse_bytes("4096")
    (20000000, 1536, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in UNITS:
        raise ValueError(f"budget must be a size like 20MB, 18.5MiB or 4096, got {text!r}")
    return int(float(found[1]) * UNITS[found[2].lower()])


def build(config: PlanConfig) -> nn.Module:
    """The network in the form that the precision needs."""
    if config.precision == "fp32":
        return NETWORKS[config.model][0]()
    if config.model not in INT8_NETWORKS:
        known = ", ".join(INT8_NETWORKS)
        raise ValueError(f"precision int8 takes model {known}, got {config.model!r}")
    return INT8_NETWORKS[config.model]()


def make_plan(config: PlanConfig, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> Plan:
    """Predict every cut; `progress` goes through them."""
    for name in ("batch_size", "queries"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(config, name)}")
    device = pick_device(config.device)
    net = build(config).to(device)
    example = torch.zeros(1, device=device).expand(config.batch_size, *NETWORKS[config.model][1])
    counted = sizes(net, example)
    found = []
    for cut, tail in progress(cuts(net)):
        found.append(_price(config, net, example, cut, tail))
    static = [static_bytes(net, example, c.tail, config.precision, counted) for c in found]
    if config.precision == "int8":
        inference = int8_inference_memory(ElasticZOInt8(net, 0), quantize(example)).bytes
    else:
        inference = inference_memory(net, example).bytes
    return Plan(inference, found, static)


def _price(
    config: PlanConfig, net: nn.Module, example: Tensor, cut: int, tail: int | str
) -> Candidate:
    if config.precision == "fp32":
        how = {"pairing": config.pairing, "queries": config.queries}
        return price(
            ElasticZO, net, cut, tail, example, STATE_TENSORS[config.tail_optimizer], how=how
        )
    model = ElasticZOInt8(net, tail, queries=config.queries, pairing=config.pairing)
    memory = int8_training_memory(model, quantize(example), "mean")  # the recipes' source
    return Candidate(cut, tail, sum(w.numel() for w in model.tail_parameters()), memory)


# ---- what a person sees


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.2f} MB"


def table(config: PlanConfig, plan: Plan) -> Table:
    """A line a cut."""
    net = build(config)
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("C", "BP trains", "parameters", "peak MB", "+ %", "static MB", "+ %", ""):
        justify: Any = "left" if name in ("BP trains", "") else "right"
        shown.add_column(name, justify=justify, no_wrap=name != "BP trains")
    budget = parse_bytes(config.budget) if config.budget is not None else None
    chosen = plan.largest_within(budget) if budget is not None else None
    full, static_full = plan.cuts[-1].memory, plan.static[-1]
    assert full is not None
    marked = None
    if config.method is not None:
        marked = set(resolve_cut(net, tail_of(config.model, config.method)).tail_parameters)
    for one, static in zip(plan.cuts, plan.static, strict=True):
        cut = resolve_cut(net, one.tail)
        cells = [str(one.cut), _short(cut.named), f"{one.parameters:,}"]
        if one.memory is None:
            shown.add_row(*cells, "", "", "", "", f"not possible: {one.reason}")
            continue
        peak = one.memory.peak.bytes
        notes = {
            config.method or "": marked == set(cut.tail_parameters),
            "fits": budget is not None and peak <= budget,
            "auto": one is chosen,
        }
        cells += [f"{peak / 1e6:,.2f}", _over(peak, full.peak.bytes)]
        cells += [f"{static / 1e6:,.2f}", _over(static, static_full)] if static else ["", ""]
        shown.add_row(*cells, ", ".join(note for note, holds in notes.items() if holds))
    return shown


def _short(named: str) -> str:
    """The first of many names."""
    names = named.split(", ")
    return named if len(names) < 3 else f"{names[0]} ..."


def _over(this: int, that: int | None) -> str:
    return "" if that is None else f"{100 * (this / that - 1):.2f}"


def report(config: PlanConfig, plan: Plan, console: Console) -> None:
    console.print(
        f"{config.model}, batch {config.batch_size}, {config.precision}, {config.pairing}, tail by "
        f"{config.tail_optimizer}; a plain pass holds {megabytes(plan.inference)} (predicted)",
        markup=False,
    )
    console.print(table(config, plan))
    console.print(
        "peak: predicted; static: the paper's formulas; + %: over Full ZO; auto: tail='auto'",
        markup=False,
    )
    full = plan.cuts[-1].memory
    assert full is not None
    parts = ", ".join(f"{name} {megabytes(n)}" for name, n in full.peak.parts.items())
    console.print(
        f"Full ZO holds {full.peak.bytes / plan.inference:.3f} times a plain pass: {parts}; its "
        f"peak is in {full.peak.at}",
        markup=False,
    )
    budget = parse_bytes(config.budget) if config.budget is not None else None
    if budget is not None and plan.largest_within(budget) is None:
        least = min(c.memory.peak.bytes for c in plan.cuts if c.memory)
        console.print(f"nothing fits {config.budget}: the least is {least:,} bytes", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, predict, print; 2 where something is refused."""
    config = tyro.cli(PlanConfig, args=arguments, prog="python -m experiments.studies.plan")
    console = plain_console()

    def work() -> Plan:
        if config.budget is not None:
            parse_bytes(config.budget)
        return make_plan(config, lambda items: tracked(items, "cuts", console))

    return run_command(work, lambda plan: report(config, plan, console), console)


if __name__ == "__main__":
    sys.exit(main())
