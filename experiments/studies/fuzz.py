"""Random networks in random settings, each held to what must hold of all of them.

python -m experiments.studies.fuzz                      # 5,000 networks, ten minutes on one core
python -m experiments.studies.fuzz --seed 41 --count 1  # one again

Nothing is written. The exit status is 1 where an invariant does not hold.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import tyro

from experiments.commands import plain_console, run_command, tracked
from experiments.studies.fuzz_checks import Broken, check_case
from experiments.studies.fuzz_networks import make_case


@dataclass(frozen=True)
class FuzzConfig:
    """Hold random networks to: forwards move nothing; stacked is sequential is the weights moved by
    hand; g is the directional derivative; a replay, and a resumed run, are the run."""

    count: int = 5000
    """Networks, >= 1."""
    seed: int = 0
    """Of the first network, >= 0; the next has the next seed."""
    threads: int = 1
    """CPU threads of torch, >= 1."""


@dataclass
class Found:
    """What came of all networks: how many held, and the sentences of the others."""

    held: int
    refused: Counter[str]
    broken: list[str]


def fuzz(config: FuzzConfig, bar: Callable[[Sequence[int]], Iterable[int]]) -> Found:
    """Try them all.

    Raises: ValueError for a number out of range.
    """
    for name, least in (("count", 1), ("seed", 0), ("threads", 1)):
        if (given := getattr(config, name)) < least:
            raise ValueError(f"{name} must be at least {least}, got {given}")
    torch.set_num_threads(config.threads)
    found = Found(0, Counter(), [])
    for seed in bar(range(config.seed, config.seed + config.count)):
        try:
            outcome = check_case(make_case(seed))
        except Broken as broken:
            found.broken.append(str(broken))
            continue
        if outcome == "held":
            found.held += 1
        else:
            found.refused[outcome] += 1
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, try, say what came of it."""
    config = tyro.cli(FuzzConfig, args=arguments, prog="python -m experiments.studies.fuzz")
    console = plain_console()

    def finish(found: Found) -> int:
        for text in found.broken:
            console.print(text, markup=False)
        for text, count in found.refused.most_common():
            console.print(f"{count} {text}", markup=False)
        refused = found.refused.total()
        console.print(f"{found.held} held, {refused} refused, {len(found.broken)} broken")
        return 1 if found.broken else 0

    return run_command(
        lambda: fuzz(config, lambda seeds: tracked(seeds, "networks", console)), finish, console
    )


if __name__ == "__main__":
    sys.exit(main())
