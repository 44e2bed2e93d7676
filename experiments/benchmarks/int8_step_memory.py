"""Memory of a LeNet-5 step, INT8 against FP32, in two models.

Liveness: the most bytes that torch's CPU allocator gives out at once in a training step, weights
and one batch included, beside what `elasticzo.memory` predicts. The int8 products take the room
they work in (packed weights, a padded image, its sums) from that allocator, too. Outside of it,
in numba, lie for INT8 one row of a weight while it is packed (at most 5.4 KiB of LeNet-5), the
largest sums of the channels (1 KiB) and 64 KiB of noise during the update, when the activations
are gone; for FP32 as much in chunks of noise.

Static: the paper's formulas (experiments/studies/static_memory.py), every buffer held all the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from elasticzo.int8 import Int8Tensor, quantize
from elasticzo.int8.memory import int8_training_memory
from elasticzo.memory import training_memory
from elasticzo.models import LeNet5
from experiments.benchmarks.int8_steps import PAIRINGS, Fp32Step, Int8Step
from experiments.studies.networks import TAILS
from experiments.studies.static_memory import sizes, static_bytes
from experiments.train.memory import recorded_peak

STATIC_BATCHES = (32, 256)


def rows(batches: Iterable[int]) -> list[dict[str, Any]]:
    """Measured, predicted and static bytes of every method, batch and pairing; None where the
    static model says nothing."""
    found = []
    for batch, method, pairing in product(batches, TAILS, PAIRINGS):
        x, y = torch.zeros(batch, 1, 28, 28), torch.zeros(batch, dtype=torch.int64)
        both = {
            "fp32": _fp32(method, pairing, x, y),
            "int8": _int8(method, pairing, quantize(x), y),
        }
        for precision, one in both.items():
            one["static"] = static_bytes(LeNet5(), x, TAILS[method], precision)
        ratio = both["fp32"]["measured"] / both["int8"]["measured"]
        found.append({"batch": batch, "method": method, "pairing": pairing, **both, "ratio": ratio})
    return found


def _held(tensors: Iterable[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _fp32(method: str, pairing: str, x: Tensor, y: Tensor) -> dict[str, Any]:
    step = Fp32Step(method, torch.contiguous_format, pairing)
    predicted = training_memory(step.model, x, state_tensors=0).peak.bytes
    held = _held([*step.model.module.parameters(), x, y])
    return {"measured": held + recorded_peak(lambda: step(x, y)), "predicted": predicted}


def _int8(method: str, pairing: str, x: Int8Tensor, y: Tensor) -> dict[str, Any]:
    step = Int8Step(method, pairing)
    predicted = int8_training_memory(step.model, x, "mean").peak.bytes
    held = _held([*step.model.state_dict().values(), x.q, x.exponent, y])
    return {"measured": held + recorded_peak(lambda: step(x, y)), "predicted": predicted}


def static_figures() -> dict[str, float]:
    """What the paper's formulas give for LeNet-5: FP32 over INT8 of Full ZO, and what the tail of
    ZO-Feat-Cls2 adds to FP32, in %."""
    net = LeNet5()
    counted = sizes(net, torch.zeros(1, 1, 28, 28))
    found = {}
    for batch in STATIC_BATCHES:
        x = torch.empty(batch, 1, 28, 28)
        full, tail = (static_bytes(net, x, n, of=counted) for n in (0, 1))
        int8 = static_bytes(net, x, 0, "int8", counted)
        assert full is not None and tail is not None and int8 is not None
        found[f"ratio-{batch}"] = full / int8
        found[f"cls2-{batch}-percent"] = 100 * (tail / full - 1)
    return found
