"""Peak memory of a training step over that of plain inference at the same batch.

On CUDA `torch.cuda.max_memory_allocated` over two eager steps that follow two others; weights,
inputs and everything the step holds count, what was there before does not. On the CPU the peak of
torch's allocator, the first step with its checks among them; there a path is not to be chosen, and
what is not measured is null.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.table import Table

from elasticzo import ZOSGD, ElasticZO, pair_losses
from experiments.benchmarks.models import DTYPES, Subject, subjects
from experiments.benchmarks.section import Bench, Refused, Row, usable
from experiments.train.memory import recorded_peak

BATCH = 256


@dataclass(frozen=True)
class Method:
    """A way to train; `tail` last layers by backpropagation."""

    name: str
    tail: int
    pairing: str
    path: str = "auto"


METHODS = (
    Method("full-zo", 0, "stacked"),
    Method("full-zo", 0, "stacked", "fused"),
    Method("full-zo", 0, "stacked", "staged"),
    Method("full-zo", 0, "sequential"),
    Method("full-zo", 0, "sequential", "fused"),
    Method("full-zo", 0, "sequential", "staged"),
    Method("cls2", 1, "stacked"),
    Method("cls2", 1, "sequential"),
    Method("cls1", 2, "stacked"),
    Method("cls1", 2, "sequential"),
)


def inference(bench: Bench, subject: Subject, batch: int, dtype: str) -> Callable[[], object]:
    """Plain passes in eval()."""
    net = subject.make(bench.device, DTYPES[dtype]).eval().requires_grad_(False)
    x, _ = subject.inputs(batch, bench.device, DTYPES[dtype], 0)

    def passes() -> None:
        with torch.no_grad():
            net(x)

    return passes


def training(
    bench: Bench, subject: Subject, batch: int, dtype: str, method: Method
) -> Callable[[], object]:
    """Eager steps."""
    net = subject.make(bench.device, DTYPES[dtype])
    x, y = subject.inputs(batch, bench.device, DTYPES[dtype], 0)
    model = ElasticZO(
        net,
        tail=method.tail,
        eps=0.02,
        pairing=method.pairing,
        path=method.path,
        # On the CPU the interpreter would count its own copies.
        backend=bench.backend if bench.cuda else "auto",
    ).train()
    zo = ZOSGD(model, lr=1e-9)
    tail = model.tail_optimizer(torch.optim.SGD, lr=1e-9) if method.tail else None

    def step() -> None:
        losses = pair_losses(F.cross_entropy, model(x), y)
        model.backward(losses)
        if tail is not None:
            tail.step()
            tail.zero_grad()
        zo.step(losses)
        if model.effective_pairing != method.pairing:
            raise Refused(f"the halves run {model.effective_pairing}, not {method.pairing}")

    return step


def peak(bench: Bench, build: Callable[[], Callable[[], object]]) -> int:
    """The most bytes held at once."""
    if not bench.cuda:
        return recorded_peak(lambda: _twice(build()))
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated(bench.device)
    run = build()
    _twice(run)  # checks of the first forward, handles of libraries
    torch.cuda.synchronize(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    _twice(run)
    torch.cuda.synchronize(bench.device)
    return torch.cuda.max_memory_allocated(bench.device) - held


def _twice(run: Callable[[], object]) -> None:
    run()
    run()


def run(bench: Bench, dtypes: tuple[str, ...] = ("bf16", "fp32")) -> Row:
    """All methods for every network."""
    rows = []
    batch = 4 if bench.reduced else BATCH
    for name, subject in subjects(bench.reduced).items():
        if bench.reduced and name != "lenet5":
            continue
        for dtype in dtypes if not bench.reduced else ("fp32",):
            rows += _network(bench, name, subject, batch, dtype)
    return {"rows": rows, "meaning": " ".join((__doc__ or "").split())}


def _network(bench: Bench, name: str, subject: Subject, batch: int, dtype: str) -> list[Row]:
    cell = {"model": name, "batch": batch, "dtype": dtype}
    label = f"memory {subject.what}, {dtype}"
    plain = bench.case(
        f"{label}, inference",
        lambda: {"bytes": peak(bench, lambda: inference(bench, subject, batch, dtype))},
        clean=True,
    )
    rows = [{**cell, "method": "inference", **plain}]
    for method in METHODS:
        about = {"method": method.name, "pairing": method.pairing, "path": method.path}
        if not bench.cuda and method.path != "auto":
            row: Row = {"bytes": None, "over_inference": None, "note": "measured on CUDA alone"}
        else:
            row = bench.case(
                f"{label}, {' '.join(about.values())}",
                lambda method=method: {  # type: ignore[misc]
                    "bytes": peak(bench, lambda: training(bench, subject, batch, dtype, method))
                },
                clean=True,
            )
        if row.get("bytes") is not None and plain.get("bytes"):
            row["over_inference"] = row["bytes"] / plain["bytes"]
        rows.append({**cell, **about, **row})
    return rows


def table(result: Row) -> Table:
    """Times the memory of inference, by the rule's paths."""
    forms = [m for m in METHODS if m.path == "auto"]
    found = Table("model", "dtype", *(f"{m.name} {m.pairing}" for m in forms))
    rows = [r for r in usable(result["rows"], "over_inference") if r["path"] == "auto"]
    for cell in dict.fromkeys((r["model"], r["dtype"]) for r in rows):
        own = {
            (r["method"], r["pairing"]): f"{r['over_inference']:.4g}"
            for r in rows
            if (r["model"], r["dtype"]) == cell
        }
        found.add_row(*cell, *(own.get((m.name, m.pairing), "") for m in forms))
    return found
