"""A whole zeroth-order step against two plain inference passes and against the MeZO-style loop.

`ratio` is the time of two inference passes over the time of the step: 1 is a step that costs what
they cost. The passes are the faster of two over B rows and one over 2B rows, in `eval()`, of the
same dtype, in a CUDA graph; their inputs are copied into the graph's memory, as the step's are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from rich.table import Table

from experiments.benchmarks.contestants import (
    Plain,
    Step,
    Variant,
    mezo_contestants,
    network_bound,
    verified_batch,
)
from experiments.benchmarks.models import DTYPES, Subject, subjects
from experiments.benchmarks.section import COMPILED_ROWS, Bench, Refused, Row, usable
from experiments.timing import Contestant

BATCHES = (1, 16, 256, 4096, 65536)
FIRST = (65536, 16, 4096, 1, 256)  # the most telling ones, in case the time runs out
LARGE = 65536  # from this batch on a step is timed in its main forms alone

MAIN = (
    Variant(0, "normal", eager=True, mezo=True),
    Variant(0, "rademacher"),
    Variant(1, "normal", eager=True),
)
OTHERS = (
    Variant(0, "normal", defer=True, eager=True),
    Variant(0, "rademacher", defer=True),
    Variant(1, "rademacher"),
    Variant(1, "normal", defer=True),
)


# ---- the section


def contest(bench: Bench, subject: Subject, batch: int, dtype: str, variant: Variant) -> Row:
    """One form of the step beside its baselines: verified, then timed."""
    count = 2 if batch >= LARGE else 3
    sets = [subject.inputs(batch, bench.device, DTYPES[dtype], seed) for seed in range(count)]
    plain = Plain(subject, bench, sets)
    x, _, rows = verified_batch(subject, sets)
    bound = network_bound(plain.net, x.dtype)
    bench.check(lambda: plain.verify(x, rows, bound))
    step = Step(subject, bench, variant, sets)
    verified = bench.check(lambda: step.verify(lambda x, y: step.step(x, y, keep=True)))
    runs: dict[str, Contestant] = {
        "two_passes": plain.two_passes,
        "one_double": plain.one_double,
        "two_passes_again": plain.two_passes,
    }
    if variant.eager:
        runs["step_eager"] = step.eager
    runs["step_captured"] = step.captured()
    if variant.mezo and step.replay is not None:  # what a call costs on the host is left out
        runs["step_replay"] = step.replay
    notes: Row = {}
    if variant.mezo:
        more, notes = mezo_contestants(subject, bench, sets, plain.pool)
        runs |= more
    times = bench.times(runs, seconds=0.3, least=3 if batch >= LARGE else 5)
    losses = runs["step_captured"](0)
    if not (isinstance(losses, torch.Tensor) and bool(torch.isfinite(losses).all())):
        raise Refused("losses are not finite after the timed steps")
    faster = times.faster("two_passes", "one_double")
    row: Row = {"verified": verified, "inference": faster, "notes": notes}
    row["times"] = {name: times.row(name) for name in runs}
    row["spread"] = times.ratio("two_passes_again", "two_passes")
    for name in ("step_captured", "step_replay", "step_eager", "mezo_eager", "mezo_captured"):
        if name in runs:
            row[f"ratio_{name}"] = times.ratio(faster, name)
            if name.startswith("mezo"):
                row[f"speedup_over_{name}"] = times.ratio(name, "step_captured")
    return row


def cells(
    bench: Bench, batches: Sequence[int], models: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, int, str, Variant]]:
    """Model, batch, dtype and form, in the order in which they are timed."""
    if bench.reduced:
        yield from ((name, 2, "fp32", MAIN[0]) for name in models)
        if "mlp" in models:
            yield "mlp", 1, "bf16", MAIN[0]
            yield from (("mlp", 1, "fp32", variant) for variant in (*MAIN[1:], *OTHERS[:2]))
        return
    if bench.part is not None:
        batches = [batch for batch in batches if batch <= COMPILED_ROWS]
    order = sorted(batches, key=lambda batch: FIRST.index(batch) if batch in FIRST else -1)
    for variant in (*MAIN, *OTHERS):
        for batch in order:
            for dtype in dtypes:
                for name in models:
                    if variant in MAIN or batch < LARGE:
                        yield name, batch, dtype, variant


def run(
    bench: Bench,
    batches: Sequence[int] = BATCHES,
    models: Sequence[str] = (),
    dtypes: Sequence[str] = ("bf16", "fp32"),
) -> Row:
    """All cells; the rows in the order in which they are read, not in which they were timed."""
    known = subjects(bench.reduced)
    todo = cells(bench, batches, models or [*known], dtypes)
    rows = [_row(bench, known[cell[0]], *cell[1:]) for cell in todo]
    rows.sort(key=lambda r: (r["model"], r["batch"], r["dtype"], r["variant"]))
    return {
        "networks": {name: one.what for name, one in known.items()},
        "rows": rows,
        "meaning": " ".join((__doc__ or "").split()),
    }


def _row(bench: Bench, subject: Subject, batch: int, dtype: str, variant: Variant) -> Row:
    cell = {"model": subject.name, "batch": batch, "dtype": dtype, "variant": variant.name}
    label = f"step {subject.what}, batch {batch}, {dtype}, {variant.name}"
    row = bench.case(label, lambda: contest(bench, subject, batch, dtype, variant), clean=True)
    return {**cell, **asdict(variant), **row}


def table(result: Row) -> Table:
    """Throughput of captured steps in % of two inference passes; speed over the MeZO-style loop."""
    heads = ("normal", "deferred", "signs", "cls1", "eager", "MeZO", "x MeZO", "x captured MeZO")
    found = Table("model", "batch", "dtype", *(f"{head} %" for head in heads[:6]), *heads[6:])
    rows = usable(result["rows"], "ratio_step_captured")
    for cell in dict.fromkeys((r["model"], r["batch"], r["dtype"]) for r in rows):
        own = {r["variant"]: r for r in rows if (r["model"], r["batch"], r["dtype"]) == cell}
        main = own.get("full-zo-normal", {})
        parts = [
            *(_percent(own.get(name, {}), "ratio_step_captured") for name in COLUMNS),
            _percent(main, "ratio_step_eager"),
            _percent(main, "ratio_mezo_eager"),
            _percent(main, "speedup_over_mezo_eager", 1),
            _percent(main, "speedup_over_mezo_captured", 1),
        ]
        found.add_row(*map(str, cell), *parts)
    return found


COLUMNS = ("full-zo-normal", "full-zo-normal-deferred", "full-zo-rademacher", "cls1-normal")


def _percent(row: Row, key: str, factor: float = 100) -> str:
    return f"{factor * row[key]['median']:.3g}" if key in row else ""
