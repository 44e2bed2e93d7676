"""Fused against staged, over rows, width, dtype and noise: does the rule of `zo_kernels.paths` pick
well?

Fused is one call of the layer's kernel; staged is `perturbed_weights` and the library's product, as
`elasticzo` makes it. `regret` is the time of the path that the rule chooses over that of the better
one: 1 where it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import zo_kernels as zk
from elasticzo.forward.layers import staged
from elasticzo.forward.precision import vendor_precision
from experiments.benchmarks.cases import NOISES, Case, Shared
from experiments.benchmarks.product_cases import Product, convolution, linear
from experiments.benchmarks.section import COMPILED_ROWS, Bench, Row, usable
from experiments.timing import Graphed, percentiles, sets_for
from zo_kernels.paths import Work, choose, device_named, seconds

ROWS = (16, 64, 256, 1024, 4096, 16384, 65536)
WIDTHS = (256, 1024, 4096)
BATCHES = (1, 16, 256, 1024)
IMAGES = ((16, 32), (64, 16), (256, 8))  # channels, height and width
KINDS = ("bf16", "tf32", "ieee")


@dataclass(frozen=True)
class Cell:
    """One layer: `rows` of a half (images, for a convolution) and `width` features or channels."""

    layer: str
    rows: int
    width: int
    size: int  # of the images; 1 for a linear layer
    kind: str
    noise: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bf16" else torch.float32

    @property
    def precision(self) -> str:
        return "ieee" if self.kind == "bf16" else self.kind

    def case(self, s: Shared) -> Case:
        unit = {"ieee": "fp32"}.get(self.kind, self.kind)
        settings = (self.kind, unit, self.dtype, self.noise)
        if self.layer == "linear":
            return linear(s, self.rows, self.width, *settings)
        return convolution(s, self.rows, self.size, self.width, *settings, after=False)

    def staged(self, s: Shared) -> Callable[[Product], Tensor]:
        """The other path on the same inputs."""
        if self.layer == "linear":
            module: Any = nn.Linear(self.width, self.width, device="meta")
            product = staged.linear
        else:
            module = nn.Conv2d(self.width, self.width, 3, padding=1, device="meta")
            product = staged.conv
        settings: dict[str, Any] = {"noise": self.noise, "backend": s.backend}

        def run(given: Product) -> Tensor:
            x, w, b = given
            halves: staged.Staged = {
                name: zk.perturbed_weights(t, s.key, s.eps, tensor=i, **settings)
                for name, i, t in (("weight", 1, w), ("bias", 2, b))
            }
            return product(module, x, halves, 2)

        return run

    def work(self) -> Work:
        """What the rule looks at."""
        linear_layer = self.layer == "linear"
        rows = self.rows * self.size * self.size
        return Work(
            rows=rows,
            outputs=self.width,
            inputs=self.width * (1 if linear_layer else 9),
            queries=1,
            x=rows * self.width,
            y=rows * self.width,
            shared=False,
            noise=self.noise,
            x_dtype=self.dtype,
            w_dtype=self.dtype,
            compute=self.dtype,
            precision=self.precision,
        )


def cells(reduced: bool) -> Iterator[Cell]:
    """The grid; reduced, one of each kind of layer and noise."""
    if reduced:
        yield Cell("linear", 4, 16, 1, "bf16", "rademacher")
        yield Cell("linear", 4, 16, 1, "ieee", "normal")
        yield Cell("conv2d", 1, 4, 4, "tf32", "rademacher")
        return
    for noise in NOISES:
        for kind in KINDS:
            for width in WIDTHS:
                for rows in ROWS:
                    yield Cell("linear", rows, width, 1, kind, noise)
    for noise in NOISES:
        for kind in KINDS[:2]:
            for channels, size in IMAGES:
                for batch in BATCHES:
                    yield Cell("conv2d", batch, channels, size, kind, noise)


def time_cell(bench: Bench, s: Shared, cell: Cell) -> Row:
    """Both paths against float64, then against each other."""
    torch.manual_seed(0)
    case, staged = cell.case(s), cell.staged(s)
    first = case.make()
    with vendor_precision(bench.device, cell.precision):
        bench.check(lambda: (case.verify(first), case.verify(first, staged)))
        count = sets_for(case.bytes, bench.device) if bench.part is None else 1
        sets = [first, *(case.make() for _ in range(count - 1))]
        runs = {
            "fused": Graphed(lambda: [case.run(one) for one in sets][-1], bench.device),
            "staged": Graphed(lambda: [staged(one) for one in sets][-1], bench.device),
        }
        times = bench.times({**runs, "fused_again": runs["fused"]}, seconds=0.2)
    index = bench.device.index if bench.cuda else None
    model = device_named(torch.cuda.get_device_name(bench.device) if bench.cuda else "H200")
    best, choice = times.faster("fused", "staged"), choose(cell.work(), index)
    return {
        "fused_us": 1e6 * times.median("fused") / count,
        "staged_us": 1e6 * times.median("staged") / count,
        "predicted_us": {path: 1e6 * t for path, t in seconds(cell.work(), model).items()},
        "fused_over_staged": times.ratio("fused", "staged"),
        "spread": times.ratio("fused_again", "fused"),
        "best": best,
        "choice": choice,
        "regret": times.median(choice) / times.median(best),
        "sets": count,
    }


def run(bench: Bench) -> Row:
    """The map, and how well the rule picks."""
    s = Shared(bench)
    rows = []
    for cell in cells(bench.reduced):
        if bench.part is not None and cell.rows > COMPILED_ROWS:
            continue
        label = f"paths {cell.layer} {cell.rows} x {cell.width}, {cell.kind}, {cell.noise}"
        row = bench.case(label, lambda cell=cell: time_cell(bench, s, cell))  # type: ignore[misc]
        rows.append({**cell.__dict__, **row})
    regrets = [row["regret"] for row in usable(rows, "regret")]
    summary: Row = {}
    if regrets:
        low, middle, high = percentiles(regrets)
        right = sum(row["best"] == row["choice"] for row in usable(rows, "regret"))
        summary = {
            "cells": len(regrets),
            "right": right,
            "regret": {"p20": low, "median": middle, "p80": high, "worst": max(regrets)},
        }
    return {"rows": rows, "summary": summary, "meaning": " ".join((__doc__ or "").split())}


def table(result: Row) -> Table:
    """For each layer, dtype and noise: how often the rule is right, and what it costs if not."""
    found = Table("layer", "dtype", "noise", "cells", "right", "worst regret", "where")
    rows = usable(result["rows"], "regret")
    for layer, kind, noise in dict.fromkeys((r["layer"], r["kind"], r["noise"]) for r in rows):
        own = [r for r in rows if (r["layer"], r["kind"], r["noise"]) == (layer, kind, noise)]
        worst = max(own, key=lambda r: float(r["regret"]))
        right = sum(r["best"] == r["choice"] for r in own)
        where = f"{worst['rows']} x {worst['width']}"
        cells = [layer, kind, noise, str(len(own)), str(right), f"{worst['regret']:.3g}", where]
        found.add_row(*cells)
    return found
