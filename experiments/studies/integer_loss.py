"""How many fraction bits the integer loss needs: `python -m experiments.studies.integer_loss`.

A step of ElasticZO-INT8 uses the sign of L+ - L- alone. For pairs of int8 logits this compares the
sign of the integer cross-entropy, with F fractional bits, to that of float64's cross-entropy on the
same logits: opposite signs are wrong, zeros where float64 has a sign are lost steps.

The logits are synthetic: normal, several exponents, the - half the + half changed by a few units.
`experiments.studies.integer_signs` does the same with every step of real runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.progress import track
from torch import Tensor

from experiments.commands import RESULTS, plain_console, run_command
from experiments.files import check_file, write_json
from experiments.studies.signs import sign_errors, table
from experiments.train.environment import made_on

CLASSES = 10
SPREAD = 40.0  # standard deviation of a logit, in units of int8


@dataclass(frozen=True)
class Config:
    """Wrong signs of the integer loss against float64."""

    trials: int = 2000
    """Pairs of passes for each kind of logits, >= 1."""
    batches: tuple[int, ...] = (32, 256)
    """Samples of a pass, each >= 1."""
    fraction_bits: tuple[int, ...] = (0, 4, 8, 12, 16)
    """F to compare, each in [0, 16]."""
    exponents: tuple[int, ...] = (-6, -5, -4, -3, -2)
    """Of the synthetic logits."""
    changes: tuple[int, ...] = (2, 8)
    """Largest change of a logit from the + to the - half, in units of int8."""
    seed: int = 0
    """Of the synthetic logits."""
    out: Path = RESULTS / "integer_loss.json"
    """The file to write."""


def check(config: Config) -> None:
    """Raise ValueError for a value out of its range: before anything is computed or written."""
    ranges = {
        "trials": ((config.trials,), 1, 1 << 20),
        "batches": (config.batches, 1, 1 << 20),
        "fraction_bits": (config.fraction_bits, 0, 16),
        "exponents": (config.exponents, -64, 64),
        "changes": (config.changes, 0, 254),
        "seed": ((config.seed,), 0, (1 << 63) // 1000 - 1000),
    }
    for name, (values, low, high) in ranges.items():
        if not values or not all(low <= value <= high for value in values):
            raise ValueError(f"{name} must be at least one number in [{low}, {high}], got {values}")
    check_file("out", config.out)


def synthetic(
    trials: int, batch: int, exponent: int, change: int, halving: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal logits; the - half differs by at most `change`. `halving`: its exponent is one higher
    and its integers half as large, as where its range took one bit more."""
    generator = torch.Generator().manual_seed(seed)
    size = (trials, batch, CLASSES)
    plus = (torch.randn(size, generator=generator) * SPREAD).round().clamp(-127, 127)
    minus = plus + torch.randint(-change, change + 1, size, generator=generator)
    if halving:
        minus = (minus / 2).round()
    logits = torch.stack([plus, minus.clamp(-127, 127)], 1).to(torch.int8)
    exponents = torch.full((trials, 2), exponent, dtype=torch.int32)
    exponents[:, 1] += int(halving)
    target = torch.randint(CLASSES, (trials, batch), generator=generator)
    return logits, exponents, target


def synthetic_rows(config: Config) -> list[dict[str, Any]]:
    kinds = [
        (batch, exponent, change, halving)
        for batch in config.batches
        for exponent in config.exponents
        for change in config.changes
        for halving in (False, True)
    ]
    rows = []
    for number, (batch, exponent, change, halving) in enumerate(track(kinds, "kinds of logits")):
        seed = 1000 * config.seed + number
        logits = synthetic(config.trials, batch, exponent, change, halving, seed)
        named = {"batch": batch, "exponent": exponent, "change": change}
        errors = sign_errors(*logits, config.fraction_bits)
        rows.append(named | {"minus_halved": halving, "fraction_bits": errors})
    return rows


def main(config: Config) -> int:
    """Compare and report; the exit status as that of the training command."""

    def work() -> list[dict[str, Any]]:
        check(config)
        return synthetic_rows(config)

    return run_command(work, lambda rows: report(config, rows), plain_console())


def report(config: Config, rows: list[dict[str, Any]]) -> None:
    """Print the table and write the file."""
    print("wrong / zero signs, % of steps\n" + table(rows))
    written = {
        "command": "python -m experiments.studies.integer_loss",
        **made_on(torch.device("cpu")),
        "logits": f"normal, standard deviation {SPREAD} units of int8",
        "classes": CLASSES,
        "trials": config.trials,
        "seed": config.seed,
        "rows": rows,
    }
    write_json(config.out, written)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
