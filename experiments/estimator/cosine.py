"""Cosine between estimates averaged over q directions and the true gradient of the same batch."""

from __future__ import annotations

from experiments.estimator import theory
from experiments.estimator.bench import STATES, Bench, Result, variants
from experiments.estimator.probe import cosines, stats
from experiments.train.config import Method

METHODS: tuple[Method, ...] = ("full-zo", "cls2")
VARIANTS = 3


def passes(bench: Bench) -> int:
    return len(METHODS) * len(STATES) * VARIANTS * 2 * bench.sizes.directions


def run(bench: Bench) -> Result:
    """A row a method, state, variant, layer ("head" is all of them) and q."""
    rows = []
    sizes = bench.sizes
    for method in METHODS:
        for state in STATES:
            learner = bench.learner(method, state)
            probe = bench.probe(learner)
            noise = str(learner.config.noise)
            for variant, settings in variants(learner).items():
                model = probe.wrapped(noise=noise, **settings)
                parts = probe.parts(model)
                head = list(parts.values())
                layers = {"head": list(parts), **probe.layers}
                found = cosines(probe, model, sizes.queries, sizes.directions, bench.told)
                for (layer, q), values in found.items():
                    own = [parts[name] for name in layers[layer]]
                    row: Result = {
                        "method": method,
                        "state": state,
                        "variant": variant,
                        "layer": layer,
                    }
                    row |= {"size": sum(part.size for part in own), "queries": q, **stats(values)}
                    rows.append(row | {"theory": theory.cosine(own, head, q, noise)})
    return {
        "meaning": "cosine of mean_q g s z to the gradient of the same batch (autograd, float64); "
        "mean and standard deviation over n averages that share no direction",
        "theory": " ".join((theory.__doc__ or "").split()),
        "batch": sizes.batch,
        "eps": {method: bench.short(method).eps for method in METHODS},
        "scale": {method: bench.short(method).scale for method in METHODS},
        "rows": rows,
    }
