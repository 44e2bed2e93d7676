"""Normal against Rademacher: variance of g, length and cosine of estimates, accuracy."""

from __future__ import annotations

from experiments.estimator import theory
from experiments.estimator.bench import STATES, Bench, Result
from experiments.estimator.probe import Probe, cosines, stats
from experiments.train.config import Method

METHODS: tuple[Method, ...] = ("full-zo", "cls2")
NOISES = ("normal", "rademacher")


def passes(bench: Bench) -> int:
    kinds = len(METHODS) * len(NOISES)
    measured = kinds * len(STATES) * 4 * bench.sizes.noise_directions
    return measured + bench.run_passes(kinds)


def run(bench: Bench) -> Result:
    """Rows of g (one a method, state, noise), rows of cosines (a q each), accuracies."""
    rows, cosine_rows = [], []
    for method in METHODS:
        for state in STATES:
            learner = bench.learner(method, state)
            probe = bench.probe(learner)
            given = {"eps": learner.config.eps, "scale": learner.config.scale}
            for noise in NOISES:
                named = {"method": method, "state": state, "noise": noise}
                rows.append(named | g_row(bench, probe, noise, given))
                cosine_rows += [named | row for row in cosine_of(bench, probe, noise, given)]
    settings = {noise: {"noise": noise} for noise in NOISES}
    return {
        "meaning": "g_squared: g^2 over |s gradient|^2, its expectation without curvature; "
        "length_squared: |g s z|^2 over its expectation; means and standard deviations over "
        "directions; the recipe's eps and scales",
        "rows": rows,
        "cosines": cosine_rows,
        "accuracy": {method: bench.accuracies(method, settings) for method in METHODS},
        "tested_on": f"{bench.sizes.hold_out} held-out training images",
    }


def g_row(bench: Bench, probe: Probe, noise: str, given: Result) -> Result:
    """Moments of g and of the estimate's length, in units of what they should be."""
    model = probe.wrapped(noise=noise, seed=1, **given)
    head = list(probe.parts(model).values())
    variance = theory.variance_of_g(head)
    length = theory.squared_norm(head, head, 1, noise)
    gs, lengths = [], []
    for g, estimate in probe.directions(model, bench.sizes.noise_directions):
        gs.append(g)
        lengths.append(float(estimate.double().square().sum()))
        bench.told(2)
    return {
        "g": stats(gs),
        "expected_sd_of_g": variance**0.5,
        "g_squared": stats([g * g / variance for g in gs]),
        "length_squared": stats([one / length for one in lengths]),
    }


def cosine_of(bench: Bench, probe: Probe, noise: str, given: Result) -> list[Result]:
    sizes = bench.sizes
    model = probe.wrapped(noise=noise, seed=2, **given)
    head = list(probe.parts(model).values())
    found = cosines(probe, model, sizes.noise_queries, sizes.noise_directions, bench.told)
    return [
        {"queries": q, **stats(values), "theory": theory.cosine(head, head, q, noise)}
        for (layer, q), values in found.items()
        if layer == "head"
    ]
