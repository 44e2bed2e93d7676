"""Which pass feeds the tail: its gradient from the +, - and clean pass and the mean of + and -.

True is the gradient of the unperturbed network: of the same batch ("batch"), and of many images
("population"), which says how much of what is wrong comes from the batch anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from elasticzo import ZOSGD, pair_losses
from elasticzo.losses import select_source
from experiments.estimator.bench import STATES, Bench, Result, batch
from experiments.estimator.probe import along, gradient_of, stats
from experiments.train.config import Method
from experiments.train.learner import FloatLearner

METHODS: tuple[Method, ...] = ("cls2", "cls1")
SOURCES = ("plus", "minus", "mean", "clean")


def passes(bench: Bench) -> int:
    runs = bench.run_passes(len(SOURCES) - 1) + bench.run_passes(1) * 3 // 2
    return len(METHODS) * (runs + len(STATES) * 3 * bench.sizes.tail_batches)


def run(bench: Bench) -> Result:
    """A row a method, state and source; accuracies of short runs."""
    rows = []
    for method in METHODS:
        for state in STATES:
            named = {"method": method, "state": state}
            rows += [named | row for row in compared(bench, bench.learner(method, state))]
    settings = {source: {"tail_source": source} for source in SOURCES}
    return {
        "meaning": " ".join((__doc__ or "").split()) + " error: |gradient - true| / |true|.",
        "batch": bench.sizes.batch,
        "population": bench.sizes.population,
        "eps": {method: bench.short(method).eps for method in METHODS},
        "rows": rows,
        "accuracy": {method: bench.accuracies(method, settings) for method in METHODS},
        "tested_on": f"{bench.sizes.hold_out} held-out training images",
    }


def compared(bench: Bench, learner: FloatLearner) -> list[Result]:
    """Cosines and relative errors of each source over batches, a new z each."""
    model, names = learner.model, [n for n, _ in learner.model.named_tail_parameters()]
    zo = ZOSGD(model, lr=0.0)
    part = slice(bench.sizes.population)
    x, y = learner.inputs.test_x(part), learner.inputs.test_y[part]
    whole = flat(gradient_of(model.module, names, x, y, cross_entropy)[1])
    found: dict[str, dict[str, list[float]]] = {
        source: {"batch": [], "population": [], "error": []} for source in SOURCES
    }
    for number in range(bench.sizes.tail_batches):
        x, y = batch(learner, number)
        true = flat(gradient_of(model.module, names, x, y, cross_entropy)[1])
        losses = pair_losses(cross_entropy, model(x), y)
        clean = pair_losses(cross_entropy, model.clean_forward(x), y)[0]
        for source, to in found.items():
            loss = clean if source == "clean" else select_source(losses, source)
            leaves = list(model.tail_parameters())
            came = flat(torch.autograd.grad(loss, leaves, retain_graph=True))
            to["batch"].append(along(came, true))
            to["population"].append(along(came, whole))
            to["error"].append(float((came.double() - true).norm() / true.norm()))
        zo.step(losses)
        bench.told(3)
    return [
        {"source": source, **{name: stats(values) for name, values in to.items()}}
        for source, to in found.items()
    ]


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
