"""Accuracy against forward passes spent, for several directions a step.

With q directions a step costs 2 q forward passes; all runs spend the same number of them on the
same images, so that more directions mean fewer steps. The head's learning rate is chosen for each
q by held-out accuracy (seed 0), out of the same number of rates; the tail keeps its own. The runs
that are reported are tested on the test set.
"""

from __future__ import annotations

from typing import Any

from experiments.estimator.bench import Bench, Result, passes_of
from experiments.estimator.probe import stats
from experiments.train.config import Method, TrainConfig

METHODS: tuple[Method, ...] = ("full-zo", "cls2")
POWER = 0.75  # of q, in the middle of the grid of learning rates
TESTS = 4  # of a run, at the most


def passes(bench: Bench) -> int:
    runs = len(METHODS) * len(bench.sizes.passes_queries)
    return runs * (len(bench.sizes.lr_factors) + bench.config.seeds) * _spent(bench)


def _spent(bench: Bench) -> int:
    sizes = bench.sizes
    return sizes.pass_images // sizes.batch * 2 * max(sizes.passes_queries)


def _run(bench: Bench, method: Method, q: int, lr: float, **changes: Any) -> TrainConfig:
    sizes = bench.sizes
    epochs = max(sizes.passes_queries) // q
    given = {"train_images": sizes.pass_images, "epochs": epochs, "queries": q, "head_lr": lr}
    return bench.short(method, **given | {"eval_epochs": max(epochs // TESTS, 1)} | changes)


def run(bench: Bench) -> Result:
    """A row a method and q: the rates tried, the one chosen, accuracy over passes."""
    rows = []
    for method in METHODS:
        for q in bench.sizes.passes_queries:
            default = bench.short(method).head_lr
            assert default is not None
            grid = [default * q**POWER * factor for factor in bench.sizes.lr_factors]
            tuning = {
                (method, f"q={q}", f"lr={lr:.2g}"): _run(bench, method, q, lr, eval_epochs=99)
                for lr in grid
            }
            tuned = [result["test_accuracy"] for result in bench.train(tuning).values()]
            best = grid[tuned.index(max(tuned))]
            runs = {
                (method, f"q={q}", seed): _run(bench, method, q, best, seed=seed, hold_out=0)
                for seed in range(bench.config.seeds)
            }
            values = [result["test_accuracy"] for result in bench.train(runs).values()]
            row: Result = {"method": method, "queries": q, "head_lr": best}
            row["tuning"] = [
                {"head_lr": lr, "accuracy": a} for lr, a in zip(grid, tuned, strict=True)
            ]
            row |= {"accuracies": values, **stats(values)}
            rows.append(row | {"curve": _curve(bench, list(runs.values()))})
    assert passes_of(next(iter(runs.values()))) == _spent(bench)
    return {
        "meaning": " ".join((__doc__ or "").split()),
        "passes": _spent(bench),
        "batch": bench.sizes.batch,
        "train_images": bench.sizes.pass_images,
        "tuned_on": f"{bench.sizes.hold_out} held-out training images, seed 0",
        "tested_on": "the test set",
        "rows": rows,
    }


def _curve(bench: Bench, runs: list[TrainConfig]) -> list[Result]:
    """Accuracy over the seeds at every test, by forward passes."""
    by_passes: dict[int, list[float]] = {}
    for one in runs:
        for line in bench.tests(one):
            spent = line["step"] * 2 * one.queries
            by_passes.setdefault(spent, []).append(line["test_accuracy"])
    return [{"passes": spent, **stats(values)} for spent, values in by_passes.items()]
