"""Error of g against the exact derivative along z, over eps: round-off and curvature.

Per direction, `|g - slope| / rms(slope)`, slope being the exact derivative of the loss along s z
(autograd's gradient in float64, times s z). "curvature": g in float64, without round-off to speak
of. "round-off": g in fp32 minus g in float64, of the same z and eps. "fp32", "bf16": all of it,
with products computed in that dtype (the perturbation is always added in fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.estimator.bench import STATES, Bench, Result
from experiments.estimator.probe import Probe, stats
from experiments.train.config import Method

METHODS: tuple[Method, ...] = ("full-zo", "cls2")
KINDS = ("fp32", "bf16", "round-off", "curvature")
CHUNK = 4  # directions of one forward
UNIT = 2.0**-24  # of rounding to nearest in fp32


def passes(bench: Bench) -> int:
    sizes = bench.sizes
    measured = len(STATES) * len(sizes.epss) * 3 * 2 * sizes.slopes
    return len(METHODS) * (measured + bench.run_passes(len(sizes.run_epss) + 1))


def run(bench: Bench) -> Result:
    """A row a method, state and eps; accuracies of short runs."""
    rows = []
    for method in METHODS:
        for state in STATES:
            learner = bench.learner(method, state)
            probe = bench.probe(learner)
            noise, scale = str(learner.config.noise), learner.config.scale
            for eps in bench.sizes.epss:
                given = {"eps": eps, "noise": noise, "scale": scale}
                named = {"method": method, "state": state, "eps": eps}
                rows.append(named | errors(bench, probe, given))
    accuracy = {}
    for method in METHODS:
        own = bench.short(method).eps
        assert own is not None
        settings = {f"{eps:g}": {"eps": eps} for eps in sorted({*bench.sizes.run_epss, own})}
        accuracy[method] = {"recipe_eps": own, **bench.accuracies(method, settings)}
    return {
        "meaning": " ".join((__doc__ or "").split()),
        "batch": bench.sizes.batch,
        "rows": rows,
        "accuracy": accuracy,
        "tested_on": f"{bench.sizes.hold_out} held-out training images",
    }


def errors(bench: Bench, probe: Probe, given: Result) -> Result:
    """Errors of one eps by kind; None where eps vanishes in the compute dtype. `one_rounding` is
    what one rounding of each loss in fp32 would bring: `2^-24 L / (eps rms(slope))`."""
    slopes: list[Tensor] = []
    found: list[tuple[Tensor | None, ...]] = []
    for seed in range(-(-bench.sizes.slopes // CHUNK)):
        chunk = {**given, "queries": CHUNK, "seed": seed}
        narrow = probe.wrapped(**chunk)
        slopes.append(probe.slopes(narrow))
        wide = probe.wrapped(**chunk, wide=True)
        found.append((probe.projected(narrow), in_bf16(probe, chunk), probe.projected(wide)))
        bench.told(3 * 2 * CHUNK)
    slope = torch.cat(slopes)
    rms = float(slope.square().mean().sqrt())
    g, bf16, exact = (_joined([row[i] for row in found]) for i in range(3))
    assert g is not None and exact is not None  # fp32 and fp64 keep any eps that is asked for
    off = {
        "fp32": g - slope,
        "bf16": None if bf16 is None else bf16 - slope,
        "round-off": g - exact,
        "curvature": exact - slope,
    }
    row: Result = {"rms_slope": rms, "one_rounding": UNIT * probe.value / (given["eps"] * rms)}
    for kind, error in off.items():
        row[kind] = None if error is None else stats((error.abs() / rms).tolist())
    return row


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if len(there) == len(parts) else None


def in_bf16(probe: Probe, given: Result) -> Tensor | None:
    try:
        return probe.projected(probe.wrapped(**given, compute_dtype=torch.bfloat16))
    except ValueError as error:
        if "vanishes" not in str(error):
            raise
        return None
